"""systemd units for a server and for a client: what may be written, seen and used up.

A unit is made of sections of settings, in `systemd.unit(5)`'s and `systemd.exec(5)`'s words.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fleet.device_files import hidden
from fleet.errors import ConfigError

WATCHDOG_SECONDS = 180  # the supervisor says every few seconds that it is alive
RESTART_SECONDS, RESTART_LONGEST_SECONDS, RESTART_STEPS = 5, 300, 8
RESTART_STEPS_SINCE = 254  # the first systemd that waits longer from restart to restart

STATE_ROOT = Path("/var/lib")

_MARK = "# Written by fleet service install; SHA-256 of what follows: "
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_USER = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,30}")
_MEMORY = re.compile(r"[1-9][0-9]*(?:[KMGT]|%)?|infinity")

# What neither a server nor a client has any use for. Not among it are MemoryDenyWriteExecute, as
# oneDNN compiles its kernels when it needs them, and ProtectProc: Flower's SuperExec makes itself
# undumpable, and would be hidden from the SuperNode that watches over it.
_SANDBOX = (
    ("NoNewPrivileges", "yes"),
    ("ProtectSystem", "strict"),
    ("ProtectHome", "tmpfs"),
    ("PrivateTmp", "yes"),
    ("ProtectHostname", "yes"),
    ("ProtectKernelTunables", "yes"),
    ("ProtectKernelModules", "yes"),
    ("ProtectKernelLogs", "yes"),
    ("ProtectControlGroups", "yes"),
    ("RestrictAddressFamilies", "AF_UNIX AF_INET AF_INET6 AF_NETLINK"),
    ("RestrictNamespaces", "yes"),
    ("RestrictRealtime", "yes"),
    ("RestrictSUIDSGID", "yes"),
    ("LockPersonality", "yes"),
    ("KeyringMode", "private"),
    ("SystemCallArchitectures", "native"),
    ("SystemCallFilter", "@system-service"),
    ("SystemCallErrorNumber", "EPERM"),
    ("UMask", "0077"),
)


@dataclass(frozen=True, kw_only=True)
class Service:
    """What a unit is made from.

    Attributes:
        name: of the unit, without `.service`.
        description: a line for people.
        command: the program, absolute, and its arguments.
        user: whom it runs as.
        state: folder that it writes to, and that is its home.
        program: folders that the command itself is read from.
        readable: further paths that it reads.
        writable: further folders that it writes to.
        memory_max: as systemd takes it: `80%`, `1500M`, `infinity`.
        oom_score_adjust: −1000 to 1000; the kernel ends the highest first.
        devices: whether it sees devices beyond `/dev/null` and its like, a GPU for instance.
        low_port: whether it listens on a port below 1024.
        clock: units that tell when the clock is right; it starts after them.
        systemd_version: which the unit is for.
        environment: further variables, beside `HOME`.
    """

    name: str
    description: str
    command: Sequence[str]
    user: str
    state: Path
    program: Sequence[Path] = ()
    readable: Sequence[Path] = ()
    writable: Sequence[Path] = ()
    memory_max: str = "infinity"
    oom_score_adjust: int = 0
    devices: bool = False
    low_port: bool = False
    clock: Sequence[str] = ()
    systemd_version: int = RESTART_STEPS_SINCE
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"a service's name is of letters, digits, '_', '.' and '-', got {self.name!r}"
            )
        if not _USER.fullmatch(self.user):
            raise ConfigError(f"user {self.user!r} is no user's name; give --user NAME")
        if not _MEMORY.fullmatch(self.memory_max) or _percent(self.memory_max) > 100:
            raise ConfigError(
                f"memory-max must be like 80%, 1500M, 2G or infinity, got {self.memory_max!r}"
            )
        if not self.description.isprintable():
            raise ConfigError(f"description {self.description!r} must be one line of text")
        for name, value in self.environment.items():
            if not re.fullmatch(r"""[^"\\\x00-\x1f\x7f]*""", value):
                raise ConfigError(
                    f"environment {name}={value!r} contains a quote, a backslash or a control "
                    f"character; leave it out"
                )
        paths = (self.state, *self.program, *self.readable, *self.writable)
        for path in (*paths, Path(self.command[0])):
            check_path(path)


def unit_text(service: Service) -> str:
    """A service's unit file, its first line a digest of the others.

    Raises:
        ConfigError: for text that no unit can hold.
    """
    sections = (
        ("Unit", _unit_settings(service)),
        ("Service", _service_settings(service)),
        ("Install", [("WantedBy", "multi-user.target")]),
    )
    body = "\n".join(
        "\n".join([f"[{title}]", *(f"{key}={value}" for key, value in settings), ""])
        for title, settings in sections
    )
    return f"{_MARK}{_digest(body)}\n{body}"


def is_as_written(text: str) -> bool:
    """Whether a unit file is one of ours that nobody has changed since."""
    first, _, body = text.partition("\n")
    return first == f"{_MARK}{_digest(body)}"


def check_path(path: Path) -> Path:
    """A path that settings of systemd can hold; it is returned.

    Raises:
        ConfigError: for one that is not absolute, or with a sign that a list of paths
            gives a meaning of its own.
    """
    text = str(path)
    if not path.is_absolute():
        raise ConfigError(f"path {text!r} must be absolute")
    if bad := re.search(r"""[\x00-\x1f\x7f"'\\:]""", text):
        raise ConfigError(
            f"path {text!r} contains {bad[0]!r}, which systemd's lists of paths cannot hold; "
            f"rename it"
        )
    return path


