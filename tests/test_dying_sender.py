"""A device that is lost in the middle of sending its update: the round ends at its deadline.

By then the server has been told of the reply, and Flower waits for the rest of it,
whatever the deadline, for up to three minutes.
"""

import re
from collections.abc import Iterator

import pytest

from fleet.deploy.addresses import Address
from fleet.deploy.provisioning import Provisioner
from fleet.records import RoundReport
from tests.deployment import (
    FEW_IMAGES,
    HOST,
    SMALL_RUN,
    TWO_CLASSES,
    Processes,
    begin_run,
    free_ports,
    lead_through,
    processes_in_a_folder,
    rounds_on_record,
    start_client,
    write_digits,
)
from tests.stalling_relay import StallingRelay, stalling_relay

LOST = "pi-02"
HELD_UP, KILLED = 2, 4  # rounds in which its update is; in the first its heartbeats pass
UPLOAD_BYTES = 100_000  # an update has more, and nothing else that a device sends
ROUND_SECONDS = 90  # half of what Flower gives an upload that does not get on
SLACK_SECONDS = 45  # for evaluation and checkpoint, on a machine that is busy
RUN_SECONDS = 900
SETTINGS = SMALL_RUN | {
    "rounds": 6,
    "min-clients": 2,
    "round-timeout": ROUND_SECONDS,
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rounds() -> Iterator[dict[int, RoundReport]]:
    (port,) = free_ports(1)
    with processes_in_a_folder() as processes, stalling_relay((HOST, port)) as relay:
        try:
            yield {report.server_round: report for report in live(processes, port, relay)}
        except AssertionError:
            print(processes.all_logs())
            raise


@pytest.mark.parametrize("lost", [HELD_UP, KILLED])
def test_the_round_ends_at_its_deadline_and_names_the_device(rounds, lost):
    report = rounds[lost]
    assert report.seconds < ROUND_SECONDS + SLACK_SECONDS
    assert [client.name for client in report.clients] == ["pi-01"] and report.stepped
    assert report.refused.keys() == {LOST}
    reason = report.refused[LOST]
    if lost == HELD_UP:
        assert reason.startswith(f"no reply within {ROUND_SECONDS} s; logs/supernode.log in the ")
        assert report.seconds >= ROUND_SECONDS
    else:  # Flower may notice before that
        assert re.match("no reply within|lost on its way|the device is offline", reason)


def test_the_device_takes_part_before_and_after(rounds):
    assert [*rounds] == [*range(SETTINGS["rounds"] + 1)]
    for number in (1, 3, 6):  # as round 5 begins, the server may not have noticed yet
        assert {client.name for client in rounds[number].clients} == {"pi-01", LOST}
        assert rounds[number].refused == {}


def live(processes: Processes, port: int, relay: StallingRelay) -> list[RoundReport]:
    """A run in which a device is cut off, then killed, while it sends."""
    folder = processes.folder
    provisioner = Provisioner(folder / "fleet")
    provisioner.begin([Address("localhost", port)], ["pi-01", LOST])
    lead_through(provisioner, LOST, relay.port)
    write_digits(folder, FEW_IMAGES, TWO_CLASSES)
    processes.fleet("server", "server", "--dir", provisioner.server.path, "--host", HOST)
    for name in ("pi-01", LOST):
        start_client(processes, provisioner, name)
    record = begin_run(processes, provisioner.server, "first", SETTINGS)

    def is_done(server_round: int) -> None:
        count = server_round + 1
        what = f"round {server_round}"
        processes.wait(what, lambda: rounds_on_record(record) >= count, RUN_SECONDS)

    for lost in (HELD_UP, KILLED):
        is_done(lost - 1)
        relay.stall_in_uploads(UPLOAD_BYTES, everything=lost == KILLED)
        processes.wait("the upload has begun", relay.stalled.is_set, RUN_SECONDS)
        if lost == KILLED:
            processes.kill(LOST)
        is_done(lost)
        relay.go_on()
        if lost == KILLED:
            start_client(processes, provisioner, LOST)
    processes.finish("run", RUN_SECONDS)
    return list(record.rounds())
