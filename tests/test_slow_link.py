"""A device behind a slow, lossy link, on a machine of its own: two network namespaces.

`.venv/bin/python -m pytest tests/test_slow_link.py -m slow` takes the slowest links.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from fleet.records import RunRecord
from tests.deployment import Processes, processes_in_a_folder, wait_for_keys, write_digits

CLASSES = {"eight": 8, "four": 4, "one": 1}
DEVICE = "pi-01"
SERVER, LINK = 8000, 8100  # ports, in a network that nobody else is in
SETTINGS = {
    "image-size": 32,
    "blocks": 1,
    "local-epochs": 1,
    "batch-size": 8,
    "min-clients": 1,
    "round-timeout": 900,
    "codec-up": "topk:0.02+int4",
    "codec-down": "topk:0.02+int4",
}
RUN_SECONDS = 2700


def namespaces_are_there() -> bool:
    """Whether this user may make network namespaces."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    name = f"fleet-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if made.returncode == 0:
        subprocess.run(["ip", "netns", "del", name], check=False)
    return made.returncode == 0


@contextlib.contextmanager
def two_machines() -> Iterator[tuple[str, str, str]]:
    """Names of two namespaces, joined by a wire, and the first one's address."""
    number = os.getpid() % 60_000
    server, device = f"fleet-server-{number}", f"fleet-device-{number}"
    wire = (f"fs{number}", f"fd{number}")
    near, far = (f"10.199.{number % 250}.{host}" for host in (1, 2))

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    try:
        for name in (server, device):
            ip("netns", "add", name)
        ip("link", "add", wire[0], "type", "veth", "peer", "name", wire[1])
        for name, end, address in zip((server, device), wire, (near, far), strict=True):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            for each in ("lo", end):
                ip("-n", name, "link", "set", each, "up")
        yield server, device, near
    finally:
        for name in (server, device):  # with them goes the wire
            subprocess.run(["ip", "netns", "del", name], check=False)


@pytest.mark.skipif(not namespaces_are_there(), reason="needs root, and ip of iproute2")
@pytest.mark.parametrize(
    ("kbits", "delay_ms", "number_of_rounds"),
    [
        (256, 150, 1),  # three rounds over such a link are in test_fleet_life
        pytest.param(128, 1000, 3, marks=pytest.mark.slow),
        pytest.param(64, 1000, 3, marks=pytest.mark.slow),
    ],
)
def test_no_update_is_lost_on_a_link_that_is_slow_and_breaks(kbits, delay_ms, number_of_rounds):
    settings = SETTINGS | {"rounds": number_of_rounds}
    with two_machines() as (server, device, address), processes_in_a_folder() as processes:
        try:
            record, seen = train_over(processes, settings, server, device, address, kbits, delay_ms)
        except AssertionError:
            print(processes.all_logs())
            raise
        rounds = list(record.rounds())[1:]
        print(seen, [report.seconds for report in rounds])
        assert len(rounds) == number_of_rounds
        for report in rounds:
            assert [client.name for client in report.clients] == [DEVICE], report.refused
            assert report.stepped and report.refused == {}
        assert seen["cut"] > 0


def train_over(
    processes: Processes,
    settings: Mapping[str, object],
    server: str,
    device: str,
    address: str,
    kbits: int,
    delay_ms: int,
) -> tuple[RunRecord, dict[str, int]]:
    """A run with one device on another machine, and what the link between them saw."""
    folder = processes.folder
    machines = folder / "fleet"
    write_digits(folder, {DEVICE: 8, "server": 8}, CLASSES)

    def on(machine: str, name: str, *arguments: object) -> None:
        python = (sys.executable, "-m", "fleet.cli")
        processes.start(name, "user", "ip", *("netns", "exec", machine), *python, *arguments)

    provision = ("--host", f"{address}:{LINK}", "--devices", DEVICE, "--out", machines)
    processes.fleet("provision", "provision", *provision)
    processes.finish("provision", 600)
    link = [Path(__file__).with_name("slow_link.py"), "--listen", f"{address}:{LINK}"]
    link += ["--to", f"{address}:{SERVER}", "--kbits", kbits, "--delay-ms", delay_ms]
    link += ["--resets", 0.05, "--seed", 2]  # which cuts within the first few dozen exchanges
    processes.start("link", "user", "ip", "netns", "exec", server, sys.executable, *link)
    on(
        *(server, "server", "server", "--dir", machines / "server"),
        *("--host", address, "--port", SERVER),
    )
    options = [f"--{key}={value}" for key, value in settings.items()]
    wait_for_keys(processes, "server", [DEVICE])
    on(
        *(device, DEVICE, "client", "--bundle", machines / f"{DEVICE}.tar.gz"),
        *("--data", folder / f"{DEVICE}-images", "--state", folder / DEVICE, "--budget-mib", "off"),
    )
    processes.fork_fleet(  # which talks with the server through its folder
        *("run", "run", "--dir", machines / "server", "--name", "far", *options),
        *("--data", folder / "server-images"),
    )
    processes.finish("run", RUN_SECONDS)
    processes.process("link").terminate()
    processes.finish("link", 30)
    seen = json.loads(processes.log("link").splitlines()[-1])
    return RunRecord(machines / "server" / "runs" / "far"), seen
