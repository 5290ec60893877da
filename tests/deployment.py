"""Processes of a deployment on loopback, each with a log."""

import contextlib
import os
import random
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from sklearn.datasets import load_digits

import fleet.cli
from fleet.deploy.addresses import Address
from fleet.deploy.bundle import bundle_files
from fleet.deploy.provisioning import Provisioner, ServerFolder
from fleet.records import RunRecord
from tests.forked import Forked

HOST = "127.0.0.1"

# A small task: digits of two classes, and images of each for two devices and the server.
TWO_CLASSES = {"eight": 8, "one": 1}
FEW_IMAGES = {"pi-01": 16, "pi-02": 16, "server": 8}
SMALL_RUN = {
    "image-size": 32,
    "weights": "none",
    "blocks": 2,
    "local-epochs": 1,
    "batch-size": 8,
}


def free_ports(count: int) -> list[int]:
    """Ports on which nothing listens.

    They lie below those that Linux gives to outgoing connections, one of which
    could otherwise take a port between this answer and its use.
    """
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(10_000, 20_000), 1_000):
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            break
    return ports


def handshake(port: int, authority: Path) -> str | None:
    """TLS version of the server on a port, verified against an authority; None if none is there."""
    context = ssl.create_default_context(cafile=authority)
    try:
        with (
            socket.create_connection((HOST, port), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname=HOST) as secure,
        ):
            return secure.version()
    except (ConnectionError, TimeoutError):
        return None


@contextlib.contextmanager
def processes_in_a_folder() -> Iterator["Processes"]:
    """Processes that end with the block, and what they wrote with them."""
    # Not pytest's own folder: its name is long, and it stays.
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder:
        processes = Processes(Path(folder))
        try:
            yield processes
        finally:
            processes.stop()


class Processes:
    """Flower's commands, each with a log, on machines that are folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: dict[str, subprocess.Popen[bytes] | Forked] = {}

    def start(self, name: str, machine: str, command: str, *arguments: object) -> None:
        """Start a command of this Python's environment.

        Args:
            name: what to call the process.
            machine: the folder that is its working directory and its Flower home.
        """
        home = self.folder / machine
        home.mkdir(exist_ok=True)
        with self._log_path(name).open("wb") as log:
            self._started[name] = subprocess.Popen(
                [_executable(command), *map(str, arguments)],
                cwd=home,
                env=_environment(home),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def fleet(self, name: str, command: str, *arguments: object) -> None:
        """Start a command of the project's, as one user on one machine."""
        self.start(name, "user", "fleet", command, *arguments)

    def fork_fleet(self, name: str, command: str, *arguments: object) -> None:
        """As `fleet`, in a fork of this process: for a command that would import PyTorch first."""
        home = self.folder / "user"
        home.mkdir(exist_ok=True)
        words = [command, *map(str, arguments)]
        with self._log_path(name).open("wb") as log:
            self._started[name] = Forked(lambda: _be_fleet(home, words), errors=log)

    def process(self, name: str) -> psutil.Process:
        """A process that was started."""
        return psutil.Process(self._started[name].pid)

    def exit_code(self, name: str) -> int | None:
        """None while the process runs."""
        return self._started[name].poll()

    def log(self, name: str) -> str:
        """What the process has printed so far."""
        return self._log_path(name).read_text(errors="replace")

    def logs(self, characters: int = 8000) -> str:
        """The end of every log."""
        return "\n".join(
            f"----- {name}, exit code {self.exit_code(name)}\n{self.log(name)[-characters:]}"
            for name in self._started
        )

    def supernode_log(self, state: str) -> str:
        """What Flower's SuperNode of a client has printed, whose state is in a folder."""
        path = self.folder / state / "logs" / "supernode.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def all_logs(self) -> str:
        """What the commands printed, and what Flower did."""
        logs = [self.logs()]
        for path in sorted(self.folder.rglob("logs/*.log")):
            logs.append(f"----- {path}\n{path.read_text(errors='replace')[-4000:]}")
        return "\n".join(logs)

    def wait(self, what: str, condition: Callable[[], object], seconds: float) -> None:
        """Poll until a condition holds; after `seconds` fail with all logs."""
        deadline = time.monotonic() + seconds
        while not condition():
            for process in self._started.values():
                process.poll()  # what a process has started ends only when it is no zombie
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {seconds:.0f} s: {what}\n{self.logs()}")
            time.sleep(0.1)

    def finish(self, name: str, seconds: float) -> None:
        """Wait until a process has ended well."""
        self.wait(f"end of {name}", lambda: self.exit_code(name) is not None, seconds)
        if code := self.exit_code(name):
            raise AssertionError(f"{name} failed with exit code {code}\n{self.logs()}")

    def kill(self, name: str) -> None:
        """End a process and all that it started, as a power cut does: without a goodbye."""
        parent = self.process(name)
        family = [parent, *parent.children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=20)

    def stop(self) -> None:
        """End every process and what it started."""
        family = []
        for process in self._started.values():
            if process.poll() is None:
                parent = psutil.Process(process.pid)
                family += [parent, *parent.children(recursive=True)]
                process.terminate()
        _, alive = psutil.wait_procs(family, timeout=20)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=20)

    def _log_path(self, name: str) -> Path:
        return self.folder / f"{name}.log"


