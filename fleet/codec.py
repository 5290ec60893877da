"""State or delta ↔ bytes, with exact sizes.

All tensors of a plan travel as one run of bytes, in the plan's order. What
lies where is said by a layout beside it, so a receiver checks names, shapes
and sizes before it reads, or allocates, anything.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fleet.errors import ConfigError, UpdateError
from fleet.plan import UpdatePlan
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


@dataclass(frozen=True)
class Codec:
    """How one tensor becomes bytes and comes back.

    Attributes:
        encode: float32 array → bytes.
        decode: bytes and shape → float32 array.
        nbytes: shape → size of its bytes, known before decoding.
    """

    encode: Callable[[np.ndarray], bytes]
    decode: Callable[[memoryview, tuple[int, ...]], np.ndarray]
    nbytes: Callable[[tuple[int, ...]], int]


def _floats(shape: tuple[int, ...]) -> int:
    return 4 * int(np.prod(shape, dtype=np.int64))


_CODECS = {
    "float32": Codec(
        encode=lambda array: array.astype("<f4").tobytes(),
        decode=lambda data, shape: np.frombuffer(data, "<f4").astype(np.float32).reshape(shape),
        nbytes=_floats,
    ),
}


def codec(name: str) -> Codec:
    """A codec by name.

    Raises:
        ConfigError: listing the known ones.
    """
    if name not in _CODECS:
        raise ConfigError(f"unknown codec {name}; known: {', '.join(_CODECS)}")
    return _CODECS[name]


def encode(arrays: Arrays, plan: UpdatePlan, codec_name: str = "float32") -> Payload:
    """Encode all tensors of a plan.

    Raises:
        UpdateError: if names, shapes or dtypes are not the plan's.
    """
    check_arrays(arrays, plan)
    write = codec(codec_name).encode
    return Payload(
        codec=codec_name,
        plan_digest=plan.digest,
        names=tuple(spec.name for spec in plan.specs),
        shapes=tuple(spec.shape for spec in plan.specs),
        data=b"".join(write(arrays[spec.name]) for spec in plan.specs),
    )


def decode(payload: Payload, plan: UpdatePlan) -> dict[str, np.ndarray]:
    """Decode a payload that must hold just a plan's tensors.

    Raises:
        UpdateError: if it names another plan, other tensors or other shapes,
            or its size is not theirs; nothing is allocated before that is known.
    """
    _check_layout(payload, plan)
    reader = codec(payload.codec)
    sizes = [reader.nbytes(shape) for shape in payload.shapes]
    if sum(sizes) != payload.nbytes:
        raise UpdateError(
            f"payload has {payload.nbytes} bytes, plan {plan.digest[:8]} in {payload.codec} "
            f"takes {sum(sizes)}; it was cut or padded on the way"
        )
    view, arrays, start = memoryview(payload.data), {}, 0
    for name, shape, size in zip(payload.names, payload.shapes, sizes, strict=True):
        arrays[name] = reader.decode(view[start : start + size], shape)
        start += size
    return arrays


def _check_layout(payload: Payload, plan: UpdatePlan) -> None:
    if payload.codec not in _CODECS:
        raise UpdateError(f"payload is in codec {payload.codec}; known: {', '.join(_CODECS)}")
    if payload.plan_digest != plan.digest:
        raise UpdateError(
            f"payload is of plan {payload.plan_digest[:8]}, expected {plan.digest[:8]}; "
            f"run the server's plan"
        )
    shapes = dict(zip(payload.names, payload.shapes, strict=False))
    if not len(shapes) == len(payload.names) == len(payload.shapes):
        raise UpdateError("payload names a tensor twice, or not every name has a shape")
    check_shapes(shapes, plan)
