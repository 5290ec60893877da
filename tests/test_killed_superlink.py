"""A SuperLink that is killed again and again, at any moment of a run: no update is lost.

What it had answered as it was killed, and nobody heard, is asked for again. Once it is away for
longer than Flower waits for a sign of the run's process.
"""

import contextlib
import random
import time
from collections.abc import Iterator

import pytest

from fleet.deploy.addresses import Address
from fleet.deploy.provisioning import Provisioner
from fleet.deploy.server import answers
from fleet.records import RunRecord
from tests.deployment import (
    FEW_IMAGES,
    HOST,
    SMALL_RUN,
    TWO_CLASSES,
    Processes,
    begin_run,
    free_ports,
    processes_in_a_folder,
    rounds_on_record,
    start_client,
    superlink_of,
    wait_for_keys,
    write_digits,
)

DEVICES = ("pi-01", "pi-02")
SETTINGS = SMALL_RUN | {"rounds": 10, "min-clients": 2, "round-timeout": 240}
RUN_SECONDS = 900
AWAY_SECONDS = 75.0
MOST_SECONDS = 10.0  # from a round's end to the next kill: somewhat longer than a round

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run() -> Iterator[tuple[RunRecord, str, int]]:
    """Its record, what the server said, and how often the SuperLink was killed."""
    with processes_in_a_folder() as processes:
        try:
            yield live(processes)
        except AssertionError:
            print(processes.all_logs())
            raise


def test_every_round_has_the_updates_of_all(run):
    record, _, kills = run
    start, *rounds = record.rounds()
    assert kills >= 5 and start.server_round == 0 and len(rounds) == SETTINGS["rounds"]
    for report in rounds:
        assert report.refused == {}
        assert sorted(client.name for client in report.clients) == [*DEVICES]


def test_the_run_is_never_lost(run):
    _, log, _ = run
    assert log.count("run first is submitted") == 1 and "was lost" not in log, log


def live(processes: Processes) -> tuple[RunRecord, str, int]:
    folder, (port,) = processes.folder, free_ports(1)
    provisioner = Provisioner(folder / "fleet")
    provisioner.begin([Address("localhost", port)], [*DEVICES])
    write_digits(folder, FEW_IMAGES, TWO_CLASSES)
    processes.fleet("server", "server", "--dir", provisioner.server.path, "--host", HOST)
    wait_for_keys(processes, "server", DEVICES)
    for name in DEVICES:
        start_client(processes, provisioner, name)
    record = begin_run(processes, provisioner.server, "first", SETTINGS)
    processes.wait("round 0", lambda: rounds_on_record(record) > 0, RUN_SECONDS)
    keep_away(processes)
    await_a_round(processes, provisioner, port, record)
    moments, kills = random.Random(0), 0
    while not has_ended(processes):
        time.sleep(moments.uniform(0.0, MOST_SECONDS))
        if has_ended(processes):
            break
        superlink_of(processes).kill()
        kills += 1
        await_a_round(processes, provisioner, port, record)
    processes.finish("run", RUN_SECONDS)
    return record, processes.log("server"), kills


def keep_away(processes: Processes) -> None:
    """Kill each SuperLink that is started, for a while."""
    deadline = time.monotonic() + AWAY_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(ValueError):  # there is none
            superlink_of(processes).kill()
        time.sleep(1.0)


def has_ended(processes: Processes) -> bool:
    return processes.exit_code("run") is not None


def await_a_round(
    processes: Processes, provisioner: Provisioner, port: int, record: RunRecord
) -> None:
    """Until a SuperLink answers again and a round, or the run, has ended since."""
    address, authority = Address(HOST, port), provisioner.server.authority_path
    processes.wait("a SuperLink answers", lambda: answers(address, authority), RUN_SECONDS)
    before = rounds_on_record(record)
    processes.wait(
        "a round", lambda: rounds_on_record(record) > before or has_ended(processes), RUN_SECONDS
    )
