"""Parts of which nothing trains: norms folded into convs; a tail through which gradients pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fleet.mobiletl.chunks import images_in_chunk
from fleet.mobiletl.convolution import Convolution
from fleet.mobiletl.functional import activate, gradients_from
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
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                y = run_frozen(ctx.parts, leaf.clone())
                into.copy_(gradients_from(y, d_out, [leaf])[0])
        return dx, None


def _add(y: Tensor, x: Tensor) -> Tensor:
    """In place where autograd keeps no output of an activation."""
    return y + x if y.requires_grad else y.add_(x)


def _run_unit(unit: Unit, x: Tensor) -> Tensor:
    # In place, nothing is lost: autograd keeps no conv's output.
    x = activate(Convolution(unit.conv, unit.norm).forward(x), unit.activation, inplace=True)
    return x if unit.squeeze_excite is None else squeeze_excite(unit.squeeze_excite, x)
