"""The services `fleet server` and `fleet client`, installed for systemd to keep alive."""

import os
import pwd
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import fleet
from fleet.deploy.units import (
    RESTART_STEPS_SINCE,
    STATE_ROOT,
    Service,
    is_as_written,
    made_by_systemd,
    unit_text,
)
from fleet.errors import ConfigError

UNIT_FOLDER = Path("/etc/systemd/system")
CLIENT_MEMORY = "80%"
PRIVILEGED_PORTS = 1024

_UNIT_PATHS = ("etc/systemd/system", "usr/lib/systemd/system", "lib/systemd/system")
# Of these the first that is there: it ends once the clock is right.
_CLOCK_WAITS = ("chrony-wait.service", "systemd-time-wait-sync.service")


@dataclass(frozen=True)
class Installed:
    """What an installation did.

    Attributes:
        path: of the unit.
        text: of the unit.
        replaced: whether another version of it was there.
        changed: whether anything was written.
    """

    path: Path
    text: str
    replaced: bool
    changed: bool


def client_service(
    *,
    name: str,
    bundle: Path,
    data: Path,
    state: Path | None,
    user: str,
    memory_max: str = CLIENT_MEMORY,
    devices: bool = False,
    arguments: Sequence[str] = (),
    clock: Sequence[str] = (),
    systemd_version: int = RESTART_STEPS_SINCE,
) -> Service:
    """`fleet client` as a service.

    Args:
        name: of the unit.
        bundle: the device's, an archive or a folder.
        data: its images.
        state: where it writes; else a folder of the unit's name in /var/lib.
        user: whom it runs as.
        memory_max: the most memory that it may take with all its processes.
        devices: whether it sees a GPU.
        arguments: further ones of `fleet client`.
        clock: of `clock_units`.
        systemd_version: which the unit is for.

    Raises:
        ConfigError: for names and paths that no unit can hold.
    """
    bundle, data, state = bundle.resolve(), data.resolve(), _state(name, state)
    arguments, trusted = _resolved(arguments, "--trusted-entities")
    command = ["client", "--bundle", bundle, "--data", data, "--state", state, *arguments]
    return Service(
        name=name,
        description="Federated fine-tuning: this device's client",
        command=[program(), *map(str, command)],
        user=user,
        state=state,
        program=program_folders(),
        readable=[bundle, data, *trusted],
        memory_max=memory_max,
        oom_score_adjust=300,  # rather than what else the device is for
        devices=devices,
        clock=clock,
        systemd_version=systemd_version,
        environment={"FLEET_CACHE": str(state / "features")},
    )


def server_service(
    *,
    name: str,
    folder: Path,
    state: Path | None,
    user: str,
    host: str | None = None,
    port: int | None = None,
    readable: Sequence[Path] = (),
    writable: Sequence[Path] = (),
    memory_max: str = "infinity",
    devices: bool = False,
    arguments: Sequence[str] = (),
    clock: Sequence[str] = (),
    systemd_version: int = RESTART_STEPS_SINCE,
) -> Service:
    """`fleet server` as a service.

    Args:
        name: of the unit.
        folder: the server's own, which `fleet provision` made.
        state: where it writes; else a folder of the unit's name in /var/lib.
        user: whom it runs as.
        host, port: where it listens; `fleet server` has its own defaults.
        readable: data and weights of runs.
        writable: folders that runs are written to.
        memory_max: the most memory that it may take with all its processes.
        devices: whether it sees a GPU.
        arguments: further ones of `fleet server`.
        clock: of `clock_units`.
        systemd_version: which the unit is for.

    Raises:
        ConfigError: for names and paths that no unit can hold.
    """
    folder, state = folder.resolve(), _state(name, state)
    options = {"--dir": folder, "--state": state, "--host": host, "--port": port}
    given = [str(part) for pair in options.items() if pair[1] is not None for part in pair]
    return Service(
        name=name,
        description="Federated fine-tuning: the server",
        command=[program(), "server", *given, *arguments],
        user=user,
        state=state,
        program=program_folders(),
        readable=[path.resolve() for path in readable],
        writable=[folder, *(path.resolve() for path in writable)],
        memory_max=memory_max,
        devices=devices,
        low_port=port is not None and port < PRIVILEGED_PORTS,
        clock=clock,
        systemd_version=systemd_version,
    )


def install(service: Service, unit_folder: Path = UNIT_FOLDER, *, force: bool = False) -> Installed:
    """Write a service's unit, and make its state folder where systemd does not.

    Raises:
        ConfigError: if the unit there was changed by hand and `force` is not set, if what the
            service needs is not there or not its user's to read, or if it cannot be written.
    """
    check(service)
    path, text = unit_folder / f"{service.name}.service", unit_text(service)
    before = _read(path)
    if before == text:
        return Installed(path, text, replaced=False, changed=False)
    if before is not None and not is_as_written(before) and not force:
        raise ConfigError(
            f"{path} was changed, or made, by hand; keep it, put your settings into a drop-in "
            f"(systemctl edit {service.name}) and remove it, or replace it with --force"
        )
    try:
        if not made_by_systemd(service.state):
            _make_state(service)
        part = path.with_name(f".{path.name}.part")
        part.write_text(text)
        part.chmod(0o644)
        os.replace(part, path)
    except OSError as error:
        raise ConfigError(
            f"cannot write {error.filename or path}: {error.strerror}; run it with sudo "
            f"{program()} service install …, or take the unit from --print"
        ) from error
    return Installed(path, text, replaced=before is not None, changed=True)


