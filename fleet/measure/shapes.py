"""What operations give on device "meta": results that have a shape and a layout, no memory.

PyTorch can do that by itself, but mostly in Python: a dry run takes it eight
times as long, and it does not tell the CPU's layouts. What training is made
of therefore stands here.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten


def shape_only(func: Any, args: tuple, kwargs: Mapping) -> Any:
    """Run one operation on tensors of device "meta"; what is not known here PyTorch runs."""
    first = args[0] if args else None
    if not isinstance(first, Tensor | list) or _device(first) != "meta":
        return func(*args, **kwargs)
    if (into := kwargs.get("out", kwargs.get("grad_input"))) is not None:
        return into
    rule = _RULES.get(func)
    if rule is None:
        rule = _RULES[func] = _usual_rule(func)
    return rule(*args, **kwargs)


def _device(first: Tensor | list) -> str:
    tensor = first[0] if isinstance(first, list) and first else first
    return tensor.device.type if isinstance(tensor, Tensor) else ""


def _usual_rule(func: Any) -> Callable:
    """For operations that have no rule of their own."""
    name = func._schema.name
    if name.endswith("_") and not name.endswith("__") and torch.Tag.inplace_view not in func.tags:
        return lambda x, *args, **kwargs: x
    if torch.Tag.pointwise in func.tags and len(func._schema.returns) == 1:
        return _comparison if name.partition("::")[2] in _COMPARISONS else _pointwise
    return func


_COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not"}


def _pointwise(*args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    # What is expanded leaves the layout to others.
    widest = max(tensors, key=lambda t: (t.numel(), 0 not in t.stride()))
    if dtype is None:
        dtype = tensors[0].dtype
        if len(args) > 1 and isinstance(args[1], Tensor | int | float):
            dtype = torch.result_type(args[0], args[1])
    rank = max(t.ndim for t in tensors)
    wide = [(1,) * (rank - t.ndim) + t.shape for t in tensors]
    shape = tuple(map(max, *wide)) if len(wide) > 1 else widest.shape
    return _like(widest, dtype=dtype) if shape == widest.shape else _new(widest, shape, dtype)


def _comparison(*args: Any, **kwargs: Any) -> Tensor:
    return _pointwise(*args, dtype=torch.bool)


def _like(
    x: Tensor,
    *,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    **kwargs: Any,
) -> Tensor:
    """Of x's shape; of its layout too, if that has no gaps."""
    if memory_format in (None, torch.preserve_format):
        reach = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        if reach == x.numel():
            return torch.empty_strided(x.shape, x.stride(), dtype=dtype or x.dtype, device=x.device)
        memory_format = _layout(x)
    return _new(x, x.shape, dtype, memory_format)


def _new(
    x: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=memory_format)


def _layout(*tensors: Tensor) -> torch.memory_format:
    """channels_last if any is, gaps or not; what is expanded is neither."""
    if any(t.ndim == 4 and t.stride(1) == 1 and 0 not in t.stride() for t in tensors):
        return torch.channels_last
    return torch.contiguous_format


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    *others: Any,
) -> Tensor:
    if transposed or x.ndim != 4:
        return _aten.convolution.default(
            x, weight, bias, stride, padding, dilation, transposed, *others
        )
    sizes = [
        (n + 2 * padding[i % len(padding)] - dilation[i % len(dilation)] * (kernel - 1) - 1)
        // stride[i % len(stride)]
        + 1
        for i, (n, kernel) in enumerate(zip(x.shape[2:], weight.shape[2:], strict=True))
    ]
    shape = (x.shape[0], weight.shape[0], *sizes)
    return _new(x, shape, memory_format=_layout(x, weight))


def _convolution_backward(
    d_out: Tensor, x: Tensor, weight: Tensor, bias_sizes: list[int] | None, *others: Any
) -> tuple[Tensor | None, ...]:
    wants_input, wants_weight, wants_bias = others[-1]
    return (
        _new(x, x.shape, memory_format=_layout(x, weight)) if wants_input else None,
        _like(weight) if wants_weight else None,
        _new(x, bias_sizes) if wants_bias else None,
    )


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.shape[1:2] if training else (0,)
    return _like(x), _new(x, statistics), _new(x, statistics)


