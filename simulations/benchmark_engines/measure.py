"""Runs of the small job, each in a fresh process, and what they used up."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fleet.errors import ConfigError

_JOBS = Path(__file__).parent / "jobs"
_ROOT = Path(__file__).parents[2]
FIRST, WARM, LAST = 1, 5, 45  # rounds at whose ends a job is looked at


@dataclass(frozen=True)
class Engine:
    """A way to run the job.

    Attributes:
        name: as the table shows it.
        python: interpreter.
        words: of the command, behind it.
    """

    name: str
    python: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Cost:
    """Of one run.

    Attributes:
        start_seconds: from the start of the process to the end of round 1, less the imports
            of PyTorch and Flower.
        cpu_seconds: a round in the steady state, of all processes.
        seconds: a round in the steady state, by the clock.
        result: loss of the last network over all images.
        versions: of what it ran on.
    """

    start_seconds: float
    cpu_seconds: float
    seconds: float
    result: float
    versions: Mapping[str, str]


def engines(venvs: Path | None) -> list[Engine]:
    """Those that can be run here; the plain loop first."""
    found = [
        Engine("plain loop", sys.executable, ("loop_job.py",)),
        Engine("ours", sys.executable, ("flower_job.py", "local")),
        Engine("Flower's (Ray)", sys.executable, ("flower_job.py", "flower")),
    ]
    for name, venv, words in (
        ("BlazeFL, serial", "blazefl", ("blazefl_job.py", "serial")),
        ("BlazeFL, two threads", "blazefl", ("blazefl_job.py", "threads")),
        ("pfl-research", "pfl", ("pfl_job.py",)),
    ):
        python = venvs / venv / "bin" / "python" if venvs else None
        if python is not None and python.is_file():
            found.append(Engine(name, str(python), words))
    return found


def run_job(engine: Engine, rounds: Sequence[int] = (FIRST, WARM, LAST)) -> Cost:
    """One run in a process of its own.

    Raises:
        ConfigError: if it fails, with the last that it said.
    """
    script, *rest = engine.words
    paths = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
    started = time.time()
    done = subprocess.run(
        [engine.python, str(_JOBS / script), str(started), ",".join(map(str, rounds)), *rest],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("REPORT ")]
    if done.returncode or not lines:
        raise ConfigError(f"{engine.name} failed: {(done.stderr or done.stdout)[-1500:]}")
    return read_cost(json.loads(lines[-1].removeprefix("REPORT ")))


def read_cost(report: Mapping) -> Cost:
    """What a job's report amounts to."""
    marks = {int(number): mark for number, mark in report["rounds"].items()}
    first, *_, last = sorted(marks)
    warm = sorted(marks)[-2]
    rounds = last - warm
    return Cost(
        start_seconds=marks[first]["seconds"] - sum(report["imports"].values()),
        cpu_seconds=(marks[last]["cpu"] - marks[warm]["cpu"]) / rounds,
        seconds=(marks[last]["seconds"] - marks[warm]["seconds"]) / rounds,
        result=report["result"],
        versions=report["versions"],
    )
