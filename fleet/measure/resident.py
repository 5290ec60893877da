"""How much a process grows as it trains: what a device without swap has to have.

Beyond what PyTorch allocates that is memory that the C library does not give
back, scratch memory of the conv kernels and pages of code that run first.
Measured in a process of its own, in which nothing has run before:

python -m fleet.measure.resident '{"backbone": "mobilenet_v2", "method": "mobiletl", …}'
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fleet.baselines import BASELINES
from fleet.errors import ConfigError
from fleet.heap import reuse
from fleet.measure.setup import Setup, Subject

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_STEPS = 3
# The kernel's counters lag behind by some pages.
_TOLERANCE = 2**20


@dataclass
class ResidentGrowth:
    """The most that was resident at once beyond what was at the start; None if not known."""

    bytes: int | None = None


@contextmanager
def resident_growth() -> Iterator[ResidentGrowth]:
    """Follow this process's resident memory while the block runs; read `.bytes` after it.

    Linux keeps the highest value and lets a process reset it. Other systems,
    and containers that forbid it, give None.

    Source: proc_pid_clear_refs(5), proc_pid_status(5).
    """
    growth, before = ResidentGrowth(), _reset()
    yield growth
    if before is not None:
        growth.bytes = max(0, _read("VmHWM") - before)


def resident_bytes(setup: Setup) -> int | None:
    """Growth of a fresh process over its first training steps, in bytes; None if not known.

    Raises:
        ConfigError: if the process ends without an answer, as one does that
            needs more memory than there is.
    """
    if not _CLEAR.exists():
        return None
    done = subprocess.run(
        [sys.executable, "-m", "fleet.measure.resident", json.dumps(asdict(setup))],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": str(setup.threads)},
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise ConfigError(
            f"the process that trains by {setup.method} to measure its growth failed: {last[0]}; "
            f"lower batch-size or image-size, or leave it out with --no-resident"
        )
    return json.loads(done.stdout)


def _reset() -> int | None:
    """Bytes that are resident, from which on the highest value counts anew."""
    try:
        _CLEAR.write_text("5")
        before = _read("VmRSS")
        return before if _read("VmHWM") - before < _TOLERANCE else None
    except (OSError, KeyError):
        return None


def _read(field: str) -> int:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def _main(words: str) -> None:
    setup = Setup(**json.loads(words))
    torch.set_num_threads(setup.threads)
    if setup.method in BASELINES:
        # PyTorch's checkpoint does so at its first call; imports are no part of what a step takes.
        importlib.import_module("torch._dynamo")
    subject = Subject(setup, setup.load())
    reuse()  # as `train_locally`
    with resident_growth() as growth:
        for _ in range(_STEPS):
            subject.step()
    print(json.dumps(growth.bytes))


if __name__ == "__main__":
    _main(sys.argv[1])