def _batch_norm_backward(d: Tensor, x: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
    shapes = (None, x.shape[1:2], x.shape[1:2])
    return tuple(
        (_like(x) if shape is None else _new(x, shape)) if wanted else None
        for wanted, shape in zip(others[-1], shapes, strict=True)
    )


def _reduction(
    x: Tensor,
    dims: list[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    gone = {d % x.ndim for d in dims} if dims else set(range(x.ndim))
    if keepdim:
        shape = [1 if i in gone else n for i, n in enumerate(x.shape)]
    else:
        shape = [n for i, n in enumerate(x.shape) if i not in gone]
    return _new(x, shape, dtype)


def _pad(x: Tensor, pad: list[int], value: float = 0) -> Tensor:
    shape = list(x.shape)
    for i in range(len(pad) // 2):
        shape[-1 - i] += pad[2 * i] + pad[2 * i + 1]
    return _new(x, shape, memory_format=_layout(x))


def _cat(tensors: list[Tensor], dim: int = 0) -> Tensor:
    shape = list(tensors[0].shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    return _new(tensors[0], shape, memory_format=_layout(tensors[0]))


def _index(x: Tensor, indices: list[Tensor | None]) -> Tensor:
    """A mask picks nothing: here masks are for exceptions, which shapes cannot tell of."""
    if any(i is not None and i.dtype == torch.bool for i in indices):
        picked = dict.fromkeys((d for d, i in enumerate(indices) if i is not None), 0)
        return _new(x, [picked.get(d, n) for d, n in enumerate(x.shape)])
    if len(indices) == 1:
        return _new(x, (*indices[0].shape, *x.shape[1:]))
    return _aten.index.Tensor(x, indices)


def _nll_loss(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, *others: Any
) -> tuple[Tensor, Tensor]:
    return _new(x, x.shape[:1] if reduction == 0 else ()), _new(x, ())


_RULES: dict[Any, Callable] = {
    **dict.fromkeys(
        (
            _aten.hardswish.default,
            _aten.hardswish_backward.default,
            _aten.hardtanh_backward.default,
            _aten.hardsigmoid_backward.default,
        ),
        lambda x, *args: _like(x),
    ),
    _aten.convolution.default: _convolution,
    _aten.convolution_backward.default: _convolution_backward,
    _aten.native_batch_norm.default: _batch_norm,
    _aten.native_batch_norm_backward.default: _batch_norm_backward,
    _aten.sum.dim_IntList: _reduction,
    _aten.sum.default: _reduction,
    _aten.mean.dim: _reduction,
    _aten.amax.default: _reduction,
    _aten.amin.default: _reduction,
    _aten.where.self: lambda condition, a, b: _pointwise(a, b, condition),
    _aten.threshold_backward.default: lambda d, x, *args: _pointwise(x, d),  # x's layout leads
    _aten.constant_pad_nd.default: _pad,
    _aten.cat.default: _cat,
    _aten.index.Tensor: _index,
    _aten.mm.default: lambda a, b: _new(a, (a.shape[0], b.shape[1])),
    _aten.addmm.default: lambda c, a, b, **kwargs: _new(a, (a.shape[0], b.shape[1])),
    _aten._log_softmax.default: lambda x, *args: _like(x),
    _aten._log_softmax_backward_data.default: lambda d, *args: _like(d),
    _aten.nll_loss_forward.default: _nll_loss,
    _aten.nll_loss_backward.default: lambda d, x, *args: _like(x),
    **dict.fromkeys(
        (
            _aten.empty_like.default,
            _aten.zeros_like.default,
            _aten.ones_like.default,
            _aten.clone.default,
        ),
        _like,
    ),
    **dict.fromkeys(
        (_aten.new_empty.default, _aten.new_zeros.default, _aten.new_ones.default),
        lambda x, shape, *, dtype=None, **kwargs: _new(x, shape, dtype),
    ),
}
