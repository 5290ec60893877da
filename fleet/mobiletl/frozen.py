"""Frozen steps above the trained blocks: the gradient passes, nothing but the input is kept."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fleet.mobiletl.blocks import part_forward
from fleet.mobiletl.chunks import images_in_chunk
from fleet.structure import InvertedResidual, Step, Unit, eval_forward


def frozen(parts: Sequence[InvertedResidual | Unit | Step], x: Tensor) -> Tensor:
    """Run parts of which no parameter trains, a few images at a time.

    Args:
        x: (N, C, H, W) or (N, C).

    Returns:
        What the parts make of x. Kept for backward: x, from which each chunk
        of images runs again.
    """
    return _Frozen.apply(x, parts)


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Sequence[InvertedResidual | Unit | Step]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.parts = parts
        return torch.cat([_run(parts, part) for part in x.split(images_in_chunk(x))])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        chunk, dx = images_in_chunk(x), torch.empty_like(x)
        for part, d_out, into in zip(*(t.split(chunk) for t in (x, grad, dx)), strict=True):
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                into.copy_(torch.autograd.grad(_run(ctx.parts, leaf), leaf, d_out)[0])
        return dx, None


def _run(parts: Sequence[InvertedResidual | Unit | Step], x: Tensor) -> Tensor:
    x = x.clone()  # a step may be an activation in place
    for part in parts:
        # Stock autograd: what a chunk keeps is little, and every derivative is exact.
        x = eval_forward(part, x) if isinstance(part, Unit) else part_forward(part, x)
    return x
