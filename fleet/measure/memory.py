"""Bytes kept for backward, and the allocator's peak."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._C._profiler import _ExperimentalConfig
from torch.autograd import (
    ProfilerConfig,
    ProfilerState,
    _disable_profiler_legacy,
    _enable_profiler_legacy,
    _enable_record_function,
)


@dataclass
class SavedBytes:
    """Storages that autograd keeps for backward, in the order in which it kept them."""

    storages: dict[int, int] = field(default_factory=dict)  # storage → bytes

    @property
    def total(self) -> int:
        """Bytes, each storage counted once."""
        return sum(self.storages.values())


@contextmanager
def saved_for_backward(exclude: Iterable[Tensor] = ()) -> Iterator[SavedBytes]:
    """Count what autograd keeps while the block runs.

    Args:
        exclude: tensors that exist anyway, such as parameters and buffers.
    """
    known = {tensor.untyped_storage()._cdata for tensor in exclude}
    saved = SavedBytes()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # By the storage's own address: that of its bytes is 0 on device "meta".
        if storage._cdata not in known:
            saved.storages[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


@dataclass
class AllocatorPeak:
    """The most that was allocated at once, beyond what was there at the start."""

    bytes: int = 0


@contextmanager
def allocator_peak(device: torch.device | str = "cpu") -> Iterator[AllocatorPeak]:
    """Follow PyTorch's allocator while the block runs; read `.bytes` after it.

    On CUDA the allocator's own counters are read. On the CPU, which has none,
    a record of every allocation and release is summed up; other devices are
    not followed and give 0.
    """
    device = torch.device(device)
    peak = AllocatorPeak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
    elif device.type == "cpu":
        # The newer profiler counts the same, but costs 150 MB resident, which a small
        # device does not have to spare.
        config = ProfilerConfig(
            ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig()
        )
        _enable_profiler_legacy(config)
        # Allocations are recorded all the same; a record of every operation takes tens of MiB.
        _enable_record_function(False)
        try:
            yield peak
        finally:
            _enable_record_function(True)
            threads = _disable_profiler_legacy()
        peak.bytes = _highest_sum(threads)
    else:
        yield peak


def _highest_sum(threads: list) -> int:
    live = highest = 0
    for events in threads:
        for change in [e.cpu_memory_usage() for e in events if e.kind() == "memory_alloc"]:
            # Below nought only memory of before the start was released, which makes no room.
            live = max(0, live + change)
            highest = max(highest, live)
    return highest
