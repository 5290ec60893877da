"""Processes that are kept running, and that end with the one that keeps them.

A child runs in a session of its own, so that Ctrl-C reaches the supervisor alone;
what it prints goes into a log of bounded size. One that ends is started again:
at once at first, then after ever longer pauses, until it has run well for a while.
"""

import contextlib
import logging
import logging.handlers
import os
import re
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil

from fleet.errors import ConfigError

LOG_BYTES, LOG_FILES = 2_000_000, 3  # of each child, on a device's card
TAIL_LINES = 80
STOP_SECONDS = 12.0  # Flower forces its own end after 5 s

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")

_log = logging.getLogger(__name__)


@dataclass
class Backoff:
    """How long to wait before a child is started again.

    Attributes:
        first, most: seconds of the first pause and of the longest; each is twice the last.
        healthy: seconds of running after which the next pause is the first again.
    """

    first: float = 0.5
    most: float = 30.0
    healthy: float = 60.0
    _next: float = field(init=False, default=0.0)

    def pause(self, ran: float) -> float:
        """Seconds to wait after a child has ended that ran for so many."""
        if ran >= self.healthy or not self._next:
            self._next = self.first
        pause = self._next
        self._next = min(2 * self._next, self.most)
        return pause


@dataclass(frozen=True)
class Ending:
    """How a child ended.

    Attributes:
        code: its exit code; negative: the signal that killed it.
        ran: seconds.
        tail: the last lines that it printed.
    """

    code: int
    ran: float
    tail: tuple[str, ...]

    @property
    def how(self) -> str:
        """In words."""
        return f"was killed by signal {-self.code}" if self.code < 0 else f"ended with {self.code}"


class Verdict(Protocol):
    """What an ending means: its reason, in words, and the least pause before the next start."""

    reason: str
    pause: float


@dataclass(frozen=True)
class Child:
    """A process to keep running.

    Attributes:
        name: what to call it, also its log.
        command: makes its command line, anew for each start.
        environment: all of its variables.
        judge: says why it ended and how long to wait at least; None: nothing to say.
        hear: is given every line that it prints, in a thread of its own.
    """

    name: str
    command: Callable[[], Sequence[str]]
    environment: Mapping[str, str]
    judge: Callable[[Ending], Verdict | None] = lambda ending: None
    hear: Callable[[str], None] = lambda line: None
    backoff: Backoff = field(default_factory=Backoff)


class Supervisor:
    """Keeps children running for as long as it runs itself.

    Args:
        children: started in this order, ended in the opposite one.
        logs: folder of their logs.
        directory: their working directory.

    Raises:
        ConfigError: if the logs cannot be written.
    """

    def __init__(self, children: Sequence[Child], logs: Path, directory: Path) -> None:
        self._running = [_Running(child, logs, directory) for child in children]
        self._stop = threading.Event()

    def run(self, tick: Callable[[], None] = lambda: None, every: float = 0.5) -> None:
        """Start the children, and again whenever they end, until `stop` is called.

        Args:
            tick: called about once in `every` seconds; what it raises of FleetError's
                kind is its own to handle.
        """
        try:
            while not self._stop.is_set():
                for running in self._running:
                    running.keep()
                tick()
                self._stop.wait(every)
        finally:
            self.end()

    def stop(self) -> None:
        """Let `run` end its children and return; may be called from a signal's handler."""
        self._stop.set()

    def restart(self, name: str, reason: str) -> None:
        """Let a child be ended and started again, soon; may be called from any thread."""
        self._named(name).restart_for = reason

    def uptime(self, name: str) -> float | None:
        """Seconds that a child has been running; None while it is not."""
        running = self._named(name)
        return time.monotonic() - running.started if running.alive else None

    def starts(self, name: str) -> int:
        """How often a child was started so far."""
        return self._named(name).starts

    def end(self) -> None:
        """End all children and whatever they have started, the last first."""
        for running in reversed(self._running):
            running.end()

    def _named(self, name: str) -> "_Running":
        return next(running for running in self._running if running.child.name == name)


