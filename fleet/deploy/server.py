"""The server: SuperLink and SuperExec kept running, devices and runs kept as they are wished.

One process holds two of Flower's. Two threads work in it: the supervisor, which is
never made to wait, and the attendant, which talks with the SuperLink.
"""

import contextlib
import logging
import secrets
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path

from fleet.deploy import notify, private_files
from fleet.deploy.addresses import Address, is_loopback
from fleet.deploy.certificates import expiry
from fleet.deploy.control import Control, ControlError
from fleet.deploy.diagnosis import last_words
from fleet.deploy.flower_process import (
    SERVER_POLL_SECONDS,
    flower_environment,
    own_command,
)
from fleet.deploy.membership import Membership
from fleet.deploy.one_at_a_time import alone_in
from fleet.deploy.provisioning import EXPIRES_SOON_DAYS, ServerFolder, days_left
from fleet.deploy.registry import read_devices
from fleet.deploy.room import want_of_room
from fleet.deploy.run_keeper import RunKeeper
from fleet.deploy.superlink import cannot_listen, listening_sockets
from fleet.deploy.supervisor import Backoff, Child, Supervisor
from fleet.deploy.wishes import Wishes
from fleet.errors import ConfigError, FleetError

SUPERLINK, SUPEREXEC = "superlink", "superexec"
DATABASE = "flower.db"

_ATTEND_SECONDS = 1.0
_DEVICES_SECONDS = 60.0  # also without a change of the registry: Flower's list may have changed
_EXPIRY_SECONDS = 24 * 3600.0
_START_SECONDS = 120.0  # until a SuperLink that does not answer is hung; a Pi is slow
_HUNG_AFTER = 6  # questions in a row without an answer
_STUCK_SECONDS = 300.0  # an attendant that did not come round: systemd is told no more

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerOptions:
    """How a server is started.

    Attributes:
        folder: of its keys, devices and runs.
        state: of database and logs.
        host: that it listens on, next to loopback.
        port: of both.
        insecure: without TLS and keys, for trials on one machine.
    """

    folder: ServerFolder
    state: Path
    host: str
    port: int
    insecure: bool = False

    def check(self) -> None:
        """Refuse what cannot be, or must not.

        Raises:
            ConfigError: for a missing key, or `insecure` where others could reach it.
        """
        if not self.insecure:
            self.folder.check()
            read_devices(self.folder.registry_path)
        elif not is_loopback(self.host):
            raise ConfigError(
                f"--insecure serves without encryption and keys, and --host {self.host} lets "
                f"others in; use --host 127.0.0.1, or make keys with fleet provision"
            )

    @property
    def here(self) -> Address:
        """Where the server's own processes reach it."""
        return Address(self.host if is_loopback(self.host) else "127.0.0.1", self.port)

    @property
    def authority(self) -> Path | None:
        """What the server's certificate is verified against; None: it has none."""
        return None if self.insecure else self.folder.authority_path


def serve(options: ServerOptions, until: Callable[[Callable[[], None]], None]) -> None:
    """Run a server until it is told to stop.

    Args:
        options: how.
        until: is given a function that stops it, to call from a signal's handler.

    Raises:
        ConfigError: as `ServerOptions.check`, or if another server works in the folder or
            the state.
    """
    options.check()
    with (
        options.folder.alone(),
        alone_in(options.state, "fleet server"),
    ):
        options.folder.note_serving(options.here, options.insecure)
        supervisor = Supervisor(_children(options), options.state / "logs", options.state)
        attendant = Attendant(options, supervisor)
        thread = threading.Thread(target=attendant.run, name="attendant", daemon=True)
        until(supervisor.stop)
        _log.info("server at %s; logs are in %s", _where(options), options.state / "logs")
        _tell_if_taken(options)
        thread.start()
        try:
            supervisor.run(lambda: _tell_systemd(attendant))
        finally:
            notify.stopping()
            attendant.stop()
            thread.join(timeout=10.0)
            _log.info("server has ended")


