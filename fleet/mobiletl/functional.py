"""Operations that keep less for backward than PyTorch's own.

Per element of a feature map PyTorch keeps 4 bytes for each norm and for each
activation. Here a norm with frozen statistics keeps none and an activation
one bit.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fleet.errors import PlanError

# Bits are gathered by one multiplication: byte i of the factor puts bool i at bit 56 + i.
_GATHER = 0x0102040810204080
_BYTE_TO_BOOLS = ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).bool()  # (256, 8)


def pack_bits(mask: Tensor) -> Tensor:
    """Eight bools to a byte, in the order in which they lie in memory.

    Args:
        mask: bool, any shape, without gaps in memory (any memory format).

    Returns:
        (⌈numel / 8⌉,) uint8; bool i is bit i mod 8 of byte i div 8.
    """
    flat = mask.as_strided((mask.numel(),), (1,))
    if flat.numel() % 8:
        flat = F.pad(flat, (0, -flat.numel() % 8))
    return ((flat.view(torch.int64) * _GATHER) >> 56).to(torch.uint8)


def unpack_bits(bits: Tensor, like: Tensor) -> Tensor:
    """What `pack_bits` packed: bool, with the shape and memory format of `like`."""
    flat = _BYTE_TO_BOOLS.to(bits.device)[bits.int()].flatten()
    mask = torch.empty_like(like, dtype=torch.bool)
    mask.as_strided((mask.numel(),), (1,)).copy_(flat[: mask.numel()])
    return mask


def activate(x: Tensor, activation: nn.Module | None, inplace: bool = False) -> Tensor:
    """The activation's function, in place as the caller says, whatever its own `inplace` does."""
    if activation is None:
        return x
    if isinstance(activation, nn.ReLU6):
        return F.relu6(x, inplace)
    if isinstance(activation, nn.ReLU):
        return F.relu(x, inplace)
    return F.hardswish(x, inplace) if isinstance(activation, nn.Hardswish) else F.silu(x, inplace)


def activation_backward(activation: nn.Module | None, d: Tensor, p: Tensor) -> Tensor:
    """The gradient at an activation's input, written over d, the one at its output."""
    if activation is None:
        return d
    if isinstance(activation, nn.ReLU6):
        return torch.ops.aten.hardtanh_backward(d, p, 0, 6, grad_input=d)
    if isinstance(activation, nn.ReLU):
        return torch.ops.aten.threshold_backward(d, p, 0, grad_input=d)
    if isinstance(activation, nn.Hardswish):
        return torch.ops.aten.hardswish_backward(d, p, out=d)
    return torch.ops.aten.silu_backward(d, p, grad_input=d)


def is_clamp(activation: nn.Module | None) -> bool:
    """Whether the derivative follows from the output as well as from the input."""
    return isinstance(activation, nn.ReLU | nn.ReLU6)


def pad_for(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The input with what a conv pads by its size, as TensorFlow does; for most, itself.

    What such a conv pads by itself, `conv.padding`, is nought.
    """
    if type(conv).__name__ != "Conv2dSame":  # timm's
        return x
    from timm.layers import pad_same

    return pad_same(x, conv.kernel_size, conv.stride, conv.dilation)


class _SignMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: nn.Module) -> Tensor:
        x = _dense(x)
        mask = x > 0
        if isinstance(activation, nn.ReLU6):
            mask &= x < 6
        ctx.save_for_backward(pack_bits(mask))
        ctx.like = torch.empty_like(x, device="meta")
        return activate(x, activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (bits,) = ctx.saved_tensors
        like = torch.empty_strided(
            ctx.like.shape, ctx.like.stride(), dtype=torch.bool, device=grad.device
        )
        return grad * unpack_bits(bits, like), None


def sign_mask(x: Tensor, activation: nn.Module) -> Tensor:
    """An activation whose derivative is a mask of bits.

    Exact for ReLU (x > 0) and ReLU6 (0 < x < 6). For hard-swish and SiLU the
    mask x > 0 stands in for the derivative, as published.

    Args:
        x: (N, C, H, W).
        activation: nn.ReLU, nn.ReLU6, nn.Hardswish or nn.SiLU; names the
            function, its `inplace` is not heeded.

    Returns:
        activation(x). Kept for backward: N·C·H·W / 8 bytes.

    Source: Chiang et al., MobileTL, AAAI 2023, section 3.
    """
    return _SignMask.apply(x, activation)


class _ShiftNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        mean, var = norm.running_mean, norm.running_var
        # a = γ/√(σ² + ε)
        ctx.save_for_backward(norm.weight * torch.rsqrt(var + norm.eps))
        return F.batch_norm(x, mean, var, norm.weight, shift, training=False, eps=norm.eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (a,) = ctx.saved_tensors
        wants_x, wants_shift, _ = ctx.needs_input_grad
        grad_x = grad * a[:, None, None] if wants_x else None
        return grad_x, grad.sum((0, 2, 3)) if wants_shift else None, None


def shift_norm(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Normalise with frozen statistics and scale; at most the shift learns.

    y = a·x + (β − a·μ), with a = γ/√(σ² + ε). Backward needs a, never x.

    Args:
        x: (N, C, H, W).
        norm: gives γ, β, μ, σ², ε; β learns if it requires grad.

    Returns:
        (N, C, H, W), equal to `norm` in eval mode. Kept for backward: 4·C bytes.

    Raises:
        PlanError: if γ requires grad; its gradient would need x.

    Source: Chiang et al., MobileTL, AAAI 2023, section 3.
    """
    if norm.weight.requires_grad:
        raise PlanError("shift_norm cannot train a norm's scale; freeze it or use batch_norm")
    return _ShiftNorm.apply(x, norm.bias, norm)


def batch_norm(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Normalise with the batch's statistics and update the running ones.

    Scale and shift learn. Kept for backward: x and 8·C bytes.
    """
    return F.batch_norm(
        x,
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        training=True,
        momentum=norm.momentum,
        eps=norm.eps,
    )


class _FrozenConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, options: tuple) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.options = x.shape, options
        return F.conv2d(x, weight, None, *options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return nn.grad.conv2d_input(ctx.shape, weight, grad, *ctx.options), None, None


def frozen_conv2d(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A convolution whose weight does not learn. Kept for backward: nothing but it.

    PyTorch keeps the input too, whether the weight learns or not.

    Args:
        x: (N, C, H, W), padded already where `conv` pads as TensorFlow does.
        conv: without bias.

    Raises:
        PlanError: if the weight requires grad, or there is a bias.
    """
    if conv.weight.requires_grad or conv.bias is not None:
        raise PlanError("frozen_conv2d takes a conv that is frozen and has no bias")
    options = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return _FrozenConv.apply(x, conv.weight, options)


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, d: Tensor) -> Tensor:
        ctx.save_for_backward(d)
        return y.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


def gradients_from(y: Tensor, d: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradients at `inputs`, given the one at y: `torch.autograd.grad(y, inputs, d)`.

    That compares shapes by means of SymPy, which a device need not import: 40 MiB. So it
    is asked about a number whose gradient at y is d.

    Args:
        y: computed from the inputs.
        d: as y.
    """
    with torch.enable_grad():
        known = _Projection.apply(y, d)
    return torch.autograd.grad(known, inputs)


def _dense(x: Tensor) -> Tensor:
    """x without gaps in memory, its memory format kept where it has one."""
    if x.is_contiguous(memory_format=torch.channels_last) or x.is_contiguous():
        return x
    return x.contiguous(memory_format=torch.channels_last)
