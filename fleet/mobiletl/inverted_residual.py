"""An inverted residual as one autograd function: a few images at a time, little kept.

Forward runs a chunk of images through the block and keeps, for each internal
activation, its input as the stash says. Backward goes through the same chunks.
The last norm's statistics are the whole batch's in either direction, so chunks
change nothing but the order of sums.
"""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fleet.mobiletl.chunks import chunks, images_in_chunk, room
from fleet.mobiletl.functional import activate, pad_for
from fleet.mobiletl.stash import keep, restore
from fleet.structure import InvertedResidual, Unit

_ONEDNN_BATCH, _ONEDNN_WIDTH = 16, 4  # images, and pixels of each, from which oneDNN is faster

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
        seen_by = [None, *(unit.activation for unit in block.units[:-1])]
        for part in chunks(len(x), chunk):
            maps, h = _internal(block, x[part])
            out = _conv(block.units[-1].conv, h)
            z = room(out, len(x)) if z is None else z
            z[part] = out
            if stash != "recompute":
                for map_, activation in zip((x[part], *maps), seen_by, strict=True):
                    kept += keep(map_, activation, stash)
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
        parts = list(chunks(len(dy), ctx.chunk))
        if ctx.stash == "recompute":
            source = _Recomputed(block, kept, factor, mean, inverse_std)
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
            d_out = (dz[part] - mean_d).sub_(normalised.mul_(mean_dn)).mul_(a)
            dx_part = _backward_chunk(block, x, maps, d_out, gradients, ctx.needs_input_grad[0])
            if dx_part is not None:
                dx = room(dx_part, len(dy)) if dx is None else dx
                dx[part] = dx_part.add_(dy[part]) if block.residual else dx_part
        found = [gradients.get(p) if p.requires_grad else None for p in _parameters(block)]
        return (dx, None, None, None, None, *found)


class _Stashed:
    """What forward kept, rounded or not."""

    def __init__(self, block: InvertedResidual, kept: list[Tensor], chunk: int) -> None:
        self._kept, self._chunk = kept, chunk
        self._width = 3 if kept[0].dtype == torch.uint8 else 1  # tensors a map
        self._maps = len(block.units)  # the input and every internal map

    def chunk(self, part: slice) -> tuple[Tensor, list[Tensor], Tensor]:
        """Input, internal maps and the last norm's normalised input of a chunk."""
        first = part.start // self._chunk * self._maps
        x, *maps = (self._map(first + i) for i in range(self._maps))
        return x, maps, self.normalised(part)

    def normalised(self, part: slice) -> Tensor:
        """The last norm's input, centred and scaled by the batch's statistics."""
        values, *span = self._kept[-self._width :]
        return restore([values[part], *span])

    def _map(self, i: int) -> Tensor:
        return restore(self._kept[i * self._width : (i + 1) * self._width])


class _Recomputed:
    """What follows from the block's input and output."""

    def __init__(
        self,
        block: InvertedResidual,
        kept: list[Tensor],
        factor: Tensor | None,
        mean: Tensor,
        inverse_std: Tensor,
    ) -> None:
        self._block, self._factor = block, factor
        self._x, self._y, self._z_small = kept
        self._mean, self._inverse_std = mean, inverse_std

    def chunk(self, part: slice) -> tuple[Tensor, list[Tensor], Tensor]:
        """Input, internal maps and the last norm's normalised input of a chunk."""
        maps, h = _internal(self._block, self._x[part])
        normalised = self.normalised(part)
        if self._factor is not None:  # the output of a dropped branch says nothing of it
            dropped = self._factor[part].flatten() == 0
            if dropped.any():
                z = _conv(self._block.units[-1].conv, h[dropped]) - _wide(self._mean)
                normalised[dropped] = z * _wide(self._inverse_std)
        return self._x[part], maps, normalised

    def normalised(self, part: slice) -> Tensor:
        """The last norm's input, centred and scaled by the batch's statistics.

        It is the norm's output without shift and scale, and that is the block's
        without the shortcut: the last conv, a third of the block, need not run again.
        Where the branch was dropped this is not so, and the result is any number.
        """
        norm = self._block.units[-1].norm
        small = _small(norm)
        out = self._y[part].clone()
        if self._block.residual:
            out -= self._x[part]
        if self._factor is not None:
            out /= torch.where(self._factor[part] == 0, 1, self._factor[part])
        out.sub_(_wide(norm.bias)).div_(_wide(torch.where(small, 1, norm.weight)))
        if self._z_small.shape[1]:
            z = self._z_small[part] - _wide(self._mean[small])
            out[:, small] = z * _wide(self._inverse_std[small])
        return out


