"""All methods side by side: which there are, and a table of what they cost."""

import platform
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fleet.backbones import Backbone
from fleet.measure.setup import Setup
from fleet.measure.step import Measurement
from fleet.plan import STASHES

_MIB = 2**20
_METHODS = (
    "full",
    "full+checkpoint",
    "blocks",
    "blocks+checkpoint",
    "blocks+frozen-norms",
    "bias-only",
    "shifts",
    "head",
)
COLUMNS = (
    "backbone",
    "method",
    "k",
    "stash",
    "from",
    "kept, MiB",
    "peak, MiB",
    "full ÷ peak",
    "blocks ÷ peak",
    "resident, MiB",
    "CPU s",
    "full ÷ CPU",
    "blocks ÷ CPU",
    "GFLOP",
    "trained, MiB",
)


def contenders(setup: Setup, backbone: Backbone) -> Iterator[Setup]:
    """The setup by every method, and `mobiletl` with every stash.

    Where a method leaves no block frozen the batch is made from images, cached or not.

    Raises:
        PlanError: for more blocks than there are.
    """
    ways = [(method, "recompute") for method in _METHODS]
    ways += [("mobiletl", stash) for stash in reversed(STASHES)]
    for method, stash in ways:
        one = replace(setup, method=method, stash=stash)
        yield replace(one, cached=setup.cached and one.model(backbone).freezes_blocks)


def rows(measurements: Sequence[Measurement]) -> Iterator[tuple[str, ...]]:
    """A row of texts for each measurement, as `COLUMNS` says.

    Ratios are to `full` and `blocks` of the same backbone: how many times less
    memory, or CPU, a method takes.
    """
    for m in measurements:
        same = {other.method: other for other in measurements if other.backbone == m.backbone}
        full, blocks = same.get("full"), same.get("blocks")
        yield (
            m.backbone,
            m.method,
            str(m.blocks) if m.blocks else "–",
            m.stash or "–",
            "cache" if m.cached else "images",
            _mib(m.saved_bytes),
            _mib(m.peak_bytes),
            _times(full and full.peak_bytes, m.peak_bytes),
            _times(blocks and blocks.peak_bytes, m.peak_bytes),
            _mib(m.resident_bytes),
            f"{m.cpu_seconds:.3g}",
            _times(full and full.cpu_seconds, m.cpu_seconds),
            _times(blocks and blocks.cpu_seconds, m.cpu_seconds),
            f"{m.flops / 1e9:.1f}",
            f"{m.trainable_bytes / _MIB:.2f}",
        )


def heading(setup: Setup) -> str:
    """What was run, on which machine, by which code."""
    facts = [
        f"{setup.image_size} px",
        f"batch {setup.batch_size}",
        f"weights {setup.weights}",
        "one thread" if setup.threads == 1 else f"{setup.threads} threads",
        f"torch {torch.__version__}",
        platform.machine(),
        _cpu(),
        f"commit {commit()}" if commit() else "",
    ]
    return ", ".join(filter(None, facts))


def _mib(size: int | None) -> str:
    return "–" if size is None else f"{size / _MIB:.1f}"


def _times(reference: float | None, value: float) -> str:
    return f"{reference / value:.3g}" if reference and value else "–"


def _cpu() -> str:
    """The processor's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    known = dict(line.split(":", 1) for line in lines if ":" in line)
    names = {key.strip(): value.strip() for key, value in known.items()}
    return names.get("model name") or names.get("Model") or ""


def commit() -> str:
    """Of the checkout that this file lies in; empty if it is installed."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip()