def write_digits(folder: Path, counts: Mapping[str, int], classes: Mapping[str, int]) -> None:
    """Each machine's own part of the digits, as `pi-01-images/eight/0.png` and so on.

    Args:
        counts: machine → images of each class.
        classes: name → digit.
    """
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    for class_name, digit in classes.items():
        images = iter(pixels[digits.target == digit])
        for machine, count in counts.items():
            class_folder = folder / f"{machine}-images" / class_name
            class_folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(next(images)).save(class_folder / f"{i}.png")


def begin_run(
    processes: Processes, server: ServerFolder, name: str, settings: Mapping[str, object]
) -> RunRecord:
    """Follow a new run, in a process called "run", once the one called "server" serves.

    The server evaluates on the folder that `write_digits` made for it.
    """
    processes.wait("server", lambda: "superlink is started" in processes.log("server"), 120)
    options = [f"--{key}={value}" for key, value in settings.items()]
    processes.fork_fleet(
        *("run", "run", "--dir", server.path, "--name", name, *options),
        *("--data", processes.folder / "server-images"),
    )
    return RunRecord(server.runs_path / name)


def start_client(processes: Processes, provisioner: Provisioner, name: str) -> None:
    """A device's client, on the images that `write_digits` made for it, without a budget."""
    folder = processes.folder
    processes.fleet(
        *(name, "client", "--bundle", provisioner.out / name, "--budget-mib", "off"),
        *("--data", folder / f"{name}-images", "--state", folder / name),
    )


def wait_for_keys(processes: Processes, server: str, devices: Iterable[str]) -> None:
    """Until the server knows the devices' keys: one that asks before that starts all over."""
    processes.wait(
        f"keys of {', '.join(devices)} at {server}",
        lambda: all(f"{name} may take part" in processes.log(server) for name in devices),
        seconds=600,
    )


def lead_through(provisioner: Provisioner, device: str, port: int) -> None:
    """Let a device's bundle, as a folder, name another port of this machine as the server's."""
    bundle = provisioner.out / device
    kept = {name: (bundle / name).read_bytes() for name in ("ca.crt", "device.key")}
    moved = bundle_files(device, Address("localhost", port), *kept.values())
    (bundle / "bundle.toml").write_bytes(moved["bundle.toml"])


def superlink_of(processes: Processes) -> psutil.Process:
    """That of the server in the process called "server"."""
    (found,) = (
        child
        for child in processes.process("server").children()
        if "fleet.deploy.superlink" in child.cmdline()
    )
    return found


def supernode_of(processes: Processes, device: str) -> psutil.Process:
    """That of the client in the process that is called as its device."""
    return processes.process(device).children()[0]


def client_app(processes: Processes, device: str) -> psutil.Process:
    """Forked from the template, which is forked from the SuperExec; IndexError: it is not there."""
    executor = supernode_of(processes, device).children()[0]
    template = executor.children()[0]
    return template.children()[0]


def wait_until_at_work(
    processes: Processes, device: str, number: int, record: RunRecord, seconds: float = 600
) -> None:
    """Until the device has worked on a round's message for half a second of its CPU."""
    processes.wait(f"round {number - 1}", lambda: rounds_on_record(record) >= number, seconds)
    assert rounds_on_record(record) == number, "the round has ended before the device was lost"

    def works() -> bool:
        try:
            return client_app(processes, device).cpu_times().user > 0.5
        except (psutil.Error, IndexError):
            return False

    processes.wait(f"{device} works in round {number}", works, seconds)


def rounds_on_record(record: RunRecord) -> int:
    """Round 0 included."""
    return len(record.rounds_path.read_text().splitlines()) if record.rounds_path.exists() else 0


def _be_fleet(home: Path, words: list[str]) -> None:
    """The command in this process, which is a fork; it never returns."""
    os.dup2(2, 1)
    os.chdir(home)
    os.environ.clear()
    os.environ.update(_environment(home))
    torch.set_num_threads(1)  # this process may have had more, which a fork has not
    fleet.cli.main(words, prog_name="fleet")


def _executable(command: str) -> str:
    path = shutil.which(command, path=_search_path())
    assert path is not None, f"{command} is not installed beside {sys.executable}"
    return path


def _search_path() -> str:
    """Flower starts its helpers by name: they have to be this environment's."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def _environment(home: Path) -> dict[str, str]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("FLWR_") and not name.lower().endswith("_proxy")
    }
    return inherited | {
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_HOME": str(home),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        "FLWR_TELEMETRY_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "PATH": _search_path(),
        "PYTHONUNBUFFERED": "1",
    }
