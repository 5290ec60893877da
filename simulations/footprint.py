"""What a process and all that it started hold: memory, open files, CPU time."""

import contextlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_PERIOD_SECONDS = 1.0  # a look takes some 10 ms for each process
# First line of a mapping in /proc/PID/smaps: where in which file; Source: proc(5).
_MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ \S+ ([0-9a-f]+ \S+ \d+)")


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


def resident_alone(pid: int | None = None) -> int:
    """Bytes that a process and its descendants hold on a machine where nobody else runs.

    PSS leaves to other programs their share of the pages of files that they have loaded
    too, as a server and further clients do on one machine. Here a part of a file counts
    once, with what the process that has most of it has; pages in no file are divided
    among those who share them.
    """
    anonymous, of_files = 0, {}
    for process in _family(pid):
        with contextlib.suppress(OSError):
            anonymous += _kibibytes(process.pid, "smaps_rollup").get("Pss_Anon", 0)
            for part, resident in _of_files(process.pid).items():
                of_files[part] = max(resident, of_files.get(part, 0))
    return 1024 * (anonymous + sum(of_files.values()))


def _of_files(pid: int) -> dict[str, int]:
    """Offset, device and inode of what a process has mapped → kB resident that are the file's."""
    found: dict[str, int] = {}
    part = ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if mapping := _MAPPING.match(line):
            part = "" if mapping[1].endswith(" 0") else mapping[1]  # inode 0: no file
        elif part and line.startswith("Rss:"):
            found[part] = found.get(part, 0) + int(line.split()[1])
        elif part and line.startswith("Anonymous:"):  # private copies of its pages
            found[part] -= int(line.split()[1])
    return found


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
    """The most that was seen at once, bytes: PSS, and as `resident_alone`."""

    pss: int = 0
    alone: int = 0


@contextlib.contextmanager
def watching(pid: int, period_seconds: float = _PERIOD_SECONDS) -> Iterator[Peak]:
    """Look at a process and its descendants again and again while the block runs."""
    peak, done = Peak(), threading.Event()

    def look() -> None:
        known = 0  # PSS as every mapping was read last, which takes several times as long
        while not done.is_set():
            now = footprint(pid).pss
            if now > 1.005 * known:
                known, peak.alone = now, max(peak.alone, resident_alone(pid))
            peak.pss = max(peak.pss, now)
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
