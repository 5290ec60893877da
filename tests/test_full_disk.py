"""A fleet whose disks get full during a run, and are freed again: the server's, then a device's."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from fleet.checkpoint import Checkpoints
from fleet.deploy.addresses import Address
from fleet.deploy.control import ONLINE, Control, ControlError
from fleet.deploy.provisioning import Provisioner
from fleet.deploy.wishes import Wishes
from fleet.records import RoundReport
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
    write_digits,
)
from tests.disks import Disk, disks_can_be_made, small_disk

FULL = "pi-01"  # its state and its feature cache lie on a small disk
DISK_MIB = 256
FULL_SECONDS = 45  # long enough for heartbeats to be answered with errors
ONLINE_SECONDS = 120  # after the disk is free
RUN_SECONDS = 900
SETTINGS = SMALL_RUN | {
    "rounds": 7,
    "round-timeout": 180,
    "codec-up": "int4+feedback",  # a device remembers its residuals
}

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Life:
    """What was seen while the disks were full, and what the run came to.

    Attributes:
        before: rounds on record as the server's disk got full, round 0 among them.
        kept: the round of the checkpoint that could be loaded while it was.
        online_after: seconds from when it was free until run and devices were back.
        server, device: what server and device had printed by the end.
    """

    before: int
    kept: int
    online_after: float
    rounds: list[RoundReport]
    server: str
    device: str


@pytest.fixture(scope="module")
def life(tmp_path_factory) -> Iterator[Life]:
    if not disks_can_be_made(tmp_path_factory.mktemp("disks") / "try"):
        pytest.skip("needs root, and mounts")
    with contextlib.ExitStack() as stack:
        # The disks outlive the processes that write to them.
        folder = tmp_path_factory.mktemp("full")
        server = stack.enter_context(small_disk(folder / "server", DISK_MIB))
        device = stack.enter_context(small_disk(folder / "device", DISK_MIB))
        processes = stack.enter_context(processes_in_a_folder())
        try:
            yield live(processes, server, device)
        except AssertionError:
            print(processes.all_logs())
            raise


def test_the_server_says_which_disk_is_full_and_what_to_do(life):
    assert "/state is full, 0 MiB of 256 MiB are left and 32 are needed" in life.server
    assert "free space there" in life.server


def test_the_old_checkpoint_is_intact_while_the_disk_is_full(life):
    assert life.kept == life.before - 1


def test_run_and_devices_are_back_soon_after_the_disk_is_free(life):
    print(f"back {life.online_after:.0f} s after the server's disk was free")
    assert life.online_after < ONLINE_SECONDS


def test_no_round_is_lost_or_there_twice(life):
    assert [report.server_round for report in life.rounds] == [*range(SETTINGS["rounds"] + 1)]


def test_the_device_whose_disk_is_full_is_refused_with_the_reason_and_only_then(life):
    refused = [report for report in life.rounds if report.refused]
    assert refused, "its disk was full for a whole round"
    for report in refused:
        assert report.refused.keys() == {FULL}
        assert "No space left on device; free space or give write" in report.refused[FULL]
        assert report.stepped and [client.name for client in report.clients] == ["pi-02"]
    assert {client.name for client in life.rounds[-1].clients} == {"pi-01", "pi-02"}


def test_the_device_says_itself_that_its_disk_is_full(life):
    assert "is full, 0 MiB of 256 MiB are left and 32 are needed; free space" in life.device
    assert "has room again" in life.device


def live(processes: Processes, server: Disk, device: Disk) -> Life:
    """Start all; fill the server's disk in one round, the device's in another."""
    folder, (port,) = processes.folder, free_ports(1)
    provisioner = Provisioner(server.folder / "fleet")
    provisioner.begin([Address("localhost", port)], ["pi-01", "pi-02"])
    write_digits(folder, FEW_IMAGES, TWO_CLASSES)
    processes.fleet("server", "server", "--dir", provisioner.server.path, "--host", HOST)
    for name in ("pi-01", "pi-02"):
        home = device.folder if name == FULL else folder
        processes.start(
            *(name, "user", "env", f"FLEET_CACHE={home / 'cache'}", "fleet", "client"),
            *("--bundle", provisioner.bundle_path(name), "--data", folder / f"{name}-images"),
            *("--state", home / f"{name}-state", "--budget-mib", "off"),
        )
    record = begin_run(processes, provisioner.server, "full", SETTINGS)
    wishes = Wishes(provisioner.server.runs_path)

    def rounds(count: int) -> None:
        processes.wait(f"{count} rounds", lambda: rounds_on_record(record) >= count, RUN_SECONDS)

    rounds(2)
    fill_for(server, FULL_SECONDS)
    before = rounds_on_record(record)
    kept, _ = Checkpoints(record.checkpoints_path).load()
    server.free()
    freed = time.monotonic()
    authority = provisioner.server.authority_path
    with contextlib.closing(Control(Address(HOST, port), authority)) as control:
        processes.wait("fleet is online", lambda: all_go_on(control, wishes), RUN_SECONDS)
    online_after = time.monotonic() - freed
    rounds(before + 1)
    end = rounds_on_record(record) + 2
    processes.wait(
        "two rounds with the device's disk full",
        lambda: device.fill() or rounds_on_record(record) >= end,
        RUN_SECONDS,
    )
    processes.wait("the device says so", lambda: "is full" in processes.log(FULL), 60)
    device.free()
    processes.wait("there is room", lambda: "has room again" in processes.log(FULL), 60)
    processes.finish("run", RUN_SECONDS)
    return Life(
        before=before,
        kept=kept,
        online_after=online_after,
        rounds=list(record.rounds()),
        server=processes.log("server"),
        device=processes.log(FULL),
    )


def fill_for(disk: Disk, seconds: float) -> None:
    """Keep a disk full, whatever is removed from it meanwhile."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        disk.fill()
        time.sleep(0.5)


def all_go_on(control: Control, wishes: Wishes) -> bool:
    """Whether both devices are online, and Flower runs what is wished for."""
    try:
        online = sum(node.status == ONLINE for node in control.nodes())
        standing = wishes.standing("full")
        run = control.run(standing.flower_run)
    except ControlError:
        return False
    return online == 2 and standing.status == "running" and bool(run) and run.status == "running"
