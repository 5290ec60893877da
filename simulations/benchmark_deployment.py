"""What a real fleet costs on one machine: time of a round beside training, memory of a client.

python -m simulations.benchmark_deployment --out deployment.md

`fleet provision`, `fleet server`, three `fleet client`s and `fleet run`, over TLS with
keys, each in a process of its own, as on three devices and a server. First rounds of
next to no training: what they take is the fleet's own, and whose processes it takes CPU of.
Then one device is looked at while it trains by MobileTL and by the full model.
"""

import contextlib
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import click
import numpy as np
import psutil
from PIL import Image

from fleet.config import Value
from fleet.measure.comparison import commit
from fleet.records import RoundReport, RunRecord
from fleet.report import Grid, as_markdown
from simulations.footprint import Peak, footprint, resident_alone, watching

MIB = 2**20
_COLUMNS = ("most, MiB", "beyond the idle client, MiB", "÷ least")
DEVICES = ("pi-01", "pi-02", "pi-03")
START_SECONDS, RUN_SECONDS = 300.0, 1800.0
_LOOK_SECONDS = 0.1

SHORT: Mapping[str, Value] = {
    "image-size": 32,
    "blocks": "1",
    "batch-size": 8,
    "local-epochs": 1,
    "rounds": 8,
}
# As a device would train for real.
LONG: Mapping[str, Value] = {"image-size": 128, "batch-size": 16, "local-epochs": 1, "rounds": 2}
# What stands in the command line of a part's processes; the first that does decides.
PARTS: Mapping[str, str] = {
    "deploy.superlink": "SuperLink",
    "serverapp": "ServerApp",
    "deploy.supernode": "SuperNodes",
    "clients.executor": "ClientApps, and what starts them",
    "clientapp": "ClientApps, and what starts them",
    "": "supervisors and SuperExecs",
}
METHODS: Mapping[str, Mapping[str, Value]] = {
    "mobiletl, k = 3": {"method": "mobiletl", "blocks": "3"},
    "full": {"method": "full"},
}


@dataclass(frozen=True)
class Fleet:
    """A server and its clients, running.

    Attributes:
        folder: of all they write.
        server: `fleet server`.
        clients: device → its `fleet client`.
    """

    folder: Path
    server: psutil.Process
    clients: Mapping[str, psutil.Process]

    def record(self, name: str) -> RunRecord:
        """Of a run."""
        return RunRecord(self.folder / "server" / "runs" / name)

    def run(self, name: str, settings: Mapping[str, Value]) -> list[RoundReport]:
        """All rounds of a run after round 0."""
        arguments = [f"--{key}={value}" for key, value in settings.items()]
        with (self.folder / f"run-{name}.log").open("wb") as log:
            subprocess.run(
                _command("run", "--dir", self.folder / "server", "--name", name, *arguments),
                stdout=log,
                stderr=log,
                timeout=RUN_SECONDS,
                check=True,
            )
        return list(self.record(name).rounds())[1:]


@contextlib.contextmanager
def running(folder: Path, cold: bool) -> Iterator[Fleet]:
    """A fleet on loopback, until the block ends."""
    port = _free_port()
    names = [*DEVICES]
    subprocess.run(
        _command(
            *("provision", "--host", f"127.0.0.1:{port}", "--devices", *names, "--out", folder)
        ),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    started = [_start(folder, "server", "--dir", folder / "server", "--host", "127.0.0.1")]
    try:
        for name in names:
            _write_images(folder / f"{name}-images", seed=int(name[-2:]))
            started.append(
                _start(
                    *(folder, "client", "--bundle", folder / f"{name}.tar.gz"),
                    *("--data", folder / f"{name}-images", "--state", folder / f"{name}-state"),
                    *("--budget-mib", "off", *(["--cold"] if cold else [])),
                    log=name,
                )
            )
        _wait(
            "all devices registered",
            lambda: all(f"{n} may take part" in _log(folder, "server") for n in names),
        )
        server, *clients = (psutil.Process(process.pid) for process in started)
        yield Fleet(folder, server, dict(zip(names, clients, strict=True)))
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(60)


@dataclass(frozen=True)
class RoundCost:
    """What a round takes.

    Attributes:
        seconds, most: beyond its slowest client's training: median, and of the longest.
        training: seconds of the slowest client's training, median.
        cpu_seconds: part of the fleet → of all its processes, mean; training included.
    """

    seconds: float
    most: float
    training: float
    cpu_seconds: Mapping[str, float]


def time_rounds(fleet: Fleet) -> RoundCost:
    """What short rounds take, without the first, which loads the model."""
    with _watching_cpu(fleet, "short") as used_after:
        rounds = fleet.run("short", _all_take_part(SHORT))[1:]
    training = [max(client.seconds for client in report.clients) for report in rounds]
    beyond = [report.seconds - own for report, own in zip(rounds, training, strict=True)]
    # Round 0 is on record too; what a look has not seen belongs to the round that is under way.
    first, last = used_after[2], used_after[max(used_after)]
    count = max(used_after) - 2
    cpu = {part: (last[part] - first[part]) / count for part in last}
    return RoundCost(median(beyond), max(beyond), median(training), cpu)


@contextlib.contextmanager
def _watching_cpu(fleet: Fleet, run: str) -> Iterator[dict[int, dict[str, float]]]:
    """Rounds on record → part → CPU seconds that its processes had used up by then.

    A ClientApp lives for one message: what it uses after the last look at it is missed.
    """
    used: dict[int, tuple[str, float]] = {}  # process id → part, CPU seconds
    after: dict[int, dict[str, float]] = {}
    done = threading.Event()

    def look() -> None:
        while not done.wait(_LOOK_SECONDS):
            for root in (fleet.server, *fleet.clients.values()):
                for process in (root, *root.children(recursive=True)):
                    with contextlib.suppress(psutil.Error):
                        times, words = process.cpu_times(), " ".join(process.cmdline())
                        part = next(name for mark, name in PARTS.items() if mark in words)
                        used[process.pid] = part, times.user + times.system
            record = fleet.record(run)
            rounds = len(list(record.rounds())) if record.config_path.is_file() else 0
            if rounds not in after:
                parts = dict.fromkeys(PARTS.values(), 0.0)
                for part, seconds in used.values():
                    parts[part] += seconds
                after[rounds] = parts

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield after
    finally:
        done.set()
        thread.join()


def memory_of(fleet: Fleet, device: str) -> dict[str, tuple[Peak, Peak]]:
    """What a client's processes hold while idle, and at most while each method trains.

    Idle is a device that has taken part: its libraries are loaded, its model is not.
    What an earlier run left in its processes is none of the next one's.
    """
    pid = fleet.clients[device].pid
    found = {}
    for name, settings in METHODS.items():
        idle = held(pid)
        with watching(pid, _LOOK_SECONDS) as peak:
            fleet.run(name.partition(",")[0], _all_take_part(LONG | settings))
        found[name] = idle, peak
    return found


def held(pid: int) -> Peak:
    """What a process and its descendants hold now."""
    return Peak(pss=footprint(pid).pss, alone=resident_alone(pid))


def _mib(*values: int) -> tuple[str, ...]:
    return tuple(f"{value / MIB:.0f}" for value in values)


def _all_take_part(settings: Mapping[str, Value]) -> dict[str, Value]:
    more = {"min-clients": len(DEVICES), "evaluation": "server", "test-examples": 20}
    return {**settings, **more, "data": "digits", "cache": "off"}


def _write_images(folder: Path, seed: int, count: int = 4) -> None:
    """A few images of each of ten classes; what they show does not matter here."""
    rng = np.random.default_rng(seed)
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / str(label) / f"{i}.png")


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "fleet.cli", *map(str, arguments)]


