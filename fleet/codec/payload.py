"""State or delta ↔ bytes, with exact sizes.

All tensors of a plan travel as one run of bytes, in the plan's order. What
lies where is said by a layout beside it, so a receiver checks names, shapes
and sizes before it reads, or allocates, anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fleet.codec.dense import Format, float16, float32, quantised
from fleet.config import CODECS
from fleet.errors import ConfigError, UpdateError
from fleet.plan import TensorSpec, UpdatePlan
from fleet.state import Arrays, check_arrays, check_shapes


@dataclass(frozen=True)
class Payload:
    """Encoded tensors and what is needed to decode them.

    Attributes:
        codec: name of the codec that wrote `data`.
        plan_digest: of the plan whose tensors these are.
        names, shapes: of the tensors, in the order of `data`.
        data: the encoded tensors, end to end.
    """

    codec: str
    plan_digest: str
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    data: bytes

    @property
    def nbytes(self) -> int:
        """Size of the encoded tensors; the message around them counts its own."""
        return len(self.data)


def _format(codec: str, spec: TensorSpec) -> Format:
    """How a codec writes one tensor.

    Statistics are never quantised, and what has one dimension is too small for
    fewer than 8 bits to pay.
    """
    if codec == "float32":
        return float32()
    if codec == "float16" or spec.is_statistic:
        return float16()
    if len(spec.shape) < 2:
        return quantised(8, by_channel=False)
    return quantised({"int8": 8, "int4": 4}[codec], by_channel=True)


def encode(
    arrays: Arrays, plan: UpdatePlan, codec: str = "float32", seed: Sequence[int] = (0,)
) -> Payload:
    """Encode all tensors of a plan.

    Args:
        arrays: finite float32.
        codec: one of `CODECS`.
        seed: of stochastic rounding; every tensor has a stream of its own.

    Raises:
        ConfigError: for an unknown codec.
        UpdateError: if names, shapes or dtypes are not the plan's, or a number
            is not finite and the codec rounds.
    """
    if codec not in CODECS:
        raise ConfigError(f"unknown codec {codec}; known: {', '.join(CODECS)}")
    check_arrays(arrays, plan)

    def write(spec: TensorSpec) -> bytes:
        array = arrays[spec.name]
        if codec != "float32" and not np.isfinite(array).all():
            raise UpdateError(f"{spec.name} holds NaN or infinity; lower the learning rate")
        rng = np.random.default_rng([*seed, *spec.name.encode()])
        return _format(codec, spec).encode(array, rng)

    return Payload(
        codec=codec,
        plan_digest=plan.digest,
        names=tuple(spec.name for spec in plan.specs),
        shapes=tuple(spec.shape for spec in plan.specs),
        data=b"".join(write(spec) for spec in plan.specs),
    )


def decode(payload: Payload, plan: UpdatePlan) -> dict[str, np.ndarray]:
    """Decode a payload that must hold just a plan's tensors.

    Raises:
        UpdateError: if it names another plan, other tensors or other shapes,
            or its size is not theirs; nothing is allocated before that is known.
    """
    _check_layout(payload, plan)
    formats = [_format(payload.codec, plan.by_name[name]) for name in payload.names]
    sizes = [f.nbytes(shape) for f, shape in zip(formats, payload.shapes, strict=True)]
    if sum(sizes) != payload.nbytes:
        raise UpdateError(
            f"payload has {payload.nbytes} bytes, plan {plan.digest[:8]} in {payload.codec} "
            f"takes {sum(sizes)}; it was cut or padded on the way"
        )
    view, arrays, start = memoryview(payload.data), {}, 0
    for name, shape, form, size in zip(payload.names, payload.shapes, formats, sizes, strict=True):
        arrays[name] = form.decode(view[start : start + size], shape)
        start += size
    return arrays


def _check_layout(payload: Payload, plan: UpdatePlan) -> None:
    if payload.codec not in CODECS:
        raise UpdateError(f"payload is in codec {payload.codec}; known: {', '.join(CODECS)}")
    if payload.plan_digest != plan.digest:
        raise UpdateError(
            f"payload is of plan {payload.plan_digest[:8]}, expected {plan.digest[:8]}; "
            f"run the server's plan"
        )
    shapes = dict(zip(payload.names, payload.shapes, strict=False))
    if not len(shapes) == len(payload.names) == len(payload.shapes):
        raise UpdateError("payload names a tensor twice, or not every name has a shape")
    check_shapes(shapes, plan)
