"""Inverted residuals and tails, made of operations that keep little for backward.

What a parameter's `requires_grad` says decides which operation runs: a frozen
conv keeps nothing, a norm trains its scale and statistics only if its scale
requires grad. So one forward pass serves MobileTL, `shifts` and frozen tails.
"""

from collections.abc import Iterator

import torch.nn as nn
from torch import Tensor

from fleet.mobiletl.functional import (
    activate,
    batch_norm,
    frozen_conv2d,
    is_clamp,
    pad_for,
    shift_norm,
    sign_mask,
)
from fleet.structure import InvertedResidual, Step, Unit


def block_forward(block: InvertedResidual, x: Tensor, exact: bool = False) -> Tensor:
    """An inverted residual while training.

    Args:
        x: (N, C, H, W).

    Returns:
        (N, C', H', W'). Kept for backward: the input of every conv that
        trains, the input of the norm that trains in full, a bit for each
        activation's input (of hard-swish and SiLU the input itself, if
        `exact`), and what the squeeze-excite keeps.
    """
    y = x
    for unit in block.units:
        y = unit_forward(unit, y, exact)
    if not block.residual:
        return y
    return x + (y if block.drop_path is None else block.drop_path(y))


def part_forward(part: InvertedResidual | Unit | Step, x: Tensor, exact: bool = False) -> Tensor:
    """One part of the chain above the frozen prefix; x (N, C, H, W) until it is pooled."""
    if isinstance(part, InvertedResidual):
        return block_forward(part, x, exact)
    return unit_forward(part, x, exact) if isinstance(part, Unit) else part.forward(x)


def parameters_of(part: InvertedResidual | Unit | Step) -> Iterator[nn.Parameter]:
    """Every parameter of a part, frozen or not."""
    is_unit = isinstance(part, Unit)
    modules = (part.conv, part.norm, part.squeeze_excite) if is_unit else (part.module,)
    for module in filter(None, modules):
        yield from module.parameters()


def unit_forward(unit: Unit, x: Tensor, exact: bool = False) -> Tensor:
    """Conv → norm → activation → squeeze-excite; x (N, C, H, W).

    `exact`: hard-swish and SiLU with their own derivatives, for which PyTorch
    keeps their input, and not with the sign mask.
    """
    conv = unit.conv
    x = conv(x) if conv.weight.requires_grad else frozen_conv2d(pad_for(conv, x), conv)
    x = batch_norm(x, unit.norm) if unit.norm.weight.requires_grad else shift_norm(x, unit.norm)
    if unit.activation is not None:
        by_mask = not exact or is_clamp(unit.activation)
        x = sign_mask(x, unit.activation) if by_mask else activate(x, unit.activation)
    return x if unit.squeeze_excite is None else unit.squeeze_excite(x)
