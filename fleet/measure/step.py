"""What a training step costs by any method: bytes kept, peaks, FLOPs and CPU seconds."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fleet.backbones import Backbone
from fleet.errors import ConfigError
from fleet.heap import reuse
from fleet.measure.flops import count_flops
from fleet.measure.memory import allocator_peak
from fleet.measure.resident import resident_bytes
from fleet.measure.setup import Setup, Subject


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a training step on the CPU costs, and of what; `fleet measure` prints it as JSON.

    All bytes are beyond the loaded model; the batch is among them.

    Attributes:
        saved_bytes: the most that autograd keeps at once for backward.
        peak_bytes: most that PyTorch's allocator held at once over two steps;
            from the second on there is momentum.
        resident_bytes: growth of a fresh process over its first three steps;
            None where the system does not tell.
        cpu_seconds: of all threads for one step, from images or from the cache.
        flops: of one step, all its parts together.
        trainable_bytes: of the plan's tensors in float32.
        flops_prefix: of the frozen half; 0 if its output is cached.
        flops_forward: of the trained half up to the loss.
        flops_backward: of backward, what it computes anew included.
        blocks: as the method trained; all of them for `full`.
        stash: of `mobiletl`; None for others.
    """

    saved_bytes: int
    peak_bytes: int
    resident_bytes: int | None
    cpu_seconds: float
    flops: int
    trainable_bytes: int
    flops_prefix: int
    flops_forward: int
    flops_backward: int
    backbone: str
    method: str
    blocks: int
    stash: str | None
    batch_size: int
    image_size: int
    num_classes: int
    weights: str
    cached: bool
    threads: int


def measure(
    setups: Sequence[Setup],
    backbone: Backbone,
    *,
    repetitions: int = 5,
    resident: bool = True,
    on_progress: Callable[[str], None] = lambda text: None,
) -> list[Measurement]:
    """Measure a training step of each setup, side by side.

    Steps are timed in turn, one of each setup after the other, and the fastest
    of each counts: what else the machine does then meets all alike.

    Args:
        setups: of one backbone, with equal threads.
        backbone: what their `load` returns; trains in place.
        repetitions: steps that are timed, of each.
        resident: measure `resident_bytes`, which takes a process each.
        on_progress: is told what is about to be measured.

    Raises:
        ConfigError: as `Subject`; or if a batch of one image is too little.
        PlanError: for more blocks than there are.
    """
    shapes: dict[int, tuple[int, ...]] = {}
    subjects = [Subject(setup, backbone, shapes) for setup in setups]
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        try:
            torch.set_num_threads(setups[0].threads)
            found = []
            for subject in subjects:
                on_progress(f"{label(subject.setup)}: bytes and FLOPs")
                found.append(_bytes_and_flops(subject))
            seconds = _cpu_seconds(subjects, repetitions, on_progress)
        finally:
            torch.set_num_threads(threads)
    measurements = []
    for subject, costs, fastest in zip(subjects, found, seconds, strict=True):
        growth = None
        if resident:
            on_progress(f"{label(subject.setup)}: resident growth")
            growth = resident_bytes(subject.setup)
        measurements.append(
            Measurement(
                **costs, **_what(subject), resident_bytes=growth, cpu_seconds=round(fastest, 4)
            )
        )
    return measurements


def label(setup: Setup) -> str:
    """A setup's method, with the stash where there is one."""
    return f"{setup.method} {setup.stash}" if setup.method == "mobiletl" else setup.method


def _what(subject: Subject) -> dict:
    setup, plan = subject.setup, subject.model.plan
    return {
        "trainable_bytes": plan.nbytes,
        "backbone": setup.backbone,
        "method": setup.method,
        "blocks": plan.blocks,
        "stash": setup.stash if setup.method == "mobiletl" else None,
        "batch_size": setup.batch_size,
        "image_size": setup.image_size,
        "num_classes": setup.num_classes,
        "weights": setup.weights,
        "cached": setup.cached,
        "threads": setup.threads,
    }


def _bytes_and_flops(subject: Subject) -> dict[str, int]:
    subject.ready()
    try:
        flops = _flops(subject)
    except ValueError as error:  # of batch norm: one value a channel has no variance
        if subject.setup.batch_size > 1:
            raise
        raise ConfigError(
            f"{subject.setup.method} cannot train on a batch of one image of "
            f"{subject.setup.image_size} pixels: {error}; raise batch-size or image-size"
        ) from error
    saved = _saved_bytes(subject)
    with allocator_peak() as peak:
        subject.step()
        subject.step()
    return {"saved_bytes": saved, "peak_bytes": peak.bytes, **flops}


def _flops(subject: Subject) -> dict[str, int]:
    """Of one step; its forward pass runs twice, to tell it from backward."""
    model, labels = subject.model, subject.labels
    with count_flops() as prefix:
        x = subject.batch()
    with count_flops() as forward:
        F.cross_entropy(model.from_features(x), labels)
    with count_flops() as both:
        model.gradients(x, labels)
    model.zero_grad(set_to_none=True)
    return {
        "flops": prefix.total + both.total,
        "flops_prefix": prefix.total,
        "flops_forward": forward.total,
        "flops_backward": both.total - forward.total,
    }


def _cpu_seconds(
    subjects: Sequence[Subject], repetitions: int, on_progress: Callable[[str], None]
) -> list[float]:
    """Of the fastest step of each."""
    reuse()  # as `train_locally`
    seconds = [float("inf")] * len(subjects)
    for repetition in range(repetitions):
        on_progress(f"CPU seconds, {repetition + 1} of {repetitions}")
        for i, subject in enumerate(subjects):
            subject.ready()
            started = time.process_time()
            subject.step()
            seconds[i] = min(seconds[i], time.process_time() - started)
    return seconds


def _saved_bytes(subject: Subject) -> int:
    model = subject.model
    x = subject.batch()
    with _saved_at_once([*model.model.parameters(), *model.model.buffers()]) as saved:
        model.gradients(x, subject.labels)
    model.zero_grad(set_to_none=True)
    return saved.highest


class _Saved:
    """Bytes of the storages that autograd holds, and the most that they came to."""

    def __init__(self, exclude: Iterable[Tensor]) -> None:
        self.highest = 0
        self._live = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in exclude}
        self._holders: Counter[int] = Counter()  # storage → saved tensors that share it

    def add(self, key: int, size: int) -> None:
        self._holders[key] += 1
        if self._holders[key] == 1 and key not in self._known:
            self._live += size
            self.highest = max(self.highest, self._live)

    def drop(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key] and key not in self._known:
            self._live -= size


class _Held:
    """A saved tensor; it goes when autograd lets go of it."""

    def __init__(self, tensor: Tensor, saved: _Saved) -> None:
        storage = tensor.untyped_storage()
        self.tensor, self._saved = tensor, saved
        self._entry = (storage._cdata, storage.nbytes())
        saved.add(*self._entry)

    def __del__(self) -> None:
        self._saved.drop(*self._entry)


@contextmanager
def _saved_at_once(exclude: Iterable[Tensor]) -> Iterator[_Saved]:
    """Follow what autograd keeps, through as many forward and backward passes as there are.

    What backward saves while it computes something anew does not count.
    """
    saved = _Saved(exclude)

    def pack(tensor: Tensor) -> Tensor | _Held:
        inside_backward = torch._C._current_graph_task_id() != -1
        return tensor if inside_backward else _Held(tensor, saved)

    def unpack(packed: Tensor | _Held) -> Tensor:
        return packed.tensor if isinstance(packed, _Held) else packed

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield saved
