"""What a device is about to take, on its disk before it takes it: a death tells the next round.

A process that the kernel ends for memory says nothing. So a training leaves a
mark before it begins and takes it away as it ends. Where the mark is still
there, the training was killed, and the rounds after it are planned within less
memory than it was to take: within 70 % at first, then, round by round that
goes well, within 5 % more, the slower the more often it was killed.

Not every death is one for memory. One that the device itself went through (a
power cut, a reboot) changes nothing. Where the kernel counts whom it killed for
memory and the count has not risen, a first death passes for a restart of the
service; a second in a row does not, as programs that watch memory kill too, and
nobody counts these. Nor does what ends a training that nobody waits for any more:
it hung, and the mark is taken away.
"""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from clients.memory import ClientMemory
from fleet.errors import ConfigError
from fleet.planner import MIB

PART = "attempt"  # of the memory
CUT = 0.7  # of what the killed training was to take
GROWTH = 0.05  # a round that goes well, divided by how often training was killed

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_VMSTAT = Path("/proc/vmstat")

# What PyTorch and oneDNN say where the system gives no more; CUDA's error has a class. Of what
# it cannot do oneDNN creates no "primitive descriptor".
_OUT_OF_MEMORY = re.compile(
    r"not enough memory|can't allocate memory|cannot allocate memory|bad_?alloc|out of memory"
    r"|could not create a primitive(?! desc)",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A training that is about to begin, as the plan has it.

    Attributes:
        server_round: of the task.
        blocks: k.
        batch_size: images a step.
        peak_bytes: predicted, beyond the loaded model.
        boot: id of the boot that the device runs since; empty where it cannot be told.
        oom_kills: of the kernel, since then; None where it does not count them.
    """

    server_round: int
    blocks: int
    batch_size: int
    peak_bytes: int
    boot: str = ""
    oom_kills: int | None = None


@dataclass(frozen=True, kw_only=True)
class Experience:
    """What a device has learnt in a run of the memory that it really has.

    Attributes:
        limit_bytes: within which the next training is planned; None: none is known.
        fatal_bytes: predicted for the training that was killed last.
        kills: trainings that memory ended, in this run.
        deaths: trainings in a row that did not end, whatever ended them.
        killed: whether the last training was ended by memory.
        attempt: the training that is under way, or did not end.
    """

    limit_bytes: int | None = None
    fatal_bytes: int = 0
    kills: int = 0
    deaths: int = 0
    killed: bool = False
    attempt: Attempt | None = None

    def after_death(self) -> "Experience":
        """What is learnt as a training is found that did not end."""
        rebooted = self.attempt.boot != boot_id()
        if rebooted:
            return replace(self, attempt=None, deaths=0, killed=False)
        before, now = self.attempt.oom_kills, oom_kills()
        restarted = before is not None and now == before and self.deaths == 0
        if restarted:
            return replace(self, attempt=None, deaths=1, killed=False)
        return self.after_kill()

    def after_kill(self) -> "Experience":
        """What is learnt from a training that memory ended."""
        tried = self.attempt.peak_bytes
        return Experience(
            limit_bytes=round(CUT * tried),
            fatal_bytes=tried,
            kills=self.kills + 1,
            deaths=self.deaths + 1,
            killed=True,
        )

    def after_success(self) -> "Experience":
        """What is learnt from a training that ended, or that found no plan within the limit."""
        limit = self.limit_bytes
        if limit is not None:
            limit = round(limit * (1 + GROWTH / self.kills))
            limit = limit if limit < self.fatal_bytes else None
        return replace(self, limit_bytes=limit, deaths=0, killed=False, attempt=None)

    def within(self, budget_bytes: int | None) -> int | None:
        """The smaller of a budget and the limit; None: there is neither."""
        return min((b for b in (budget_bytes, self.limit_bytes) if b is not None), default=None)

    def metrics(self) -> dict[str, int]:
        """For the server's record: nothing of a device that was never killed."""
        told = {"killed-before": 1} if self.killed else {}
        return told if self.limit_bytes is None else told | {"memory-limit-bytes": self.limit_bytes}


def recall(memory: ClientMemory) -> Experience:
    """What a client has learnt in a run, a training that did not end included.

    Raises:
        ConfigError: if the memory cannot be read or written.
    """
    learnt = _read(memory)
    if learnt.attempt is None:
        return learnt
    learnt = learnt.after_death()
    _write(memory, learnt)
    return learnt


@contextmanager
def attempting(
    memory: ClientMemory,
    learnt: Experience,
    attempt: Attempt,
    timeout: float = threading.TIMEOUT_MAX,
) -> Iterator[None]:
    """Mark a training as under way, on the disk, until it ends.

    Args:
        timeout: seconds that somebody waits for it; whatever ends it later says nothing
            of memory.

    Raises:
        ConfigError: if the system gave it no more memory; the next is planned smaller.
    """
    marked = replace(attempt, boot=boot_id(), oom_kills=oom_kills())
    under_way = replace(learnt, attempt=marked)
    _write(memory, under_way)
    try:
        with _unmarked_after(timeout, memory, learnt):
            yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            _write(memory, learnt)
            raise
        less = under_way.after_kill()
        _write(memory, less)
        raise ConfigError(
            f"training {attempt.blocks} blocks at batch {attempt.batch_size} ran out of memory "
            f"beyond {attempt.peak_bytes / MIB:.1f} MiB that were predicted; the next round is "
            f"planned within {less.limit_bytes / MIB:.1f} MiB: end what else runs on this device, "
            f"or lower budget-mib"
        ) from error
    except BaseException:  # an error of another kind, or a signal: it was not memory
        with suppress(ConfigError):  # the first error is the one to tell
            _write(memory, learnt)
        raise
    _write(memory, learnt.after_success())


@contextmanager
def _unmarked_after(timeout: float, memory: ClientMemory, learnt: Experience) -> Iterator[None]:
    """Take the mark away if the block takes longer: by a thread, as the block may hang."""

    def unmark() -> None:
        with suppress(ConfigError):  # a disk that is full: it is taken for killed, as it was
            _write(memory, learnt)

    timer = threading.Timer(min(timeout, threading.TIMEOUT_MAX), unmark)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def recover(memory: ClientMemory, learnt: Experience) -> None:
    """After a round in which no plan fitted the limit: the next may try a little more."""
    _write(memory, learnt.after_success())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the system gave no more memory."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, OSError | RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def boot_id() -> str:
    """Of the boot that this device runs since; empty where the system does not tell."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""


def oom_kills() -> int | None:
    """Processes that the kernel killed for memory since the boot; None where it does not tell."""
    try:
        lines = _VMSTAT.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def _read(memory: ClientMemory) -> Experience:
    found = memory.read(PART)
    if found is None:
        return Experience()
    try:
        values = json.loads(found.facts["experience"])
        attempt = values.pop("attempt")
        return Experience(**values, attempt=attempt and Attempt(**attempt))
    except (KeyError, TypeError, ValueError):  # of another version: it learns anew
        return Experience()


def _write(memory: ClientMemory, learnt: Experience) -> None:
    memory.write(PART, {}, {"experience": json.dumps(asdict(learnt))})
