"""A device's client: Flower's SuperNode kept running, and seen online by the server.

Two threads work in it: the supervisor, which starts the SuperNode again whenever it
ends, and the watchdog, which asks the server whether it sees this device. A
SuperNode that believes itself connected while the server does not is started again.
"""

import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fleet.config import WEIGHTS, Value
from fleet.deploy import notify
from fleet.deploy.addresses import Address
from fleet.deploy.bundle import Bundle
from fleet.deploy.device_status import Asker, Seen
from fleet.deploy.diagnosis import Diagnosis, diagnose, last_words
from fleet.deploy.flower_process import (
    DEVICE_POLL_SECONDS,
    flower_environment,
    node_config,
    own_command,
)
from fleet.deploy.one_at_a_time import alone_in
from fleet.deploy.room import want_of_room
from fleet.deploy.server import answers
from fleet.deploy.superlink import STATUS_PATH
from fleet.deploy.supervisor import Backoff, Child, Ending, Supervisor
from fleet.deploy.trust import REFUSES, read_trusted
from fleet.device_files import dead_links, image_folder, told_of_links
from fleet.errors import ConfigError
from fleet.node_settings import check_node_settings
from fleet.paths import expanded

SUPERNODE = "supernode"

_ASK_EVERY_SECONDS = 30.0
_CONNECT_SECONDS = 90.0  # until a SuperNode that has been started is seen; a Pi is slow
_OFFLINE_ANSWERS = 2  # in a row: one may have come just before a heartbeat

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClientOptions:
    """How a device's client is started.

    Attributes:
        state: of everything that it keeps.
        node: what its node tells each app, of `fleet.node_settings`.
        bundle: of key and certificate; None: a server without either, on this machine.
        server: where that is, without a bundle.
        trusted_entities: YAML of who may sign apps; None: whatever the server sends runs.
        cold: every message imports PyTorch anew, and none of it stays in memory.
    """

    state: Path
    node: Mapping[str, Value]
    bundle: Bundle | None = None
    server: Address | None = None
    trusted_entities: Path | None = None
    cold: bool = False

    def check(self) -> None:
        """Refuse what cannot be, or must not.

        Raises:
            ConfigError: as `check_node_settings`; for data that is no folder, weights that are
                no file, trusted keys that are none, or a server elsewhere without keys.
        """
        if self.bundle is None and (self.server is None or not self.server.loopback):
            raise ConfigError(
                f"--insecure sends what this device learns without encryption, and "
                f"{self.server or 'no server'} is not this machine; use --server 127.0.0.1:8000, "
                f"or a bundle of fleet provision"
            )
        check_node_settings(self.node)
        weights = str(self.node.get("weights", WEIGHTS[0]))
        if weights not in WEIGHTS and not os.path.isfile(weights):
            raise ConfigError(
                f"--weights {weights} is no file; name a .safetensors or .pth file, or one of: "
                f"{', '.join(WEIGHTS)}"
            )
        image_folder(str(self.node["data"]))
        if self.trusted_entities is not None:
            read_trusted(self.trusted_entities)

    @property
    def files(self) -> tuple[Path, ...]:
        """What it reads beside bundle and images."""
        weights = str(self.node.get("weights", WEIGHTS[0]))
        own = () if weights in WEIGHTS else (Path(weights),)
        return own if self.trusted_entities is None else (*own, self.trusted_entities)

    @property
    def address(self) -> Address:
        """Where the server is."""
        return self.bundle.server if self.bundle is not None else self.server


def run_client(options: ClientOptions, until: Callable[[Callable[[], None]], None]) -> None:
    """Run a device's client until it is told to stop.

    Args:
        options: how.
        until: is given a function that stops it, to call from a signal's handler.

    Raises:
        ConfigError: as `ClientOptions.check`, or if another client runs here.
    """
    options.check()
    data = Path(str(options.node["data"]))
    _tell_if_empty(data)
    if told := told_of_links(data, dead_links(data)):
        _log.warning("%s: %s", *told)
    with alone_in(options.state, "fleet client"):
        watchdog = Watchdog(options)
        environment = flower_environment(
            options.state / "flower", DEVICE_POLL_SECONDS, FLEET_STATE=str(options.state)
        )
        child = Child(
            SUPERNODE,
            lambda: _command(options),
            environment,
            judge=watchdog.judge,
            hear=_tell_of_refusal,
            backoff=Backoff(first=1.0, most=15.0),
        )
        supervisor = Supervisor([child], options.state / "logs", options.state)
        thread = threading.Thread(
            target=watchdog.run, args=(supervisor,), name="watchdog", daemon=True
        )
        until(supervisor.stop)
        _log.info(
            "%s at server %s; logs are in %s",
            options.node["name"],
            options.address,
            options.state / "logs",
        )
        thread.start()
        try:
            notify.ready()
            supervisor.run(notify.alive)
        finally:
            notify.stopping()
            watchdog.stop()
            thread.join(timeout=1.0)
            _log.info("client has ended")