def _children(options: ServerOptions) -> list[Child]:
    secret = options.state / "superexec.secret"
    private_files.replace(secret, secrets.token_hex(32).encode())
    environment = flower_environment(options.state / "flower", SERVER_POLL_SECONDS)
    folder = options.folder
    tls: tuple[object, ...] = ("--insecure",)
    verify: tuple[object, ...] = ("--insecure",)
    if not options.insecure:
        tls = (
            *("--ssl-ca-certfile", folder.authority_path.resolve()),
            *("--ssl-certfile", folder.certificate_path.resolve()),
            *("--ssl-keyfile", folder.key_path.resolve()),
            "--enable-supernode-auth",
        )
        verify = ("--root-certificates", folder.authority_path.resolve())
    superlink = own_command(
        "fleet.deploy.superlink",
        *("--host", options.host, "--port", options.port, "--isolation", "process"),
        *("--database", options.state.resolve() / DATABASE),
        *("--superexec-auth-secret-file", secret.resolve()),
        "--disable-runtime-dependency-installation",
        *tls,
    )
    superexec = own_command(
        "fleet.deploy.superexec",
        *("--runtime-api-address", options.here),
        *("--superexec-auth-secret-file", secret.resolve()),
        *verify,
    )
    return [
        Child(
            name,
            lambda command=command: command,
            environment,
            judge=last_words,
            backoff=Backoff(first=0.2, most=15.0),
        )
        for name, command in ((SUPERLINK, superlink), (SUPEREXEC, superexec))
    ]


def _tell_if_taken(options: ServerOptions) -> None:
    """At once, and no reason to end: a server that was killed lets its port go in a moment."""
    try:
        for each in listening_sockets(options.host, options.port):
            each.close()
    except OSError as error:
        _log.warning("%s; tried again", cannot_listen(options.host, options.port, error))


def _where(options: ServerOptions) -> str:
    what = " without encryption and keys" if options.insecure else ""
    return f"{Address(options.host, options.port)}{what}"


def _tell_systemd(attendant: "Attendant") -> None:
    if attendant.answered and not attendant.told_ready:
        attendant.told_ready = True
        notify.ready()
    if time.monotonic() - attendant.came_round < _STUCK_SECONDS:
        notify.alive()


