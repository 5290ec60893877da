"""An inverted residual as one autograd function: a few images at a time, little kept.

Forward runs a chunk of images through the block and keeps, for each internal
activation, its input as the stash says. Backward goes through the same chunks.
The last norm's statistics are the whole batch's in either direction, so chunks
change nothing but the order of sums. The internal norms' are frozen, so these
norms are folded into their convs: no pass over a feature map is theirs.
"""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from fleet.mobiletl.chunks import chunks, images_in_chunk, room
from fleet.mobiletl.convolution import Convolution
from fleet.mobiletl.functional import (
    activate,
    activation_backward,
    gradients_from,
    is_clamp,
)
from fleet.mobiletl.stash import keep, restore
from fleet.structure import InvertedResidual, Unit, excitation, squeeze_excite

# Under a smaller scale a norm's input cannot be told from its output, and is kept.
_SMALL_SCALE = 0.1

Gradients = dict[nn.Parameter, Tensor]


def fits(block: InvertedResidual) -> bool:
    """Whether `inverted_residual` can train the block.

    It cannot if an activation or a gate comes after the last norm, or if that
    norm does not train in full.
    """
    last = block.units[-1]
    plain = last.activation is None and last.squeeze_excite is None
    return plain and last.norm.weight.requires_grad


def inverted_residual(
    block: InvertedResidual, x: Tensor, stash: str, chunk: int | None = None
) -> Tensor:
    """An inverted residual while training; its derivatives are those of the block.

    Convs, squeeze-excite, the internal norms' shifts and the last norm learn,
    as far as they require grad. Internal norms use their running statistics,
    the last norm the batch's, and updates its running ones.

    Args:
        block: `fits` is true of it.
        x: (N, C, H, W) float32.
        stash: `float32`, `bfloat16`, `int8` or `recompute`.
        chunk: images at a time; None: as `images_in_chunk`.

    Returns:
        (N, C', H', W'). Kept for backward: the block's input, every activation's
        input and the last norm's, normalised, in 4, 2 or 1 bytes an element;
        with `recompute` the block's input and output in float32, each of which
        the neighbouring block keeps anyway.
    """
    if chunk is None:
        chunk = images_in_chunk(x)
    factor = None
    if block.residual and block.drop_path is not None:
        factor = block.drop_path(x.new_ones(len(x), 1, 1, 1))
    return _InvertedResidual.apply(x, factor, block, stash, chunk, *_parameters(block))


def _parameters(block: InvertedResidual) -> list[nn.Parameter]:
    """What may learn, in the order in which backward returns gradients."""
    parameters = []
    for unit in block.units:
        parameters += [unit.conv.weight, unit.norm.bias]
        if unit.squeeze_excite is not None:
            parameters += unit.squeeze_excite.parameters()
    return [*parameters, block.units[-1].norm.weight]


