"""Flower's own simulation runtime (Ray), started for one run and ended with it."""

import contextlib
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import httpx
import psutil
import tomli_w

from fleet.config import Value
from fleet.errors import FleetError
from simulations.flower_env import quiet_environment

_PACKAGES = ("fleet", "clients", "strategies")
_SCRIPTS = Path(sys.executable).parent
_START_SECONDS = 60
_POLL_SECONDS = 0.3


def run_flower(
    settings: Mapping[str, Value],
    num_clients: int,
    on_poll: Callable[[], None] = lambda: None,
) -> None:
    """Run the app under `flwr run` on a SuperLink of its own.

    The app is staged in a folder apart: Flower imports simulated clients from
    the SuperLink's working directory, and may rewrite the pyproject.toml that
    it is shown.

    Args:
        settings: the complete run configuration; its paths are absolute.
        num_clients: simulated SuperNodes.
        on_poll: called about three times a second while the run goes on.

    Raises:
        FleetError: if the run did not end well, with what Flower said.
    """
    with tempfile.TemporaryDirectory(prefix="fleet-flower-") as folder:
        root = Path(folder)
        app = _stage(root / "app")
        overrides = root / "run.toml"
        overrides.write_text(tomli_w.dumps(dict(settings)))
        environment = os.environ | quiet_environment() | {"FLWR_HOME": str(root / "home")}
        # Flower starts its own commands by name, whether or not the venv is active.
        environment["PATH"] = f"{_SCRIPTS}{os.pathsep}{os.environ.get('PATH', '')}"
        if own := own_folders(settings):
            path = os.environ.get("PYTHONPATH")
            environment["PYTHONPATH"] = os.pathsep.join([*([path] if path else []), *own])
        with _superlink(root, environment), (root / "run.log").open("w") as log:
            run = subprocess.Popen(
                [
                    *_command("flwr", "run", str(app), "fleet", "--stream"),
                    *("--run-config", str(overrides)),
                    "--federation-config",
                    f"num-supernodes={num_clients} client-resources-num-cpus=1",
                ],
                env=environment,
                cwd=root,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is ours to pass on, to all of its children
            )
            try:
                while run.poll() is None:
                    on_poll()
                    time.sleep(_POLL_SECONDS)
            finally:
                _end(run)
        if not (Path(str(settings["run-dir"])) / "summary.json").is_file():
            raise FleetError(f"the run on Flower failed: {_reason(root / 'run.log')}")


def own_folders(settings: Mapping[str, Value]) -> list[str]:
    """Folders of the user's own that a strategy and a rule are imported from.

    Flower's processes do not look where this one does.
    """
    installed = {Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib")}
    folders = []
    for key in ("strategy", "rule"):
        module, _, name = str(settings[key]).partition("+")[0].partition(":")
        spec = None
        if name.isidentifier():  # else it is built in, with or without a number
            with contextlib.suppress(ImportError, ValueError):  # the server says it better
                spec = importlib.util.find_spec(module.partition(".")[0])
        if spec is not None and spec.has_location:
            origin = Path(spec.origin).resolve()
            package = spec.submodule_search_locations is not None
            folders.append(origin.parent.parent if package else origin.parent)
    return [str(folder) for folder in dict.fromkeys(folders) if folder not in installed]


def _stage(app: Path) -> Path:
    """A copy of what Flower bundles: the packages and the pyproject.toml."""
    app.mkdir()
    import fleet

    source = Path(fleet.__file__).resolve().parent.parent
    for name in _PACKAGES:
        ignore = shutil.ignore_patterns("__pycache__", "pyproject.toml")
        shutil.copytree(source / name, app / name, ignore=ignore)
    pyprojects = (source / "pyproject.toml", source / "fleet" / "pyproject.toml")
    shutil.copy(next(p for p in pyprojects if p.is_file()), app / "pyproject.toml")
    return app


@contextlib.contextmanager
def _superlink(root: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """A SuperLink in simulation mode on loopback, reachable under the name `fleet`."""
    api = _free_port()
    home = root / "home"
    home.mkdir()
    connection = {"address": f"127.0.0.1:{api}", "insecure": True}
    (home / "config.toml").write_text(tomli_w.dumps({"superlink": {"fleet": connection}}))
    process = subprocess.Popen(
        [
            *_command("flower-superlink", "--insecure", "--simulation"),
            *("--isolation", "subprocess", "--host", "127.0.0.1", "--port", str(api)),
        ],
        env=environment,
        cwd=root,
        stdout=(root / "superlink.log").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        _wait_until_up(process, api, root / "superlink.log")
        yield
    finally:
        _end(process)


def _wait_until_up(process: subprocess.Popen, port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=1).is_success:
                return
        except httpx.HTTPError:
            time.sleep(_POLL_SECONDS)
    raise FleetError(f"Flower's SuperLink did not start: {_reason(log)}")


def _command(name: str, *arguments: str) -> list[str]:
    """A console script of the environment that this Python runs in."""
    return [str(_SCRIPTS / name), *arguments]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _end(process: subprocess.Popen) -> None:
    """Ask a process and all that it started to stop, and make those that do not."""
    if process.poll() is not None:
        return
    parent = psutil.Process(process.pid)
    family = [*parent.children(recursive=True), parent]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.terminate()
    _, alive = psutil.wait_procs(family, timeout=15)
    for member in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def _reason(log: Path) -> str:
    """The first error that a log names, what follows being its consequences."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace"))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "ERROR" in line]
    return errors[0] if errors else " | ".join(lines[-3:]) or "it said nothing"