def _internal(block: InvertedResidual, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Inputs of the internal activations, and of the last conv."""
    maps, h = [], x
    for unit in block.units[:-1]:
        norm = unit.norm
        p = F.batch_norm(
            _conv(unit.conv, h), norm.running_mean, norm.running_var, norm.weight, norm.bias,
            eps=norm.eps,
        )  # fmt: skip
        maps.append(p)
        h = _gated(unit, activate(p, unit.activation))
    return maps, h


def _backward_chunk(
    block: InvertedResidual,
    x: Tensor,
    maps: list[Tensor],
    d_out: Tensor,
    gradients: Gradients,
    wants_input: bool,
) -> Tensor | None:
    """From the gradient at the last norm's input down to the block's input.

    Adds the parameters' gradients to `gradients`.
    """
    d = d_out
    for j in reversed(range(1, len(block.units))):
        unit, below, p = block.units[j], block.units[j - 1], maps[j - 1]
        h = activate(p, below.activation)
        d = _conv_backward(unit.conv, d, _gated(below, h), gradients, True)
        if below.squeeze_excite is not None:
            d = _gate_backward(below.squeeze_excite, h, d, gradients)
        d = _activation_backward(below.activation, d, p)
        _add(gradients, below.norm.bias, d.sum((0, 2, 3)))
        norm = below.norm
        d = d * _wide(norm.weight * torch.rsqrt(norm.running_var + norm.eps))
    return _conv_backward(block.units[0].conv, d, x, gradients, wants_input)


def _gated(unit: Unit, h: Tensor) -> Tensor:
    return h if unit.squeeze_excite is None else unit.squeeze_excite(h)


def _activation_backward(activation: nn.Module | None, d: Tensor, p: Tensor) -> Tensor:
    if activation is None:
        return d
    if isinstance(activation, nn.ReLU6):
        return torch.ops.aten.hardtanh_backward(d, p, 0, 6)
    if isinstance(activation, nn.ReLU):
        return torch.ops.aten.threshold_backward(d, p, 0)
    if isinstance(activation, nn.Hardswish):
        return torch.ops.aten.hardswish_backward(d, p)
    return torch.ops.aten.silu_backward(d, p)


def _gate_backward(gate: nn.Module, h: Tensor, d: Tensor, gradients: Gradients) -> Tensor:
    """Through h·gate(h), by autograd on this chunk."""
    parameters = [p for p in gate.parameters() if p.requires_grad]
    with torch.enable_grad():
        leaf = h.detach().requires_grad_()
        d_h, *found = torch.autograd.grad(gate(leaf), [leaf, *parameters], d)
    for parameter, gradient in zip(parameters, found, strict=True):
        _add(gradients, parameter, gradient)
    return d_h


def _conv(conv: nn.Conv2d, h: Tensor) -> Tensor:
    padded = pad_for(conv, h)
    rows = _as_rows(conv, padded)
    out = F.conv2d(rows, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    return out if rows is padded else _as_map(out, h)


def _conv_backward(
    conv: nn.Conv2d, d: Tensor, h: Tensor, gradients: Gradients, wants_input: bool
) -> Tensor | None:
    """Adds the weight's gradient to `gradients`; returns the input's, if it is wanted."""
    padded = pad_for(conv, h)
    rows = _as_rows(conv, padded)
    d_rows = d if rows is padded else _as_rows(conv, d)
    wants_weight = conv.weight.requires_grad
    fold = wants_weight and conv.groups == conv.in_channels and conv.kernel_size[0] > 3
    d_input, d_weight, _ = torch.ops.aten.convolution_backward(
        d_rows, rows, conv.weight, None, conv.stride, conv.padding, conv.dilation, False, [0, 0],
        conv.groups, [wants_input, wants_weight and not fold, False],
    )  # fmt: skip
    if wants_weight:
        d_weight = _depthwise_weight_gradient(conv, d, padded) if fold else d_weight
        _add(gradients, conv.weight, d_weight)
    if d_input is None:
        return None
    if rows is not padded:
        return _as_map(d_input, h)
    top, left = ((p - n) // 2 for p, n in zip(padded.shape[2:], h.shape[2:], strict=True))
    return d_input[:, :, top : top + h.shape[2], left : left + h.shape[3]]


def _as_rows(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A pointwise conv's map as at least sixteen narrow images, where it divides so.

    On one thread PyTorch gives a pointwise conv of fewer than sixteen images to
    a matrix product that takes up to twice as long as oneDNN's conv. To such a
    conv pixels are pixels, and in channels_last this is a view.
    """
    n, c, *size = x.shape
    pixels = n * size[0] * size[1]
    if n >= _ONEDNN_BATCH or conv.kernel_size != (1, 1) or conv.stride != (1, 1):
        return x
    for batch in range(_ONEDNN_BATCH, pixels // _ONEDNN_WIDTH + 1):
        if pixels % batch == 0:
            rows = x.permute(0, 2, 3, 1).reshape(batch, 1, pixels // batch, c)
            return rows.permute(0, 3, 1, 2)
    return x


def _as_map(rows: Tensor, like: Tensor) -> Tensor:
    """The way back from `_as_rows`, to the images of `like`."""
    n, _, *size = like.shape
    return rows.permute(0, 2, 3, 1).reshape(n, *size, rows.shape[1]).permute(0, 3, 1, 2)


def _depthwise_weight_gradient(conv: nn.Conv2d, d: Tensor, h: Tensor) -> Tensor:
    """The input correlated with the gradient, every image and channel a group of its own.

    oneDNN's own is nine times slower for 5×5 at two images of 1152×7×7, and
    allocates 28 MiB.
    """
    n, c, *size = h.shape
    correlated = F.conv2d(
        h.reshape(1, n * c, *size), d.reshape(n * c, 1, *d.shape[2:]), None, conv.dilation,
        conv.padding, conv.stride, groups=n * c,
    )  # fmt: skip
    high, wide = conv.kernel_size
    return correlated[0, :, :high, :wide].reshape(n, c, 1, high, wide).sum(0)


def _add(gradients: Gradients, parameter: nn.Parameter, gradient: Tensor) -> None:
    if not parameter.requires_grad:
        return
    if parameter in gradients:
        gradients[parameter] += gradient
    else:
        gradients[parameter] = gradient


def _small(norm: nn.BatchNorm2d) -> Tensor:
    """(C,) bool: channels whose scale is too small to divide by."""
    return norm.weight.abs() < _SMALL_SCALE


def _wide(per_channel: Tensor) -> Tensor:
    return per_channel[:, None, None]