class _Running:
    """A child and its process."""

    def __init__(self, child: Child, logs: Path, directory: Path) -> None:
        self.child = child
        self.started = 0.0
        self.starts = 0
        self.start_at = 0.0  # not before; of the monotonic clock
        self.restart_for = ""
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._output: _Output | None = None
        self._log = _log_file(logs / f"{child.name}.log")

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def keep(self) -> None:
        """See whether it has ended, and start it if its time has come."""
        reason, self.restart_for = self.restart_for, ""
        if self.alive and reason:
            _log.warning("%s is started again: %s", self.child.name, reason)
            self.end()
            self.start_at = 0.0
        if self.alive:
            return
        if self._process is not None:
            self._has_ended()
        if time.monotonic() >= self.start_at:
            self._start()

    def end(self) -> None:
        """Ask it and all its descendants to end; make those that do not."""
        if self._process is None:
            return
        end_family(self._process)
        self._output.close()
        self._process = None

    def _start(self) -> None:
        try:
            self._process = subprocess.Popen(
                list(self.child.command()),
                cwd=self._directory,
                env=dict(self.child.environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:  # no memory, no such file
            pause = self.child.backoff.pause(0.0)
            _log.error("cannot start %s: %s; again in %.0f s", self.child.name, error, pause)
            self.start_at = time.monotonic() + pause
            return
        self._output = _Output(self._process, self._log, self.child.hear)
        self.started = time.monotonic()
        self.starts += 1
        if self.starts == 1:
            _log.info("%s is started (process %d)", self.child.name, self._process.pid)

    def _has_ended(self) -> None:
        ran = time.monotonic() - self.started
        end_family(self._process)  # what it has left behind
        tail = self._output.close()
        ending = Ending(self._process.returncode, ran, tail)
        self._process = None
        pause = self.child.backoff.pause(ran)
        verdict = self.child.judge(ending)
        reason = ending.how
        if verdict is not None:
            reason, pause = f"{reason}: {verdict.reason}", max(pause, verdict.pause)
        _log.warning("%s %s; started again in %.1f s", self.child.name, reason, pause)
        self.start_at = time.monotonic() + pause


class _Output:
    """Reads what a process prints: into its log, and the last lines to be told."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        log: logging.Handler,
        hear: Callable[[str], None],
    ) -> None:
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._pipe, self._log, self._hear = process.stdout, log, hear
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def close(self) -> tuple[str, ...]:
        """The last lines, once the process has ended."""
        # Someone whom it left behind may hold the pipe: that is not waited for.
        self._thread.join(timeout=2.0)
        return tuple(self._tail)

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError), self._pipe:
            for raw in self._pipe:
                line = _COLOURS.sub("", raw.decode(errors="replace")).rstrip()
                self._tail.append(line)
                self._log.handle(logging.makeLogRecord({"msg": line, "levelno": logging.INFO}))
                self._hear(line)


def end_family(process: subprocess.Popen[bytes], seconds: float = STOP_SECONDS) -> None:
    """Ask a process and all that it started to end; kill who does not within `seconds`.

    The session that it leads is asked too: a child whose parent has ended is no
    longer among its descendants.
    """
    family = _family(process)
    for member in family:
        with contextlib.suppress(psutil.Error):
            member.terminate()
    _, alive = psutil.wait_procs(family, timeout=seconds)
    for member in alive:
        with contextlib.suppress(psutil.Error):
            member.kill()
    psutil.wait_procs(alive, timeout=seconds)
    process.wait()


def _family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """A process, its descendants, and the others of the session that it leads."""
    family: dict[int, psutil.Process] = {}
    if process.returncode is None:  # else its number may be a stranger's by now
        with contextlib.suppress(psutil.Error):
            leader = psutil.Process(process.pid)
            family = {member.pid: member for member in (leader, *leader.children(recursive=True))}
    for other in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(other.pid) == process.pid:
                family.setdefault(other.pid, other)
    return [each for each in family.values() if each.pid != os.getpid()]


def _log_file(path: Path) -> logging.Handler:
    """A log of bounded size; a disk that is full costs lines, not the process."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.handlers.RotatingFileHandler(
            path, maxBytes=LOG_BYTES, backupCount=LOG_FILES - 1, encoding="utf-8", errors="replace"
        )
    except OSError as error:
        raise ConfigError(
            f"cannot write log {path}: {error.strerror}; give write permission there, or name "
            f"another folder with --state"
        ) from error
    handler.handleError = lambda record: None
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    return handler