class _InvertedResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        factor: Tensor | None,
        block: InvertedResidual,
        stash: str,
        chunk: int,
        *parameters: Tensor,
    ) -> Tensor:
        norm, kept, z = block.units[-1].norm, [], None
        convs, seen_by = _convolutions(block), [None, *_activations(block)]
        for part in chunks(len(x), chunk):
            maps = _internal(block, convs, x[part])
            if stash != "recompute":
                for map_, activation in zip((x[part], *maps), seen_by, strict=True):
                    kept += keep(map_, activation, stash)
            h = _activated(block.units[-2], maps.pop())
            del maps
            out = convs[-1].forward(_gated(block.units[-2], h))
            z = room(out, len(x)) if z is None else z
            z[part] = out
        if z.numel() == z.shape[1]:  # as PyTorch's own, which the native function leaves unchecked
            raise ValueError(f"one value a channel has no variance: {tuple(z.shape)}")
        y, mean, inverse_std = torch.native_batch_norm(
            z, norm.weight, norm.bias, norm.running_mean, norm.running_var,
            True, norm.momentum, norm.eps,
        )  # fmt: skip
        if block.residual:
            y = (y if factor is None else y.mul_(factor)).add_(x)
        if stash == "recompute":
            kept = [x, y, z[:, _small(norm)]]
        else:  # normalised, as a mean far from nought would leave no digits for the rest
            kept += keep(z.sub_(_wide(mean)).mul_(_wide(inverse_std)), None, stash)
        ctx.block, ctx.stash, ctx.chunk = block, stash, chunk
        ctx.save_for_backward(mean, inverse_std, factor, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        mean, inverse_std, factor, *kept = ctx.saved_tensors
        block, norm = ctx.block, ctx.block.units[-1].norm
        convs, parts = _convolutions(block), list(chunks(len(dy), ctx.chunk))
        if ctx.stash == "recompute":
            source = _Recomputed(block, convs, kept, factor, mean, inverse_std)
        else:
            source = _Stashed(block, kept, ctx.chunk)
        dz = dy if factor is None else dy * factor
        d_shift = dz.sum((0, 2, 3))
        d_scale = sum((dz[p] * source.normalised(p)).sum((0, 2, 3)) for p in parts)
        gradients: Gradients = {norm.bias: d_shift, norm.weight: d_scale}
        count = dz.numel() // dz.shape[1]
        a, mean_d, mean_dn = map(
            _wide, (norm.weight * inverse_std, d_shift / count, d_scale / count)
        )
        dx = None
        for part in parts:
            x, maps, normalised = source.chunk(part)
            d_out = (dz[part] - mean_d).addcmul_(normalised, mean_dn, value=-1).mul_(a)
            del normalised
            wants_input = ctx.needs_input_grad[0]
            dx_part = _backward_chunk(block, convs, x, maps, d_out, gradients, wants_input)
            if dx_part is not None:
                dx = room(dx_part, len(dy)) if dx is None else dx
                dx[part] = dx_part.add_(dy[part]) if block.residual else dx_part
        for unit, conv in zip(block.units, convs, strict=True):
            gradients[unit.conv.weight], d_bias = conv.gradients()
            if d_bias is not None:
                gradients[unit.norm.bias] = d_bias
        found = [gradients.get(p) if p.requires_grad else None for p in _parameters(block)]
        return (dx, None, None, None, None, *found)


class _Stashed:
    """What forward kept, rounded or not."""

    def __init__(self, block: InvertedResidual, kept: list[Tensor], chunk: int) -> None:
        self._kept, self._chunk = kept, chunk
        self._width = 3 if kept[0].dtype == torch.uint8 else 1  # tensors a map
        self._seen_by = [None, *_activations(block)]

    def chunk(self, part: slice) -> tuple[Tensor, list[Tensor], Tensor]:
        """Input, internal maps and the last norm's normalised input of a chunk."""
        first = part.start // self._chunk * len(self._seen_by)
        x, *maps = (self._map(first + i, by) for i, by in enumerate(self._seen_by))
        return x, maps, self.normalised(part)

    def normalised(self, part: slice) -> Tensor:
        """The last norm's input, centred and scaled by the batch's statistics."""
        values, *span = self._kept[-self._width :]
        return restore([values[part], *span])

    def _map(self, i: int, activation: nn.Module | None) -> Tensor:
        return restore(self._kept[i * self._width : (i + 1) * self._width], activation)


class _Recomputed:
    """What follows from the block's input and output."""

    def __init__(
        self,
        block: InvertedResidual,
        convs: list[Convolution],
        kept: list[Tensor],
        factor: Tensor | None,
        mean: Tensor,
        inverse_std: Tensor,
    ) -> None:
        self._block, self._convs, self._factor = block, convs, factor
        self._x, self._y, self._z_small = kept
        self._mean, self._inverse_std = mean, inverse_std
        norm = block.units[-1].norm
        self._small = _small(norm)
        self._shift = _wide(norm.bias)
        self._scale = _wide(torch.where(self._small, 1, norm.weight))

    def chunk(self, part: slice) -> tuple[Tensor, list[Tensor], Tensor]:
        """Input, internal maps and the last norm's normalised input of a chunk."""
        maps, last = _internal(self._block, self._convs, self._x[part]), self._block.units[-2]
        normalised = self.normalised(part)
        if self._factor is not None:  # the output of a dropped branch says nothing of it
            dropped = self._factor[part].flatten() == 0
            if not dropped.is_meta and dropped.any():
                h = _gated(last, _activated(last, maps[-1][dropped]))
                z = self._convs[-1].forward(h) - _wide(self._mean)
                normalised[dropped] = z * _wide(self._inverse_std)
        return self._x[part], maps, normalised

    def normalised(self, part: slice) -> Tensor:
        """The last norm's input, centred and scaled by the batch's statistics.

        It is the norm's output without shift and scale, and that is the block's
        without the shortcut: the last conv, a third of the block, need not run again.
        Where the branch was dropped this is not so, and the result is any number.
        """
        y, small = self._y[part], self._small
        out = y - self._x[part] if self._block.residual else y.clone()
        if self._factor is not None:
            out /= torch.where(self._factor[part] == 0, 1, self._factor[part])
        out.sub_(self._shift).div_(self._scale)
        if self._z_small.shape[1]:
            z = self._z_small[part] - _wide(self._mean[small])
            out[:, small] = z * _wide(self._inverse_std[small])
        return out


def _convolutions(block: InvertedResidual) -> list[Convolution]:
    """The block's convs, all but the last with their norms folded in."""
    *internal, last = block.units
    return [*(Convolution(unit.conv, unit.norm) for unit in internal), Convolution(last.conv)]


def _activations(block: InvertedResidual) -> list[nn.Module | None]:
    return [unit.activation for unit in block.units[:-1]]


def _internal(block: InvertedResidual, convs: list[Convolution], x: Tensor) -> list[Tensor]:
    """What each internal activation's value and derivative follow from.

    That is the activation's input; or its output, if the activation is a clamp.
    """
    maps, h = [], x
    for i, conv in enumerate(convs[:-1]):
        if i:
            h = _gated(block.units[i - 1], _activated(block.units[i - 1], maps[-1]))
        p, activation = conv.forward(h), block.units[i].activation
        maps.append(activate(p, activation, inplace=True) if is_clamp(activation) else p)
    return maps


def _backward_chunk(
    block: InvertedResidual,
    convs: list[Convolution],
    x: Tensor,
    maps: list[Tensor],
    d: Tensor,
    gradients: Gradients,
    wants_input: bool,
) -> Tensor | None:
    """From d, the gradient at the last norm's input, down to the block's input.

    The convs and `gradients` gather the parameters' gradients.
    """
    for j in reversed(range(1, len(block.units))):
        below = block.units[j - 1]
        p = maps.pop()
        h = _activated(below, p)
        if below.squeeze_excite is None:
            d = convs[j].backward(d, h, True)
        else:
            d = _gated_backward(convs[j], below.squeeze_excite, d, h, gradients)
        d = activation_backward(below.activation, d, p)
    return convs[0].backward(d, x, wants_input)


def _activated(unit: Unit, p: Tensor) -> Tensor:
    """The activation's output from what `_internal` says of it."""
    return p if is_clamp(unit.activation) else activate(p, unit.activation)


def _gated(unit: Unit, h: Tensor) -> Tensor:
    return h if unit.squeeze_excite is None else squeeze_excite(unit.squeeze_excite, h)


def _gated_backward(
    conv: Convolution, gate: nn.Module, d: Tensor, h: Tensor, gradients: Gradients
) -> Tensor:
    """Through a conv and the squeeze-excite before it, h·s(mean h), whose product is made anew.

    Each feature map is passed over by hand, once for each sum; only the gate's s, a number a
    channel, is left to autograd.
    """
    parameters = [p for p in gate.parameters() if p.requires_grad]
    means = h.mean((2, 3)).requires_grad_()
    with torch.enable_grad():
        s = excitation(gate, means)
    factors = s.detach()
    product = h * factors
    d = conv.backward(d, product, True)
    d_s = torch.mul(d, h, out=product).sum((2, 3), keepdim=True)
    d_means, *found = gradients_from(s, d_s, [means, *parameters])
    for parameter, gradient in zip(parameters, found, strict=True):
        if parameter in gradients:
            gradients[parameter] += gradient
        else:
            gradients[parameter] = gradient
    d_mean = d_means[:, :, None, None] / h.shape[2:].numel()
    return torch.addcmul(d_mean, d, factors, out=d)


def _small(norm: nn.BatchNorm2d) -> Tensor:
    """(C,) bool: channels whose scale is too small to divide by."""
    return norm.weight.abs() < _SMALL_SCALE


def _wide(per_channel: Tensor) -> Tensor:
    return per_channel[:, None, None]
