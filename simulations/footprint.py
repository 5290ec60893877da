"""What a process and all that it started hold: memory, open files, CPU time."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_PERIOD_SECONDS = 1.0  # a look takes some 10 ms for each process


@dataclass(frozen=True)
class Footprint:
    """Of a process and its descendants, at one moment.

    Attributes:
        pss: proportional set size, bytes: shared pages are divided by those who share them,
            be they of this family or not.
        anonymous: of these, pages that lie in no file. They are shared within the family alone,
            so that what other programs load and leave does not show.
        files: open file descriptors.
        cpu_seconds: of all, those that have ended and were waited for included.
        processes: how many there are.
    """

    pss: int
    anonymous: int
    files: int
    cpu_seconds: float
    processes: int


def footprint(pid: int | None = None) -> Footprint:
    """Of the process of that id; None: of this one. What ends meanwhile is left out."""
    pss = anonymous = files = processes = 0
    cpu_seconds = 0.0
    for process in _family(pid):
        with contextlib.suppress(psutil.NoSuchProcess, OSError):
            times = process.cpu_times()
            cpu = times.user + times.system + times.children_user + times.children_system
            opened, held = process.num_fds(), _kibibytes(process.pid, "smaps_rollup")
            pss += 1024 * held.get("Pss", 0)
            anonymous += 1024 * held.get("Pss_Anon", 0)
            files, cpu_seconds, processes = files + opened, cpu_seconds + cpu, processes + 1
    return Footprint(pss, anonymous, files, cpu_seconds, processes)


def bound_on_peak(pid: int | None = None) -> int:
    """Bytes that a process and its descendants cannot have exceeded, pages that they share aside.

    The sum of what each held at most, by the kernel's own count: they need not have held
    it at once, and shared pages count once for each.
    """
    total = 0
    for process in _family(pid):
        with contextlib.suppress(OSError):
            total += 1024 * _kibibytes(process.pid, "status").get("VmHWM", 0)
    return total


@dataclass
class Peak:
    """The most that was seen at once, bytes."""

    pss: int = 0


@contextlib.contextmanager
def watching(pid: int, period_seconds: float = _PERIOD_SECONDS) -> Iterator[Peak]:
    """Look at a process and its descendants again and again while the block runs."""
    peak, done = Peak(), threading.Event()

    def look() -> None:
        while not done.is_set():
            peak.pss = max(peak.pss, footprint(pid).pss)
            done.wait(period_seconds)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def _kibibytes(pid: int, file: str) -> dict[str, int]:
    """Lines of /proc/PID/FILE that are a name and a number of kB; Source: proc(5)."""
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    words = (line.split() for line in lines)
    return {each[0].rstrip(":"): int(each[1]) for each in words if each[-1:] == ["kB"]}


def _family(pid: int | None) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
