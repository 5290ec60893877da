"""Seconds and memory that aggregation takes, for every rule, of replies that lie in files.

python -m simulations.benchmark_aggregation

Every rule runs in a process of its own. `grew` is the most that was resident beyond what
was before the rule ran; `peak` is all of the process, PyTorch with it, which a server has
loaded too. NumPy's own mean over one array of all replies stands beside the rules, at a
size at which that array fits.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import click
import numpy as np

from fleet.measure.comparison import commit
from fleet.measure.resident import resident_growth
from fleet.plan import TensorSpec, UpdatePlan
from fleet.state import ClientUpdate, TrainableState
from strategies.aggregation import rule
from strategies.algorithm import compose
from strategies.server_opt import sgd

_MIB = 2**20
_RULES = (
    "mean",
    "trimmed_mean:0.2",
    "median",
    "clipped_mean",
    "mean+coverage",
    "multi_krum:100",
    "geometric_median:2",
)
_CLASSES = 10
_FEW = 100  # centred clipping keeps every client's momentum in memory: 8 GB of 1,000
_COLUMNS = ("rule", "replies", "floats each", "seconds", "CPU s", "grew, MiB", "peak, MiB")


class ReplyFile(Mapping[str, np.ndarray]):
    """One client's tensors in a file, end to end, of which each is read when asked for."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._path, self._shapes, self._starts = path, shapes, {}
        start = 0
        for name, shape in shapes.items():
            self._starts[name] = start
            start += 4 * int(np.prod(shape))

    def __getitem__(self, name: str) -> np.ndarray:
        shape, start = self._shapes[name], self._starts[name]
        flat = np.fromfile(self._path, np.float32, int(np.prod(shape)), offset=start)
        return flat.reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


@click.command()
@click.option("--replies", default=1000)
@click.option("--floats", default=1_000_000, help="of each reply")
@click.option("--tensors", default=40)
@click.option("--rule", "rules", multiple=True, help="default: all")
@click.option("--folder", type=click.Path(path_type=Path), help="for 4 bytes a float a reply")
@click.option("--one", is_flag=True, hidden=True, help="measure one rule in this process")
def main(
    replies: int, floats: int, tensors: int, rules: tuple[str, ...], folder: Path | None, one: bool
) -> None:
    """Print a Markdown table."""
    shapes = tensor_shapes(floats, tensors)
    if one:
        print(json.dumps(measure(rules[0], folder, replies, shapes)))
        return
    print(
        f"One BLAS thread, numpy {np.__version__}, {_processor()}, commit {commit()}; "
        f"tensors of {min(map(np.prod, shapes.values()))} to "
        f"{max(map(np.prod, shapes.values()))} float32, {tensors} a reply; "
        f"load of the last minute {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n"
    )
    print(f"| {' | '.join(_COLUMNS)} |")
    print(f"|{'---|' * len(_COLUMNS)}", flush=True)
    few = min(_FEW, replies)
    rows = [(name, replies) for name in rules or _RULES]
    if not rules:
        rows += [("centred_clipping", few), ("np.mean(np.stack)", few)]
    with tempfile.TemporaryDirectory(dir=folder) as directory:
        write_replies(Path(directory), replies, floats)
        for name, count in rows:
            cost = _measure_apart(name, Path(directory), count, floats, tensors)
            seconds, cpu, grew, peak = cost
            print(
                f"| {name} | {count} | {floats} | {seconds:.2f} | {cpu:.2f} | "
                f"{grew / _MIB:.0f} | {peak / _MIB:.0f} |",
                flush=True,
            )


def tensor_shapes(floats: int, tensors: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of tensors whose sizes span two orders of magnitude, as a CNN's do.

    The largest is a classifier's weight, and its bias is the last.
    """
    weights = np.geomspace(1, 100, tensors - 1)
    sizes = np.maximum(1, (weights / weights.sum() * floats).astype(int))
    features = sizes[-1] // _CLASSES - 1  # and one for the bias
    sizes[-2] += floats - sizes[:-1].sum() - (features + 1) * _CLASSES
    blocks = {f"blocks.{i}.weight": (int(size),) for i, size in enumerate(sizes[:-1])}
    return blocks | {"head.weight": (_CLASSES, int(features)), "head.bias": (_CLASSES,)}


def write_replies(directory: Path, replies: int, floats: int) -> None:
    """A file a client, of normally distributed values."""
    rng = np.random.default_rng(0)
    for i in range(replies):
        rng.standard_normal(floats, dtype=np.float32).tofile(directory / f"{i:05}")


def measure(
    name: str, directory: Path, replies: int, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[float, float, int, int]:
    """Wall and CPU seconds of a server step, and resident bytes: by how much more, and in all."""
    updates = [_update(directory / f"{i:05}", shapes, 10 + i % 90) for i in range(replies)]
    rng = np.random.default_rng(0)
    tensors = {n: rng.standard_normal(shape, dtype=np.float32) for n, shape in shapes.items()}
    state = TrainableState(updates[0].plan, tensors)
    algorithm = compose(rule("mean" if name.startswith("np.") else name), sgd())
    memory = algorithm.init(state)
    with resident_growth() as growth:
        started, cpu = time.perf_counter(), time.process_time()
        if name == "np.mean(np.stack)":
            flat = ([array.ravel() for array in update.delta.values()] for update in updates)
            everything = np.stack([np.concatenate(arrays) for arrays in flat])
            np.mean(everything, axis=0)
        else:
            algorithm.step(updates, state, memory)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return seconds, cpu, growth.bytes or 0, peak


def _update(path: Path, shapes: Mapping[str, tuple[int, ...]], num_examples: int) -> ClientUpdate:
    return ClientUpdate(
        client=path.name,
        plan=_plan(shapes),
        delta=ReplyFile(path, shapes),
        statistics={},
        num_examples=num_examples,
        loss=1.0,
        peak_bytes=0,
        seconds=0.0,
    )


def _plan(shapes: Mapping[str, tuple[int, ...]]) -> UpdatePlan:
    specs = [
        TensorSpec(name=n, shape=s, role="bias" if n.endswith("bias") else "weight", depth=0)
        for n, s in shapes.items()
    ]
    return UpdatePlan(
        backbone="benchmark",
        preprocessing={},
        step_digests={},
        weights_digest="0" * 64,
        method="head",
        blocks=0,
        train_tail=False,
        specs=tuple(specs),
    )


def _measure_apart(
    name: str, directory: Path, replies: int, floats: int, tensors: int
) -> tuple[float, float, int, int]:
    """`measure` in a fresh process."""
    words = [sys.executable, "-m", "simulations.benchmark_aggregation", "--one", "--rule", name]
    words += ["--replies", str(replies), "--floats", str(floats), "--tensors", str(tensors)]
    done = subprocess.run(
        [*words, "--folder", str(directory)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise click.ClickException(f"{name} failed: {done.stderr.strip().splitlines()[-1:]}")
    return tuple(json.loads(done.stdout))


def _processor() -> str:
    """The processor's name where the system tells it, as partition uses what it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
        return f"{name} ({platform.machine()})"
    except (OSError, StopIteration):
        return platform.machine()


if __name__ == "__main__":
    main()