def _tell_if_empty(data: Path) -> None:
    """A warning, no error: a device may be started before its images come."""
    below = os.walk(data, followlinks=True)  # as the images are read
    if not any(files for folder, _, files in below if Path(folder) != data):
        _log.warning(
            "there are no images in %s yet, and until they come this device declines to train; "
            "put those of each class in a folder of its own: %s",
            data,
            data / "CLASS" / "image.jpg",
        )


def _tell_of_refusal(line: str) -> None:
    """What of the SuperNode's log somebody has to do something about."""
    _, mark, reason = line.partition(REFUSES)
    if mark:
        _log.warning("this device %s%s", mark, reason)


def _command(options: ClientOptions) -> list[str]:
    """The SuperNode's command line; its local port is another one each time."""
    secure: tuple[object, ...] = ("--insecure",)
    if options.bundle is not None:
        secure = (
            *("--root-certificates", options.bundle.authority_path),
            *("--auth-supernode-private-key", options.bundle.key_path),
        )
    if options.trusted_entities is not None:
        secure += ("--trusted-entities", options.trusted_entities.resolve())
    if options.cold:
        secure += ("--cold",)
    return own_command(
        "fleet.deploy.supernode",
        *("--superlink", options.address, "--node-config", node_config(options.node)),
        *("--host", "127.0.0.1", "--port", _free_port()),
        *secure,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Watchdog:
    """Asks the server how it sees this device, and says what an ending means.

    Attributes:
        options: of the client.
        pause: seconds between two questions.
        seen: the last answer.
    """

    options: ClientOptions
    pause: float = _ASK_EVERY_SECONDS
    seen: Seen = field(default_factory=lambda: Seen("unreachable", problem="not asked yet"))

    def __post_init__(self) -> None:
        self._stopped = threading.Event()
        self._offline = 0
        self._told = self._lacking = ""
        bundle = self.options.bundle
        self._asker = None
        if bundle is not None:
            self._asker = Asker(bundle.server, STATUS_PATH, bundle.key_path, bundle.authority_path)

    def judge(self, ending: Ending) -> Diagnosis | None:
        """Why the SuperNode ended."""
        self.seen = self._ask()
        if self.options.bundle is not None:
            return diagnose(ending, self.seen, self.options.bundle)
        if self.seen.status == "unreachable":
            return Diagnosis(f"the server at {self.options.address} cannot be reached", 0.0)
        return last_words(ending)

    def run(self, supervisor: Supervisor) -> None:
        """Ask now and then, and restart a SuperNode that the server does not see."""
        while not self._stopped.wait(self.pause):
            self.watch(supervisor)

    def watch(self, supervisor: Supervisor) -> None:
        """Ask once."""
        self.seen = self._ask()
        self._tell()
        self._tell_of_room()
        uptime = supervisor.uptime(SUPERNODE)
        lost = self.seen.status in ("offline", "registered", "unknown")
        if not lost or uptime is None or uptime < _CONNECT_SECONDS:
            self._offline = 0
            return
        self._offline += 1
        if self._offline >= _OFFLINE_ANSWERS:
            self._offline = 0
            supervisor.restart(SUPERNODE, f"the server sees this device as {self.seen.status}")

    def stop(self) -> None:
        """End `run`."""
        self._stopped.set()

    def _ask(self) -> Seen:
        if self._asker is not None:
            return self._asker.ask()
        # Without keys the server knows nobody: all that can be asked is whether it is there.
        there = answers(self.options.address, None)
        return Seen("online") if there else Seen("unreachable", problem="it does not answer")

    def _tell(self) -> None:
        """One line whenever the answer is another one."""
        told = self.seen.status
        if told == self._told:
            return
        self._told = told
        level = logging.INFO if told == "online" else logging.WARNING
        _log.log(
            level,
            "the server sees this device as %s%s",
            told,
            f" ({self.seen.problem})" if self.seen.problem else "",
        )

    def _tell_of_room(self) -> None:
        """One line as the disk gets full, and one as there is room again."""
        lacking = want_of_room(self.options.state)
        if lacking and not self._lacking:
            _log.warning("%s; until then this device's updates may be lost", lacking)
        elif self._lacking and not lacking:
            _log.info("the disk of %s has room again", self.options.state)
        self._lacking = lacking


def state_folder(state: Path | None) -> Path:
    """Where a device keeps everything: what is named, else $FLEET_STATE, else the user's own."""
    where = state or Path(os.environ.get("FLEET_STATE") or "~/.local/state/fleet")
    return expanded(where, "state").absolute()