@dataclass
class Attendant:
    """Talks with the SuperLink: about devices, runs, and whether it is well.

    Attributes:
        options: of the server.
        supervisor: of its processes.
        came_round: when it was last done, by the monotonic clock.
        answered: whether the SuperLink has ever answered.
        told_ready: whether systemd knows.
    """

    options: ServerOptions
    supervisor: Supervisor
    came_round: float = field(default_factory=time.monotonic)
    answered: bool = False
    told_ready: bool = False

    def __post_init__(self) -> None:
        self._stopped = threading.Event()
        self._control: Control | None = None
        self._membership = Membership()
        self._runs = RunKeeper(Wishes(self.options.folder.runs_path))
        self._unanswered = 0
        self._devices_due = self._expiry_due = 0.0
        self._starts = 0
        self._registry_stamp = self._certificate_stamp = self._stamp(certificate=True)
        self._complained: dict[str, str] = {}

    def run(self) -> None:
        """Go round until `stop` is called."""
        while not self._stopped.wait(_ATTEND_SECONDS):
            try:
                with self._complaints("round"):
                    self._go_round()
            except Exception:  # a server outlives what nobody foresaw
                _log.exception("the attendant goes on after an error")
            self.came_round = time.monotonic()

    def stop(self) -> None:
        """End `run`."""
        self._stopped.set()

    def _go_round(self) -> None:
        with self._complaints("room"):
            self._look_at_room()
        with self._complaints("certificate"):
            self._look_at_certificate()
        if self.supervisor.uptime(SUPERLINK) is None or not self._is_well():
            return
        if self._control is None:
            self._control = Control(self.options.here, self.options.authority)
        try:
            if not self.options.insecure:
                with self._complaints("devices"):
                    self._look_after_devices(self._control)
            self._runs.attend(self._control)
        except ControlError:
            self._control.close()
            self._control = None
            raise

    def _look_at_room(self) -> None:
        """Without room the SuperLink answers everybody that it has an error, and not which."""
        for folder in (self.options.state, self.options.folder.runs_path):
            if lacking := want_of_room(folder):
                raise ConfigError(lacking)

    def _is_well(self) -> bool:
        """Whether the SuperLink answers; one that has not for long is started again."""
        if answers(self.options.here, self.options.authority):
            self._unanswered, self.answered = 0, True
            return True
        self._unanswered += 1
        uptime = self.supervisor.uptime(SUPERLINK) or 0.0
        if uptime > _START_SECONDS and self._unanswered >= _HUNG_AFTER:
            self.supervisor.restart(SUPERLINK, "it does not answer")
            self._unanswered = 0
        return False

    def _look_after_devices(self, control: Control) -> None:
        now, stamp, starts = time.monotonic(), self._stamp(), self.supervisor.starts(SUPERLINK)
        changed = stamp != self._registry_stamp or starts != self._starts
        if not changed and now < self._devices_due:
            return
        self._membership.reconcile(read_devices(self.options.folder.registry_path), control)
        self._registry_stamp, self._starts = stamp, starts
        self._devices_due = now + _DEVICES_SECONDS

    def _look_at_certificate(self) -> None:
        if self.options.insecure:
            return
        stamp = self._stamp(certificate=True)
        if stamp != self._certificate_stamp:
            self._certificate_stamp = stamp
            self._expiry_due = 0.0
            self.supervisor.restart(SUPERLINK, "its certificate is a new one")
        now = time.monotonic()
        if now < self._expiry_due:
            return
        self._expiry_due = now + _EXPIRY_SECONDS
        left = days_left(expiry(self.options.folder.certificate()))
        if left < 0:
            _log.error(
                "the server's certificate has expired, and no device connects; renew it: fleet "
                "provision --renew"
            )
        elif left < EXPIRES_SOON_DAYS:
            _log.warning(
                "the server's certificate expires in %d days; renew it: fleet provision --renew",
                left,
            )

    def _stamp(self, certificate: bool = False) -> tuple[int, int]:
        """Changes whenever the file is replaced."""
        folder = self.options.folder
        path = folder.certificate_path if certificate else folder.registry_path
        try:
            found = path.stat()
        except OSError:
            return (0, 0)
        return (found.st_mtime_ns, found.st_ino)

    @contextlib.contextmanager
    def _complaints(self, part: str) -> Iterator[None]:
        """Tell once what goes wrong in a part, so that the parts behind it are done all the same.

        A SuperLink that cannot be reached ends them too.
        """
        try:
            yield
            self._complained.pop(part, None)
        except FleetError as error:
            if isinstance(error, ControlError) and part != "round":
                raise
            if str(error) != self._complained.get(part):
                _log.warning("%s; tried again", error)
            self._complained[part] = str(error)


def answers(address: Address, authority: Path | None, seconds: float = 10.0) -> bool:
    """Whether a SuperLink answers that it is well."""
    try:
        if authority is None:
            connection = HTTPConnection(address.host, address.port, timeout=seconds)
        else:
            context = ssl.create_default_context(cafile=str(authority))
            connection = HTTPSConnection(
                address.host, address.port, timeout=seconds, context=context
            )
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        finally:
            connection.close()
    except (OSError, HTTPException):
        return False


def log_to_stderr() -> None:
    """Lines with the time, of the server's or client's own doing."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    own = logging.getLogger("fleet.deploy")
    own.addHandler(handler)
    own.setLevel(logging.INFO)
    own.propagate = False