def _start(folder: Path, command: str, *arguments: object, log: str = "") -> subprocess.Popen:
    with (folder / f"{log or command}.log").open("wb") as output:
        return subprocess.Popen(
            _command(command, *arguments),
            stdout=output,
            stderr=output,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def _log(folder: Path, name: str) -> str:
    return (folder / f"{name}.log").read_text(errors="replace")


def _wait(what: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {START_SECONDS:.0f} s: {what}")
        time.sleep(0.2)


def _free_port() -> int:
    """Below those that Linux gives to outgoing connections."""
    while True:
        port = random.SystemRandom().randrange(10_000, 20_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="Markdown; else it is printed.")
def main(out: Path | None) -> None:
    """Measure a fleet whose devices start warm, and its rounds with devices that start cold."""
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder, running(Path(folder), False) as f:
        warm = time_rounds(f)
        idle = held(f.clients[DEVICES[0]].pid)
        trained = memory_of(f, DEVICES[0])
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder, running(Path(folder), True) as f:
        cold = time_rounds(f)
        idle_cold = held(f.clients[DEVICES[0]].pid)
    beyond = {name: (p.pss - i.pss, p.alone - i.alone) for name, (i, p) in trained.items()}
    least = [min(column) for column in zip(*beyond.values(), strict=True)]
    both = {"warm": (warm, idle), "cold": (cold, idle_cold)}
    rounds = Grid(
        title="Seconds of a round beside training",
        columns=("clients", "median", "most", "training", "idle client, MiB", "alone, MiB"),
        rows=tuple(
            (
                name,
                *(f"{seconds:.1f}" for seconds in (cost.seconds, cost.most, cost.training)),
                *_mib(held_idle.pss, held_idle.alone),
            )
            for name, (cost, held_idle) in both.items()
        ),
    )
    cpu = Grid(
        title="CPU seconds of a round, training included",
        columns=("clients", *warm.cpu_seconds),
        rows=tuple(
            (name, *(f"{seconds:.1f}" for seconds in cost.cpu_seconds.values()))
            for name, (cost, _) in both.items()
        ),
    )
    memory = Grid(
        title="Memory of a client, warm",
        columns=("training", *_COLUMNS, *(f"{column}, alone" for column in _COLUMNS)),
        rows=tuple(
            (
                name,
                *_mib(peak.pss, beyond[name][0]),
                f"{beyond[name][0] / least[0]:.1f}",
                *_mib(peak.alone, beyond[name][1]),
                f"{beyond[name][1] / least[1]:.1f}",
            )
            for name, (_, peak) in trained.items()
        ),
    )
    text = "\n\n".join(
        [
            "# A fleet on real processes",
            __doc__.split("\n\n", 1)[1].strip(),
            as_markdown(rounds).strip(),
            as_markdown(cpu).strip(),
            as_markdown(memory).strip(),
            f"Three clients on one machine, TLS, device keys; PSS of all processes of a client. "
            f"Alone: pages of files in full, as where no server and no other clients share them. "
            f"Commit {commit()}, {platform.machine()}, {os.cpu_count()} cores, load of the last "
            f"minute {os.getloadavg()[0]:.1f}.",
        ]
    )
    if out is None:
        click.echo(text)
    else:
        out.write_text(text + "\n")


if __name__ == "__main__":
    main()
