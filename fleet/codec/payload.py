"""State or update ↔ bytes, with exact sizes.

All tensors of a plan travel as one run of bytes, in the plan's order. Names
and shapes do not: both sides derive them from the plan, and compare its
digest before anything is read.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fleet.codec.dense import Format, Rounding, float16, float32, nearest, quantised, stochastic
from fleet.codec.names import CodecName, parse_codec
from fleet.codec.sparse import keep_largest, sparse
from fleet.errors import ConfigError, UpdateError
from fleet.plan import TensorSpec, UpdatePlan
from fleet.state import Arrays, check_arrays


@dataclass(frozen=True)
class Payload:
    """Encoded tensors and what is needed to decode them.

    Attributes:
        codec: name of the codec that wrote `data`.
        plan_digest: of the plan whose tensors these are.
        data: size of every tensor but the last (uint32), then the tensors, in
            the plan's order. Bytes, or what slices to bytes, as a file does
            that is read in parts.
    """

    codec: str
    plan_digest: str
    data: bytes

    @property
    def nbytes(self) -> int:
        """Size of the encoded tensors; the message around them counts its own."""
        return len(self.data)


def encode(
    arrays: Arrays, plan: UpdatePlan, codec: str = "float32", seed: Sequence[int] = (0,)
) -> Payload:
    """Encode all tensors of a plan.

    Args:
        arrays: finite float32.
        codec: as `parse_codec` takes it.
        seed: of stochastic rounding; every tensor has a stream of its own.

    Raises:
        ConfigError: for an unknown codec.
        UpdateError: if names, shapes or dtypes are not the plan's, or a number
            is not finite and the codec rounds.
    """
    name = parse_codec(codec)
    check_arrays(arrays, plan)
    if name != parse_codec("float32"):
        for key, array in arrays.items():
            if not np.isfinite(array).all():
                raise UpdateError(f"{key} holds NaN or infinity; lower the learning rate")
    if name.sparse:
        weights = {s.name: arrays[s.name] for s in plan.specs if _is_sparse(name, s)}
        arrays = {**arrays, **keep_largest(weights, name.share)}

    def rounding(spec: TensorSpec) -> Rounding:
        if name.feedback:
            return nearest
        return stochastic(np.random.default_rng([*seed, *spec.name.encode()]))

    parts = [_format(name, spec).encode(arrays[spec.name], rounding(spec)) for spec in plan.specs]
    sizes = np.array([len(part) for part in parts[:-1]], "<u4").tobytes()
    return Payload(codec=codec, plan_digest=plan.digest, data=b"".join([sizes, *parts]))


def decode(payload: Payload, plan: UpdatePlan) -> dict[str, np.ndarray]:
    """Decode all tensors of a payload, by name, in float32.

    Raises:
        UpdateError: as `EncodedArrays`.
    """
    return dict(EncodedArrays(payload, plan))


class EncodedArrays(Mapping[str, np.ndarray]):
    """The tensors of a payload by name, each decoded anew whenever it is asked for.

    A thousand clients' updates so take the memory of their bytes, and of one
    tensor.

    Args:
        payload: that must hold just a plan's tensors.
        plan: theirs.
        names: those to show; None: all.

    Raises:
        UpdateError: if the payload is of another plan or codec, or its sizes do
            not fit; nothing is allocated before that is known. And as a tensor
            is asked for, if its bytes are damaged.
    """

    def __init__(
        self, payload: Payload, plan: UpdatePlan, names: Sequence[str] | None = None
    ) -> None:
        try:
            self._codec = parse_codec(payload.codec)
        except ConfigError as error:
            raise UpdateError(f"payload is in another version's codec: {error}") from error
        if payload.plan_digest != plan.digest:
            raise UpdateError(
                f"payload is of plan {payload.plan_digest[:8]}, expected {plan.digest[:8]}; "
                f"run the server's plan"
            )
        self._payload, self._plan = payload, plan
        shown = [spec.name for spec in plan.specs] if names is None else names
        self._names = dict.fromkeys(shown)  # in that order, and found at once
        _ = self._slices

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        spec = self._plan.by_name[name]
        try:
            data = memoryview(self._payload.data[self._slices[name]])
            return _format(self._codec, spec).decode(data, spec.shape)
        except UpdateError as error:
            raise UpdateError(f"{name} is damaged: {error}") from error

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's own would decode the tensor to see

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def nbytes(self, name: str) -> int:
        """Encoded size of one tensor."""
        where = self._slices[name]
        return where.stop - where.start

    @cached_property
    def _slices(self) -> dict[str, slice]:
        """Where each tensor lies in the payload's data."""
        total, count = self._payload.nbytes, len(self._plan.specs)
        head = 4 * (count - 1)  # there is a tensor at least: every plan trains the head
        if total < head:
            raise UpdateError(f"payload has {total} bytes, the sizes of its tensors alone {head}")
        sizes = np.frombuffer(self._payload.data[:head], "<u4").astype(int).tolist()
        sizes.append(total - head - sum(sizes))
        slices, start = {}, head
        for spec, size in zip(self._plan.specs, sizes, strict=True):
            most = _format(self._codec, spec).most(spec.shape)
            if not 0 <= size <= most:
                raise UpdateError(
                    f"{spec.name} has {size} bytes, {self._payload.codec:.40} takes {most} at "
                    f"most; the payload was cut, padded or damaged"
                )
            slices[spec.name] = slice(start, start + size)
            start += size
        return slices


def most_bytes(plan: UpdatePlan, codec: str) -> int:
    """The most bytes that a payload of a plan takes."""
    name = parse_codec(codec)
    return 4 * (len(plan.specs) - 1) + sum(_format(name, s).most(s.shape) for s in plan.specs)


def _is_sparse(name: CodecName, spec: TensorSpec) -> bool:
    return name.sparse and len(spec.shape) > 1


def _format(name: CodecName, spec: TensorSpec) -> Format:
    """How a codec writes one tensor.

    Statistics travel as values and are never quantised. What has one dimension
    is never sparse, and takes 8 bits unless feedback makes up for fewer.
    """
    if _is_sparse(name, spec):
        return sparse(name.base)
    if name.base == "float32":
        return float32()
    if name.base == "float16" or spec.is_statistic:
        return float16()
    bits = {"int8": 8, "int4": 4}[name.base]
    if len(spec.shape) < 2:
        return quantised(bits if name.feedback else 8, by_channel=False)
    return quantised(bits, by_channel=True)
