"""How a feature map is kept for backward: in full, rounded, or not at all.

What is kept is the activation's input, from which both its value and its
derivative follow. Rounding never moves it over a point where the derivative
jumps, so that ReLU's and ReLU6's derivatives are exact at every precision; but
int8 may move it over hard-swish's upper corner, 3.
"""

import torch
import torch.nn as nn
from torch import Tensor

from fleet.errors import ConfigError
from fleet.mobiletl.functional import activate, is_clamp
from fleet.plan import STASHES

# Where a derivative jumps.
_CORNERS = {nn.ReLU: (0.0,), nn.ReLU6: (0.0, 6.0), nn.Hardswish: (-3.0, 3.0)}


def check_stash(name: str) -> str:
    """The name itself.

    Raises:
        ConfigError: if there is no such stash.
    """
    if name not in STASHES:
        raise ConfigError(f"unknown stash {name}; known: {', '.join(STASHES)}")
    return name


def keep(x: Tensor, activation: nn.Module | None, stash: str) -> list[Tensor]:
    """Round a map as a stash says.

    Args:
        x: what the activation is about to see; float32, any shape.
        activation: decides where rounding must not cross; None: nowhere.
        stash: `float32`, `bfloat16` or `int8`.

    Returns:
        The map itself or rounded; for `int8` codes, lowest value and step.
    """
    if stash == "float32":
        return [x]
    return [_to_bfloat16(x, activation)] if stash == "bfloat16" else _to_int8(x, activation)


def restore(kept: list[Tensor], activation: nn.Module | None = None) -> Tensor:
    """The float32 map that `keep` rounded, not to be written to.

    With ReLU or ReLU6 it may be the activation's output as well as its input:
    what lies outside of the clamp comes back on its edge.
    """
    if len(kept) == 1:
        return kept[0].float() if kept[0].dtype == torch.bfloat16 else kept[0]
    codes, lowest, step = kept
    # Codes 1 to 254 stand for the middles of their intervals; 0 and 255 lie outside of all.
    x = codes.float().sub_(0.5).mul_(step).add_(lowest)
    return activate(x, activation, inplace=True) if is_clamp(activation) else x


def _to_bfloat16(x: Tensor, activation: nn.Module | None) -> Tensor:
    rounded = x.to(torch.bfloat16)
    for corner in _CORNERS.get(type(activation), ()):
        # What was rounded onto a corner moves on to the next number on its own side.
        there = rounded == corner
        rounded.masked_fill_((x > corner).logical_and_(there), _next(corner, torch.inf))
        rounded.masked_fill_((x < corner).logical_and_(there), _next(corner, -torch.inf))
    return rounded


def _next(corner: float, towards: float) -> float:
    start, end = torch.tensor([corner, towards], dtype=torch.bfloat16)
    return start.nextafter(end).item()


def _to_int8(x: Tensor, activation: nn.Module | None) -> list[Tensor]:
    """Eight bits over (lowest, highest): code 0 is at or below it, 255 at or above.

    For ReLU6 that is (0, 6), beyond which the derivative is nought.
    """
    floor = {nn.ReLU: 0.0, nn.ReLU6: 0.0, nn.Hardswish: -3.0}.get(type(activation))
    lowest = x.amin() if floor is None else x.new_tensor(floor)
    highest = x.new_tensor(6.0) if isinstance(activation, nn.ReLU6) else x.amax()
    step = ((highest - lowest) / 254).clamp_min(torch.finfo(torch.float32).tiny)
    codes = x.sub(lowest).div_(step).floor_().add_(1).clamp_(0, 255)
    # Division rounds: what lies strictly between the ends must not land on one.
    codes.clamp_(max=254).masked_fill_(x >= highest, 255)
    codes.clamp_(min=1).masked_fill_(x <= lowest, 0)
    return [codes.to(torch.uint8), lowest, step]
