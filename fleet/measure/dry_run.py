"""What a training step will need, found out by running its own code without data.

Every tensor of the run is on PyTorch's device "meta": it has a shape and a
layout, but no memory. So the step goes through the very operations that
training goes through, allocates nothing and takes a fraction of the time.
"""

import copy
import sys
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fleet.backbones import Backbone
from fleet.features import run_in_parts
from fleet.measure.flops import FlopCount
from fleet.measure.memory import saved_for_backward
from fleet.measure.scratch import scratch_bytes
from fleet.measure.shapes import shape_only
from fleet.mobiletl import TransferModel
from fleet.mobiletl.chunks import room
from fleet.optim import SGD
from fleet.plan import UpdatePlan


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What one training step needs; bytes beyond the loaded model, FLOPs of the batch.

    Attributes:
        peak_bytes: the most that lives at once, the batch and momentum among it.
        peak_in: what takes it: the frozen part, forward or backward.
        saved_bytes: kept for backward after the forward pass, beside the batch.
        flops_prefix: of the frozen part; 0 if its output is cached.
        flops_forward: of the rest, up to the loss.
        flops_backward: of backward, what it computes anew included.
    """

    peak_bytes: int
    peak_in: str
    saved_bytes: int
    flops_prefix: int
    flops_forward: int
    flops_backward: int


def dry_run(
    backbone: Backbone,
    plan: UpdatePlan,
    stash: str = "recompute",
    *,
    batch_size: int,
    cached: bool = False,
    momentum: float = 0.9,
    momentum_dtype: torch.dtype = torch.float32,
    proximal: bool = False,
    cut: int | None = None,
) -> StepCost:
    """Predict any but the first training step of a plan on the CPU; nothing trains.

    The first has no momentum yet, and needs less. `python -m
    simulations.benchmark_planner` holds predictions against steps that run.
    Not foreseen is what depends on values: branches that stochastic depth
    drops, and norms with scales near nought, cost `recompute` a little more.

    Args:
        backbone: tells classes and image size; is not touched.
        stash: as `TransferModel` takes it.
        batch_size: images.
        cached: the frozen part's output is there; else images are run, two at
            a time.
        momentum: of the optimiser; 0 keeps no buffers.
        momentum_dtype: of its buffers.
        proximal: the objective has a proximal term, on what travels.
        cut: as `TransferModel` takes it.
    """
    twin = weightless(backbone)
    model = TransferModel(twin, plan, stash, cut)
    cached = cached and model.freezes_blocks
    with _Ledger([]) as unasked:
        like = _run_images(model, 1, unasked) if cached else None
    labels = torch.empty(batch_size, dtype=torch.long, device="meta")
    there = [labels, *twin.model.parameters(), *twin.model.buffers()]
    with _Ledger(there) as ledger:
        optimizer = SGD(
            model.trainable_parameters(),
            1.0,
            momentum=momentum,
            momentum_dtype=momentum_dtype,
            proximal=float(proximal),
            targets=_targets(model) if proximal else (),
        )
        for parameter in optimizer.parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()  # makes the buffers
        ledger.highest, ledger.total = 0, 0
        ledger.phase = "the frozen part"
        x = room(like, batch_size) if cached else _run_images(model, batch_size, ledger)
        flops_prefix = ledger.total
        ledger.phase = "forward"
        with saved_for_backward(exclude=[x, *there]) as saved:
            loss = F.cross_entropy(model.from_features(x), labels)
        flops_forward = ledger.total - flops_prefix
        ledger.phase = "backward"
        with optimizer.stepping_in_backward():
            loss.backward()
        flops_backward = ledger.total - flops_prefix - flops_forward
    return StepCost(
        peak_bytes=ledger.highest,
        peak_in=ledger.peak_in,
        saved_bytes=saved.total,
        flops_prefix=flops_prefix,
        flops_forward=flops_forward,
        flops_backward=flops_backward,
    )


def _targets(model: TransferModel) -> list[Tensor | None]:
    """Room for what a proximal term keeps beside the parameters."""
    travels = model.plan.by_name
    named = model.trainable_by_name().items()
    return [torch.empty_like(p.detach()) if name in travels else None for name, p in named]


def _run_images(model: TransferModel, batch_size: int, ledger: "_Ledger") -> Tensor:
    """Features as `FeatureSource` makes them of a batch of images.

    Beside the second couple of images there is room for the whole batch; those that follow
    need no more, and are counted without being run.
    """
    size = model.backbone.preprocessing.image_size
    runs, y, flops = 0, None, 0  # of the latest couple that was run

    def features(x: Tensor) -> Tensor:
        nonlocal runs, y, flops
        if runs < 2 or len(x) != len(y):
            before = ledger.total
            y = model.features(x)
            runs, flops = runs + 1, ledger.total - before
        else:
            ledger.total += flops
        return y

    def images(part: slice) -> Tensor:
        shape = (part.stop - part.start, 3, size, size)
        return torch.empty(shape, device="meta").contiguous(memory_format=torch.channels_last)

    return run_in_parts(features, batch_size, images)


def weightless(backbone: Backbone) -> Backbone:
    """A copy of a backbone whose parameters and buffers have no memory (device "meta")."""
    twins: dict[int, Any] = {}
    for parameter in backbone.model.parameters():
        twin = nn.Parameter(_without_memory(parameter), requires_grad=parameter.requires_grad)
        twins[id(parameter)] = twin
    for buffer in backbone.model.buffers():
        twins[id(buffer)] = _without_memory(buffer)
    return copy.deepcopy(backbone, twins)


def _without_memory(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


class _Ledger(FlopCount):
    """Bytes of the storages that live at once, in the order in which they come and go."""

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()
        self.highest = 0
        self.phase = self.peak_in = ""
        self._live = 0
        self._known: dict[int, Any] = {t.untyped_storage()._cdata: None for t in there}

    def run(self, func: Any, args: tuple, kwargs: Mapping) -> Any:
        """Run on shapes alone; book the results, and what the operation needs meanwhile."""
        if func is torch.ops.aten.add.Tensor and (total := _gathered(args)) is not None:
            return total
        out = shape_only(func, args, kwargs)
        if func is torch.ops.aten.empty_like.default and kwargs.get("device") is not None:
            return out  # asked for without memory: the code remembers a layout
        self._book(out)
        needed = self._live + scratch_bytes(func, args, out)
        if needed > self.highest:
            self.highest, self.peak_in = needed, self.phase
        return out

    def _book(self, out: Any) -> None:
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if not isinstance(tensor, Tensor) or tensor.device.type != "meta":
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known:
                self._live += size
                self._known[key] = weakref.ref(storage, self._forget(key, size))

    def _forget(self, key: int, size: int) -> Any:
        def forget(_: Any) -> None:
            del self._known[key]
            self._live -= size

        return forget


def _gathered(args: tuple) -> Tensor | None:
    """The summand that autograd would add into, if it is autograd that adds.

    Where gradients of one tensor meet, its engine adds in place to one that it
    alone holds, but not while operations are watched. Should another PyTorch
    count holders differently, no sum is in place and the peak rather too high.
    """
    caller = sys._getframe(3).f_code.co_name  # of `__torch_dispatch__`
    if caller != "_engine_run_backward" or torch.is_grad_enabled():
        return None
    for summand in args[:2]:
        holders = getattr(summand, "_use_count", int)()
        storage_holders = torch._C._storage_Use_Count(summand.untyped_storage()._cdata)
        if (holders, storage_holders) == (_HOLDERS, 2) and 0 not in summand.stride():
            return summand
    return None


# Of a tensor that only the engine holds, while an operation on it is watched: measured.
_HOLDERS = 4