def quoted(argument: str) -> str:
    r"""An argument of a command line, as `ExecStart=` reads it back.

    Specifiers (`%h`) and variables (`$HOME`) are taken literally, and so are
    backslashes, quotes and a `;` of its own, which would begin another command.

    Raises:
        ConfigError: for NUL, which no argument can hold.
    """
    if "\0" in argument:
        raise ConfigError(f"argument {argument!r} contains NUL")
    escaped = argument.replace("\\", "\\\\").replace('"', '\\"')
    for sign, name in (("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        escaped = escaped.replace(sign, name)
    escaped = _literal(escaped).replace("$", "$$")
    return escaped if re.fullmatch(r"[\w./:=,@+%$-]+", escaped) else f'"{escaped}"'


def made_by_systemd(state: Path) -> bool:
    """Whether systemd itself makes a state folder as the service starts."""
    return state != STATE_ROOT and state.is_relative_to(STATE_ROOT)


def _unit_settings(service: Service) -> list[tuple[str, str]]:
    wanted = ["network-online.target", *service.clock]
    after = ["network-online.target", *(["time-sync.target"] if service.clock else [])]
    return [
        ("Description", _literal(service.description)),
        ("Wants", " ".join(wanted)),
        ("After", " ".join(after)),
        # A disk that is mounted late, or a stick: systemd waits for it.
        *_paths(
            "RequiresMountsFor",
            dict.fromkeys((service.state, *service.readable, *service.writable)),
        ),
        ("StartLimitIntervalSec", "0"),  # restarted for ever
    ]


def _service_settings(service: Service) -> list[tuple[str, str]]:
    program, *arguments = service.command
    return [
        ("Type", "notify"),
        # The executable's own path is no place for variables, so its dollars stay single.
        ("ExecStart", " ".join([_executable(program), *map(quoted, arguments)])),
        ("User", service.user),
        ("WorkingDirectory", _literal(str(service.state))),
        *[
            ("Environment", f'"{name}={_literal(value)}"')
            for name, value in _environment(service).items()
        ],
        *_restarts(service),
        *_resources(service),
        *_folders(service),
        *_privileges(service),
        *_SANDBOX,
    ]


def _environment(service: Service) -> dict[str, str]:
    # Whatever writes below its home, as Flower and PyTorch do, writes to the state's folder.
    return {"HOME": str(service.state), "PYTHONUNBUFFERED": "1", **service.environment}


def _restarts(service: Service) -> list[tuple[str, str]]:
    backs_off = [
        ("RestartSteps", str(RESTART_STEPS)),
        ("RestartMaxDelaySec", str(RESTART_LONGEST_SECONDS)),
    ]
    return [
        ("Restart", "always"),  # Flower's client ends with 0 where its clock is off
        ("RestartSec", str(RESTART_SECONDS)),
        *(backs_off if service.systemd_version >= RESTART_STEPS_SINCE else []),
        ("WatchdogSec", str(WATCHDOG_SECONDS)),
        ("TimeoutStartSec", "300"),
        ("TimeoutStopSec", "60"),
        ("KillMode", "mixed"),  # the supervisor ends its children; what is left is killed
    ]


def _resources(service: Service) -> list[tuple[str, str]]:
    return [
        ("MemoryMax", service.memory_max),
        # What the kernel kills for memory is the training; its supervisor lives and reports it.
        ("OOMPolicy", "continue"),
        ("OOMScoreAdjust", str(service.oom_score_adjust)),
    ]


def _folders(service: Service) -> list[tuple[str, str]]:
    """What it may write, and what it sees at all of what the sandbox hides."""
    writable = _outermost([service.state, *service.writable])
    readable = [
        path
        for path in _outermost([*service.program, *service.readable])
        if hidden(path) and not any(path.is_relative_to(folder) for folder in writable)
    ]
    made_state = service.state if made_by_systemd(service.state) else None
    open_ones = [path for path in writable if not hidden(path) and path != made_state]
    return [
        *_state_directory(service.state),
        *_paths("ReadWritePaths", open_ones),
        *_paths("BindPaths", filter(hidden, writable)),
        # Whether these are there is for the program to say.
        *_paths("BindReadOnlyPaths", readable, optional=True),
    ]


def _state_directory(state: Path) -> list[tuple[str, str]]:
    """Below /var/lib systemd makes the folder, for the service's user alone."""
    if not made_by_systemd(state):
        return []
    [(_, name)] = _paths("", [state.relative_to(STATE_ROOT)])
    return [("StateDirectory", name), ("StateDirectoryMode", "0700")]


def _privileges(service: Service) -> list[tuple[str, str]]:
    capability = "CAP_NET_BIND_SERVICE" if service.low_port else ""
    settings = [("CapabilityBoundingSet", capability)]
    if service.low_port:
        settings.append(("AmbientCapabilities", capability))
    if not service.devices:  # ProtectClock too forbids devices: all but the clock's
        settings += [("PrivateDevices", "yes"), ("ProtectClock", "yes")]
    return settings


def _outermost(paths: Iterable[Path]) -> list[Path]:
    """The paths that lie in none of the others, each once."""
    unique = list(dict.fromkeys(paths))
    return [p for p in unique if not any(p != q and p.is_relative_to(q) for q in unique)]


def _paths(key: str, paths: Iterable[Path], optional: bool = False) -> list[tuple[str, str]]:
    dash = "-" if optional else ""
    return [(key, f'"{dash}{_literal(str(path))}"') for path in paths]


def _executable(program: str) -> str:
    text = _literal(program)
    return f'"{text}"' if re.search(r"\s", text) else text


def _literal(text: str) -> str:
    return text.replace("%", "%%")


def _percent(memory: str) -> int:
    return int(memory[:-1]) if memory.endswith("%") else 0


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()
