"""Convolutions as the method runs them: a frozen norm folded in, a few images at a time.

Nothing here is approximate: a conv with the norm after it is one affine map,
and the detours are ways to reach faster kernels of PyTorch's for the same sums.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fleet.mobiletl.functional import pad_for


class Convolution:
    """A conv and the frozen norm after it as one conv with a bias.

    y = (a·W) ∗ x + (β − a·μ), with a = γ/√(σ² + ε): no pass over y is the
    norm's, and backward goes past it too. Made anew for every forward and
    backward, so that it follows the model's weights.

    Args:
        conv: without bias.
        norm: gives γ, β, μ, σ², ε; None: the conv alone.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None = None) -> None:
        self._conv = conv
        self._a = self._bias = None
        self._learns_shift = norm is not None and norm.bias.requires_grad
        self._weight = conv.weight
        if norm is not None:
            self._a = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            self._weight = conv.weight * self._a[:, None, None, None]
            self._bias = torch.addcmul(norm.bias, self._a, norm.running_mean, value=-1)
        self._d_weight: Tensor | None = None
        self._d_bias: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C', H', W')."""
        conv = self._conv
        if _is_product(conv):
            return _maps(F.linear(_pixels(x), self._weight.flatten(1), self._bias), x)
        return F.conv2d(
            pad_for(conv, x), self._weight, self._bias, conv.stride, conv.padding, conv.dilation,
            conv.groups,
        )  # fmt: skip

    def backward(self, d: Tensor, x: Tensor, wants_input: bool) -> Tensor | None:
        """The gradient at x from d, the one at y, if it is wanted.

        Adds to the gradients of weight and shift, as far as they learn.
        """
        if self._learns_shift:
            self._d_bias = _sum(self._d_bias, d.sum((0, 2, 3)))
        if _is_product(self._conv):
            return self._product_backward(d, x, wants_input)
        conv, padded = self._conv, pad_for(self._conv, x)
        wants_weight = conv.weight.requires_grad
        one_to_one = conv.groups == conv.in_channels == conv.out_channels
        fold = wants_weight and one_to_one and _is_slow(conv, x)
        d_input, d_weight, _ = torch.ops.aten.convolution_backward(
            d, padded, self._weight, None, conv.stride, conv.padding, conv.dilation, False,
            [0, 0], conv.groups, [wants_input, wants_weight and not fold, False],
        )  # fmt: skip
        if wants_weight:
            d_weight = _depthwise_weight_gradient(conv, d, padded) if fold else d_weight
            self._d_weight = _sum(self._d_weight, d_weight)
        if d_input is None:
            return None
        top, left = ((p - n) // 2 for p, n in zip(padded.shape[2:], x.shape[2:], strict=True))
        return d_input[:, :, top : top + x.shape[2], left : left + x.shape[3]]

    def _product_backward(self, d: Tensor, x: Tensor, wants_input: bool) -> Tensor | None:
        """Through Y = X·Wᵀ: dW += dYᵀ·X, dX = dY·W."""
        d = _pixels(d)
        if self._conv.weight.requires_grad:
            if self._d_weight is None:
                self._d_weight = torch.mm(d.t(), _pixels(x)).view_as(self._weight)
            else:
                self._d_weight.flatten(1).addmm_(d.t(), _pixels(x))
        return _maps(torch.mm(d, self._weight.flatten(1)), x) if wants_input else None

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Of the conv's own weight and of the norm's shift, over all of `backward`."""
        if self._d_weight is not None and self._a is not None:
            self._d_weight.mul_(self._a[:, None, None, None])
        return self._d_weight, self._d_bias


def _sum(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total.add_(term)


def _is_product(conv: nn.Conv2d) -> bool:
    """Whether a conv is a matrix product: pixels × channels, times the weight.

    oneDNN takes a sixth longer for the same, as it lays out the weight anew at every call;
    and on one thread it is not asked about fewer than sixteen images, for which PyTorch's
    own kernel takes twice as long.
    """
    plain = conv.kernel_size == conv.stride == (1, 1) and conv.groups == 1
    return plain and not any(conv.padding)


def _pixels(x: Tensor) -> Tensor:
    """(N, C, H, W) as (N·H·W, C): if x is channels_last, the same memory."""
    return x.movedim(1, -1).flatten(0, 2)


def _maps(pixels: Tensor, like: Tensor) -> Tensor:
    """(N·H·W, C) as (N, C, H, W), channels_last, with N, H and W of `like`."""
    n, _, high, wide = like.shape
    return pixels.unflatten(0, (n, high, wide)).movedim(-1, 1)


def _is_slow(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether oneDNN's own gradient of a depthwise weight takes up to 300 times the weight's room.

    It is nine times slower for 5×5 at two images of 1152×7×7, and allocates 28 MiB.
    """
    return conv.kernel_size[0] > 3 or min(x.shape[2:]) < conv.kernel_size[0]


def _depthwise_weight_gradient(conv: nn.Conv2d, d: Tensor, x: Tensor) -> Tensor:
    """The input correlated with the gradient, every image and channel a group of its own."""
    n, c, *size = x.shape
    if d.shape[2:].numel() == 1:  # one pixel comes out: PyTorch would run group after group
        padded = F.pad(x, (conv.padding[1],) * 2 + (conv.padding[0],) * 2)
        taps = [
            slice(0, (k - 1) * g + 1, g)
            for k, g in zip(conv.kernel_size, conv.dilation, strict=True)
        ]
        return (padded[:, :, taps[0], taps[1]] * d).sum(0)[:, None]
    # Channels stay last: whole rows of them are copied, where one by one takes twice as long.
    side_by_side = x.permute(2, 3, 0, 1).reshape(1, *size, n * c).movedim(-1, 1)
    correlated = F.conv2d(
        side_by_side, d.reshape(n * c, 1, *d.shape[2:]), None, conv.dilation, conv.padding,
        conv.stride, groups=n * c,
    )  # fmt: skip
    high, wide = conv.kernel_size
    return correlated[0, :, :high, :wide].reshape(n, c, 1, high, wide).sum(0)
