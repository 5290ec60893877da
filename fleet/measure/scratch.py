"""What PyTorch's CPU kernels allocate beside their results, while they run.

Found by running each operation under `allocator_peak` in training steps of
five backbones, batches of 2 to 32 and 64 to 160 pixels: torch 2.14, x86-64
with AVX-512, one thread. Other processors block weights otherwise.
`python -m simulations.benchmark_planner` holds the whole against real steps.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten

_PRIMITIVE = 8344  # bytes: oneDNN's own scratchpad of a conv that is a matrix product


def scratch_bytes(func: Any, args: tuple, out: Any) -> int:
    """Bytes that one operation takes and gives back, its results not among them."""
    if (rule := _RULES.get(func)) is not None:
        return rule(args, out)
    if torch.Tag.pointwise in func.tags:
        return _promotion(args, out)
    return 0


def _promotion(args: tuple, out: Any) -> int:
    """An operand of another type is converted as a whole: bools times floats, 4 bytes each."""
    if len(args) < 2 or not isinstance(args[1], Tensor) or not args[0].ndim or not args[1].ndim:
        return 0
    dtype = torch.result_type(args[0], args[1])
    return sum(t.numel() * dtype.itemsize for t in args[:2] if t.dtype != dtype)


def _index(args: tuple, out: Tensor) -> int:
    """Indices of 32 bits are widened to 64: of 96,768, 756 KiB."""
    return sum(8 * i.numel() for i in args[1] if i is not None and i.dtype == torch.int32)


def _batch_norm(args: tuple, out: tuple[Tensor, ...]) -> int:
    """Two or three sums a channel."""
    return 12 * args[0].shape[1]


def _batch_norm_backward(args: tuple, out: tuple[Tensor | None, ...]) -> int:
    """The input's gradient twice, where the kernel for channels_last runs.

    32×96×48×48: 27 MiB beside the result of 27 MiB.
    """
    twice = out[0] is not None and _is_channels_last(args[0]) and _is_channels_last(args[1])
    return (out[0].nbytes if twice else 0) + 12 * args[0].shape[1]


def _convolution(args: tuple, out: Tensor) -> int:
    """The weight once more, blocked; an input in another layout once more.

    32×320×3×3 to 1280 channels: 1,628 KiB, of which the weight's are 1,600.
    """
    x, weight, _, stride, _, dilation = args[:6]
    copies = 0 if _is_channels_last(x) else x.numel() * 4
    if not _is_onednn(x, weight, stride, dilation):
        return copies + _columns(x, weight, out, stride, dilation)
    scratch = copies + _blocked(weight, weight.shape[0])
    # If neither is channels_last, the output is laid out anew, when the rest is gone.
    return max(scratch, out.nbytes) if copies else scratch


def _convolution_backward(args: tuple, out: tuple[Tensor | None, ...]) -> int:
    """Weight and weight gradient once more, blocked; inputs in another layout once more."""
    d_out, x, weight, _, stride, _, dilation, _, _, groups, mask = args
    copies = sum(t.numel() * 4 for t in (d_out, x) if not _is_channels_last(t))
    if not _is_onednn(x, weight, stride, dilation):
        return copies + _columns(x, weight, d_out, stride, dilation)
    scratch = _blocked(weight, weight.shape[1]) if mask[0] else 0
    if mask[1] and groups > 1 and (weight.shape[3] > 3 or x.shape[3] < weight.shape[3]):
        # 5×5 depthwise, or 3×3 on narrower maps: 256 partial sums. 1152 channels: 28 MiB.
        scratch = 257 * weight.nbytes
    elif mask[1]:
        outputs, inputs, *kernel = weight.shape
        blocked = _up(outputs, 16) * (_up(inputs, 16) if inputs > 3 else inputs)
        scratch = max(scratch, weight.nbytes + 4 * blocked * prod(kernel))
    return copies + scratch


def _is_onednn(x: Tensor, weight: Tensor, stride: list[int], dilation: list[int]) -> bool:
    """Whether oneDNN runs a conv, and not a matrix product; as ATen's `use_mkldnn` decides."""
    kernel = tuple(weight.shape[2:])
    depthwise = weight.shape[1] == 1 and x.shape[1] > 1
    if not (depthwise or min(kernel) > 3 or len(x) > 1 or x.numel() > 20480):
        return False
    return (
        kernel != (1, 1)
        or len(x) >= 16
        or max(*stride, *dilation) > 1
        or torch.get_num_threads() > 1
    )


def _columns(x: Tensor, weight: Tensor, out: Tensor, stride: list[int], dilation: list[int]) -> int:
    """What a kernel sees of each image, for the matrix product; of a plain 1×1 the map itself."""
    if tuple(weight.shape[2:]) == (1, 1) and max(*stride, *dilation) == 1:
        return 0
    return 4 * len(x) * weight[0].numel() * prod(out.shape[2:])


def _blocked(weight: Tensor, channels: int) -> int:
    """Bytes of a weight as oneDNN wants it, padded to blocks of these channels of it."""
    if weight.shape[1] == 1:
        return 4 * _up(len(weight), 16) * weight[0].numel()
    block = 48 if channels >= 192 else 32 if channels > 16 else 16
    return 4 * weight.numel() // channels * _up(channels, block) + _PRIMITIVE


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


_RULES: dict[Any, Callable[[tuple, Any], int]] = {
    _aten.convolution.default: _convolution,
    _aten.convolution_backward.default: _convolution_backward,
    _aten.native_batch_norm.default: _batch_norm,
    _aten.native_batch_norm_backward.default: _batch_norm_backward,
    _aten.index.Tensor: _index,
}
