"""A device that is lost in the middle of a round, in three ways, and takes part again after each.

Its ClientApp ends by SIGTERM; its SuperNode dies, while the client that keeps it running lives
on; its network is gone for most of a round. The other device trains on. How a ClientApp is
killed by SIGKILL: test_fleet_server, which is not slow.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from fleet.deploy.addresses import Address
from fleet.deploy.provisioning import Provisioner
from fleet.records import RoundReport, RunRecord
from tests.deployment import (
    HOST,
    SMALL_RUN,
    TWO_CLASSES,
    Processes,
    begin_run,
    client_app,
    free_ports,
    lead_through,
    processes_in_a_folder,
    rounds_on_record,
    start_client,
    supernode_of,
    wait_until_at_work,
    write_digits,
)
from tests.stalling_relay import StallingRelay, stalling_relay

LOST = "pi-02"
IMAGES = {"pi-01": 8, LOST: 80, "server": 8}  # of each class: it is at work for a while
ROUND_SECONDS = 45
SLACK_SECONDS = 30  # for evaluation and checkpoint, on a machine that is busy
RUN_SECONDS = 600
SETTINGS = SMALL_RUN | {
    "local-epochs": 3,
    "rounds": 40,  # more than there will be: the run is stopped
    "min-clients": 2,
    "round-timeout": ROUND_SECONDS,
    "cache": "off",
}
# What happens to the device, one after the other.
EVENTS = ("ClientApp ended", "SuperNode killed", "network gone")
each_event = pytest.mark.parametrize("event", EVENTS)

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Event:
    """The round in which the device was lost, and the first one after it in which it was back."""

    lost: RoundReport
    back: RoundReport


@dataclass(frozen=True)
class Life:
    """What a run left.

    Attributes:
        events: by their names.
        shown: by fleet run.
        server_log: of the ServerApp, beside the record.
    """

    events: dict[str, Event]
    shown: str
    server_log: str


@pytest.fixture(scope="module")
def life() -> Iterator[Life]:
    (port,) = free_ports(1)
    with processes_in_a_folder() as processes, stalling_relay((HOST, port)) as relay:
        try:
            yield live(processes, port, relay)
        except AssertionError:
            print(processes.all_logs())
            raise


@each_event
def test_the_round_commits_by_its_deadline_with_the_others_update(life, event):
    report = life.events[event].lost
    assert [client.name for client in report.clients] == ["pi-01"] and report.stepped
    assert report.seconds < ROUND_SECONDS + SLACK_SECONDS


@each_event
def test_the_device_is_named_on_record_and_to_who_follows(life, event):
    report = life.events[event].lost
    assert report.refused.keys() == {LOST}
    reason = report.refused[LOST]
    assert f"round {report.server_round}: {LOST}: {reason}" in life.shown


def test_a_client_app_that_dies_is_known_at_once_and_the_device_says_how(life):
    report = life.events["ClientApp ended"].lost
    assert report.seconds < ROUND_SECONDS - 5  # Flower takes 40 to 60 s, or for ever
    how = "ClientApp task failed due to unknown reason"  # Flower's
    assert f"the process that worked on it died ({how}); on the device " in report.refused[LOST]
    assert f"{LOST}/logs/supernode.log says more" in report.refused[LOST]
    assert life.events["ClientApp ended"].back.server_round == report.server_round + 1


@each_event
def test_the_device_is_back(life, event):
    report = life.events[event].back
    assert {client.name for client in report.clients} == {"pi-01", LOST}
    assert report.refused == {}


def test_the_log_beside_the_record_names_each_round(life):
    for event in life.events.values():
        assert f"round {event.lost.server_round}/40: accuracy" in life.server_log
        assert f"round {event.back.server_round}/40: accuracy" in life.server_log


def live(processes: Processes, port: int, relay: StallingRelay) -> Life:
    """One run, in which a device is lost in some ways, each time once it is back from the last."""
    folder = processes.folder
    provisioner = Provisioner(folder / "fleet")
    provisioner.begin([Address("localhost", port)], ["pi-01", LOST])
    lead_through(provisioner, LOST, relay.port)
    write_digits(folder, IMAGES, TWO_CLASSES)
    server = provisioner.server
    processes.fleet("server", "server", "--dir", server.path, "--host", HOST)
    for name in ("pi-01", LOST):
        start_client(processes, provisioner, name)
    record = begin_run(processes, server, "first", SETTINGS)

    lose: dict[str, Callable[[], None]] = {
        "ClientApp ended": lambda: client_app(processes, LOST).terminate(),
        "SuperNode killed": lambda: supernode_of(processes, LOST).kill(),
        "network gone": relay.cut,
    }
    events = {}
    done = wait_for_both(processes, record, after=0)
    for event in EVENTS:
        lost = done.server_round + 1
        wait_until_at_work(processes, LOST, lost, record)
        lose[event]()
        processes.wait(f"round {lost}", lambda n=lost: rounds_on_record(record) > n, RUN_SECONDS)
        if event == "network gone":  # it was for the rest of the round, most of a minute
            relay.go_on()
        done = wait_for_both(processes, record, after=lost)
        events[event] = Event(round_of(record, lost), done)
    processes.fork_fleet("stop", "run", "--dir", server.path, "--stop", "first")
    processes.wait("its end", lambda: processes.exit_code("run") is not None, RUN_SECONDS)
    return Life(events, processes.log("run"), (record.path / "server.log").read_text())


def round_of(record: RunRecord, number: int) -> RoundReport:
    return next(report for report in record.rounds() if report.server_round == number)


def wait_for_both(processes: Processes, record: RunRecord, after: int) -> RoundReport:
    """The first round after one in which both devices trained."""

    def rounds() -> list[RoundReport]:
        there = record.rounds() if record.rounds_path.exists() else ()
        return [r for r in there if r.server_round > after and len(r.clients) == 2]

    processes.wait(f"both devices after round {after}", rounds, RUN_SECONDS)
    return rounds()[0]
