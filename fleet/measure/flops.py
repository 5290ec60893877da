"""Floating-point operations of what really runs, counted from shapes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten


@contextmanager
def count_flops() -> Iterator["FlopCount"]:
    """Count the convolutions and matrix products that run while the block is open.

    Two operations a multiply-add, forward and backward alike: inside autograd
    functions, under `inference_mode`, on any device, on tensors without storage
    too. What a conv multiplies with its padding counts. Element-by-element
    operations, norms and pooling do not. `torch.utils.flop_counter` of PyTorch
    2.14 takes the weight gradient of a grouped conv for that of a dense one.
    """
    with FlopCount() as count:
        yield count


class FlopCount(TorchDispatchMode):
    """Sees every operation below autograd; `total` is what `count_flops` counts."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: PyTorch would import `torch._dynamo` for it, and ask it at every operation."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: Mapping | None = None
    ) -> Any:
        if _is_composite(func):  # inference_mode hands over the whole, of which the parts count
            with self:
                return func.decompose(*args, **(kwargs or {}))
        out = self.run(func, args, kwargs or {})
        if (flops := _FLOPS.get(func)) is not None:
            self.total += flops(args, out)
        return out

    def run(self, func: Any, args: tuple, kwargs: Mapping) -> Any:
        """Run one operation; for who counts more than its FLOPs."""
        return func(*args, **kwargs)


_composite: dict[Any, bool] = {}


def _is_composite(func: Any) -> bool:
    """Whether the CPU knows an operation only as made of others."""
    if func not in _composite:
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        keys = torch._C.DispatchKey
        _composite[func] = (
            func not in _FLOPS
            and has(func.name(), keys.CompositeImplicitAutograd)
            and not has(func.name(), keys.CPU)
        )
    return _composite[func]


def _convolution(args: tuple, out: Tensor) -> int:
    x, weight, transposed = args[0], args[1], args[6]
    return _conv_flops(x if transposed else out, weight)


def _convolution_backward(args: tuple, out: tuple[Tensor | None, ...]) -> int:
    """As much as forward for the input's gradient, and again for the weight's."""
    d_out, x, weight, transposed, mask = args[0], args[1], args[2], args[7], args[10]
    return (mask[0] + mask[1]) * _conv_flops(x if transposed else d_out, weight)


def _conv_flops(small: Tensor, weight: Tensor) -> int:
    """Every element on the side that a kernel is summed to takes a filter's multiply-adds.

    `weight` is (outputs, inputs / groups, …); of a transposed conv the names change sides.
    """
    return 2 * small.numel() * weight[0].numel()


def _product(left: int) -> Callable[[tuple, Tensor], int]:
    """Rows times columns; `left` is the position of the left factor, whose rows are summed."""
    return lambda args, out: 2 * out.numel() * args[left].shape[-1]


_FLOPS: dict[Any, Callable[[tuple, Any], int]] = {
    _aten.convolution.default: _convolution,
    _aten.convolution_overrideable.default: _convolution,
    _aten.convolution_backward.default: _convolution_backward,
    _aten.mm.default: _product(0),
    _aten.bmm.default: _product(0),
    _aten.addmm.default: _product(1),
    _aten.addmm_.default: _product(1),
    _aten.baddbmm.default: _product(1),
    _aten.mv.default: _product(0),
    _aten.addmv.default: _product(1),
    _aten.dot.default: lambda args, out: 2 * args[0].numel(),
}
