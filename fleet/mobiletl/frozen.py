"""Parts of which nothing trains: norms folded into convs; a tail through which gradients pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fleet.mobiletl.chunks import images_in_chunk
from fleet.mobiletl.convolution import Convolution
from fleet.mobiletl.functional import activate, activation_backward, gradients_from, is_clamp
from fleet.structure import InvertedResidual, Step, Unit, squeeze_excite

Part = InvertedResidual | Unit | Step


def run_frozen(parts: Sequence[Part], x: Tensor) -> Tensor:
    """What parts make of x in eval mode.

    Autograd passes through; what it keeps is stock PyTorch's. The steps
    between the parts may work in place, on x too.
    """
    for part in parts:
        if isinstance(part, InvertedResidual):
            y = x
            for unit in part.units:
                y = _run_unit(unit, y)
            x = _add(y, x) if part.residual else y
        else:
            x = _run_unit(part, x) if isinstance(part, Unit) else part.forward(x)
    return x


def frozen_tail(parts: Sequence[Part], x: Tensor) -> Tensor:
    """Run the parts above all that train, a few images at a time.

    Args:
        x: (N, C, H, W) or (N, C).

    Returns:
        What the parts make of x. Kept for backward: x, from which each chunk
        of images runs again.
    """
    return _FrozenTail.apply(x, parts)


class _FrozenTail(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Sequence[Part]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.parts = parts
        # A step may be an activation in place, and x is not ours.
        return torch.cat([run_frozen(parts, part.clone()) for part in x.split(images_in_chunk(x))])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        chunk, dx = images_in_chunk(x), torch.empty_like(x)
        for part, d_out, into in zip(*(t.split(chunk) for t in (x, grad, dx)), strict=True):
            into.copy_(_backward(ctx.parts, part, d_out))
        return dx, None


def _backward(parts: Sequence[Part], x: Tensor, d: Tensor) -> Tensor:
    """The gradient at x from d, the one at what the parts make of it.

    Through a unit at their start, whose maps are a tail's largest, it goes by hand.
    """
    first, *rest = parts
    if not isinstance(first, Unit) or first.squeeze_excite is not None:
        return _stock_backward(parts, x, d)
    conv, activation = Convolution(first.conv, first.norm), first.activation
    p = conv.forward(x)
    h = activate(p, activation, inplace=is_clamp(activation))
    d = _stock_backward(rest, h, d).contiguous(memory_format=torch.channels_last)
    return conv.backward(activation_backward(activation, d, p), x, True)


def _stock_backward(parts: Sequence[Part], x: Tensor, d: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return gradients_from(run_frozen(parts, leaf.clone()), d, [leaf])[0]


def _add(y: Tensor, x: Tensor) -> Tensor:
    """In place where autograd keeps no output of an activation."""
    return y + x if y.requires_grad else y.add_(x)


def _run_unit(unit: Unit, x: Tensor) -> Tensor:
    x = Convolution(unit.conv, unit.norm).forward(x)
    # Not in place for autograd, which would copy the whole: a conv's output may be a view.
    x = activate(x, unit.activation, inplace=not x.requires_grad)
    return x if unit.squeeze_excite is None else squeeze_excite(unit.squeeze_excite, x)
