"""What a job has used up at the ends of some rounds: time, and CPU of all its processes."""

import json
import sys
import time
from collections.abc import Callable, Mapping

import psutil


def tree_cpu_seconds() -> float:
    """CPU of this process and of all that it started, living and waited for."""
    me = psutil.Process()
    seconds = 0.0
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        seconds += times.user + times.system + times.children_user + times.children_system
    return seconds


class Marks:
    """Notes a job's rounds, and prints them for the benchmark to read.

    A job is called with the time of its start, and the rounds at whose ends to look, the
    last of which is its last.
    """

    def __init__(self, arguments: list[str] | None = None) -> None:
        words = sys.argv[1:] if arguments is None else arguments
        self.started = float(words[0])
        self.rounds = sorted(int(word) for word in words[1].split(","))
        self.rest = words[2:]
        self._imports: dict[str, float] = {}
        self._import_cpu = 0.0
        self._noted: dict[int, dict[str, float]] = {}

    @property
    def last(self) -> int:
        """How many rounds to run."""
        return self.rounds[-1]

    def imported(self, name: str, load: Callable[[], object]) -> None:
        """Time an import that every engine has to make, and that is not counted as its start."""
        began, used = time.perf_counter(), time.process_time()
        load()
        self._imports[name] = time.perf_counter() - began
        self._import_cpu += time.process_time() - used

    def note(self, server_round: int) -> None:
        """Called at the end of every round, counted from 1."""
        if server_round in self.rounds and server_round not in self._noted:
            seconds = time.time() - self.started
            self._noted[server_round] = {"seconds": seconds, "cpu": tree_cpu_seconds()}

    def report(self, result: float, versions: Mapping[str, str]) -> None:
        """Print what was noted; `result` shows whether engines computed the same."""
        row = {"imports": self._imports, "rounds": self._noted, "result": result}
        row["import_cpu"] = self._import_cpu
        print("REPORT " + json.dumps(row | {"versions": dict(versions)}), flush=True)