def uninstall(name: str, unit_folder: Path = UNIT_FOLDER, *, force: bool = False) -> Path:
    """Remove a unit and what made it start with the machine; state and keys stay.

    Raises:
        ConfigError: if there is none, if it was changed by hand and `force` is not set, or
            if it cannot be removed.
    """
    path = unit_folder / f"{name}.service"
    before = _read(path)
    if before is None:
        raise ConfigError(f"there is no {path}; name the service with --name")
    if not is_as_written(before) and not force:
        raise ConfigError(f"{path} was changed, or made, by hand; remove it all the same: --force")
    try:
        (unit_folder / "multi-user.target.wants" / path.name).unlink(missing_ok=True)
        path.unlink()
    except OSError as error:
        raise ConfigError(f"cannot remove {path}: {error.strerror}; run it with sudo") from error
    return path


def check(service: Service) -> None:
    """Whether a service finds on this machine what its unit names.

    Raises:
        ConfigError: naming the user or path that is not there or cannot be read.
    """
    try:
        user = pwd.getpwnam(service.user)
    except KeyError:
        raise ConfigError(
            f"there is no user {service.user} on this machine; name another with --user, or make "
            f"one: sudo useradd --system {service.user}"
        ) from None
    for path in (*service.readable, *service.writable):
        if not path.exists():
            raise ConfigError(f"{path} is not there; the service could not start")
        if user.pw_uid and _owner_alone(path) and path.stat().st_uid != user.pw_uid:
            raise ConfigError(
                f"{path} can be read by its owner alone, who is not {service.user}; "
                f"sudo chown -R {service.user} {path}, or name another user with --user"
            )


def program() -> str:
    """The absolute path of the `fleet` that belongs to this Python.

    Raises:
        ConfigError: if the project is not installed.
    """
    path = Path(sysconfig.get_path("scripts")) / "fleet"
    if not path.exists():
        raise ConfigError(f"there is no {path}; install the project: pip install fleet-mobiletl")
    return str(path)


def program_folders() -> list[Path]:
    """Folders that the program is read from: its environment, its Python, and a checkout."""
    package = Path(fleet.__file__).resolve().parent.parent
    return [Path(sys.prefix), Path(sys.base_prefix), package]


def clock_units(root: Path = Path("/")) -> list[str]:
    """What to start after, so that the clock is right; empty without a time service."""
    for unit in _CLOCK_WAITS:
        if any((root / folder / unit).exists() for folder in _UNIT_PATHS):
            return ["time-sync.target", unit]
    return []


def systemd_version() -> int:
    """Of this machine; where there is none, the first that knows all that units say."""
    executable = shutil.which("systemctl")
    if executable is None:
        return RESTART_STEPS_SINCE
    told = subprocess.run([executable, "--version"], capture_output=True, text=True, check=False)
    found = re.match(r"systemd (\d+)", told.stdout)
    return int(found[1]) if found else RESTART_STEPS_SINCE


def default_user() -> str:
    """Who called sudo, or else who runs this.

    Raises:
        ConfigError: if that is root.
    """
    user = os.environ.get("SUDO_USER") or pwd.getpwuid(os.getuid()).pw_name
    if user == "root":
        raise ConfigError(
            "the service would run as root, and has no need to; name a user with --user NAME"
        )
    return user


def _state(name: str, state: Path | None) -> Path:
    return STATE_ROOT / name if state is None else state.resolve()


def _resolved(arguments: Sequence[str], option: str) -> tuple[list[str], list[Path]]:
    """Arguments with an option's path made absolute, and that path, if the option is given."""
    command, paths = list(arguments), []
    for i, argument in enumerate(command):
        name, equals, value = argument.partition("=")
        if argument == option and i + 1 < len(command):
            paths.append(Path(command[i + 1]).resolve())
            command[i + 1] = str(paths[-1])
        elif name == option and equals:
            paths.append(Path(value).resolve())
            command[i] = f"{option}={paths[-1]}"
    return command, paths


def _make_state(service: Service) -> None:
    if service.state.exists():
        return
    user = pwd.getpwnam(service.user)
    service.state.mkdir(mode=0o700, parents=True)
    os.chown(service.state, user.pw_uid, user.pw_gid)


def _owner_alone(path: Path) -> bool:
    return not path.stat().st_mode & 0o044


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}; remove it") from error
