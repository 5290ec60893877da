"""Runs of a job, each in a fresh process, and what they used up."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fleet.errors import ConfigError
from simulations.footprint import watching

_JOBS = Path(__file__).parent / "jobs"
_ROOT = Path(__file__).parents[2]
# Between two looks at memory. Each stops a process for some 10 ms: five a second took a
# sixth of what a start takes.
_PERIOD_SECONDS = 1.0


@dataclass(frozen=True)
class Job:
    """What all engines do.

    Attributes:
        title: its size.
        task: module in `jobs/`; empty of the command `fleet simulate`, which has its own.
        rounds: at whose ends it is looked at; between the last two it is in its steady state.
    """

    title: str
    task: str
    rounds: tuple[int, int, int]


JOBS = {
    "small": Job(
        "62,006 parameters, 100 clients × 50 images, 10 a round, batch 10",
        "small_task",
        (1, 5, 45),
    ),
    "mobilenet": Job(
        "MobileNetV2, 2,236,682 parameters, 20 clients × 8 images of 32 px, 5 a round, batch 4",
        "mobilenet_task",
        (1, 3, 23),
    ),
    "simulate": Job(
        "fleet simulate: pretrained EfficientNet-Lite0, MobileTL of one block, 2 clients × 50 "
        "digits of 32 px",
        "",
        (1, 3, 13),
    ),
}


@dataclass(frozen=True)
class Engine:
    """A way to run a job.

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
        import_seconds: of PyTorch and Flower, which are not counted.
        start_cpu_seconds: CPU of all processes until then, less that of these imports.
        job_seconds: from the start of the process to the end of the last round, imports
            included.
        job_cpu_seconds: until then, of all processes, imports included.
        peak_bytes: the most that all its processes were seen to hold at once; shared pages count
            once.
    """

    start_seconds: float
    cpu_seconds: float
    seconds: float
    result: float
    versions: Mapping[str, str]
    import_seconds: float
    start_cpu_seconds: float
    job_seconds: float
    job_cpu_seconds: float
    peak_bytes: int = 0


def engines(venvs: Path | None, job: Job = JOBS["small"]) -> list[Engine]:
    """Those that can run a job here; the plain loop first, where it is one."""
    found = [
        Engine("plain loop", sys.executable, ("loop_job.py", job.task)),
        Engine("ours", sys.executable, ("flower_job.py", job.task, "local", "1")),
        Engine("ours, two workers", sys.executable, ("flower_job.py", job.task, "local", "2")),
        Engine("Flower's (Ray)", sys.executable, ("flower_job.py", job.task, "flower", "1")),
    ]
    if not job.task:
        return [Engine("fleet simulate", sys.executable, ("simulate_job.py",))]
    if job != JOBS["small"]:  # the others' jobs know no other task
        return found
    for name, venv, words in (
        ("BlazeFL, serial", "blazefl", ("blazefl_job.py", "serial")),
        ("BlazeFL, two threads", "blazefl", ("blazefl_job.py", "threads")),
        ("pfl-research", "pfl", ("pfl_job.py",)),
    ):
        python = venvs / venv / "bin" / "python" if venvs else None
        if python is not None and python.is_file():
            found.append(Engine(name, str(python), words))
    return found


def run_job(engine: Engine, rounds: Sequence[int] = JOBS["small"].rounds) -> Cost:
    """One run in a process of its own.

    Raises:
        ConfigError: if it fails, with the last that it said.
    """
    script, *rest = engine.words
    paths = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
    started = time.time()
    run = subprocess.Popen(
        [engine.python, str(_JOBS / script), str(started), ",".join(map(str, rounds)), *rest],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with watching(run.pid, _PERIOD_SECONDS) as peak:
        stdout, stderr = run.communicate()
    lines = [line for line in stdout.splitlines() if line.startswith("REPORT ")]
    if run.returncode or not lines:
        raise ConfigError(f"{engine.name} failed: {(stderr or stdout)[-1500:]}")
    return replace(read_cost(json.loads(lines[-1].removeprefix("REPORT "))), peak_bytes=peak.pss)


def read_cost(report: Mapping) -> Cost:
    """What a job's report amounts to."""
    marks = {int(number): mark for number, mark in report["rounds"].items()}
    first, *_, last = sorted(marks)
    warm = sorted(marks)[-2]
    rounds, imports = last - warm, sum(report["imports"].values())
    return Cost(
        start_seconds=marks[first]["seconds"] - imports,
        cpu_seconds=(marks[last]["cpu"] - marks[warm]["cpu"]) / rounds,
        seconds=(marks[last]["seconds"] - marks[warm]["seconds"]) / rounds,
        result=report["result"],
        versions=report["versions"],
        import_seconds=imports,
        start_cpu_seconds=marks[first]["cpu"] - report["import_cpu"],
        job_seconds=marks[last]["seconds"],
        job_cpu_seconds=marks[last]["cpu"],
    )
