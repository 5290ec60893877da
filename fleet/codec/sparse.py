"""The largest numbers of a tensor alone: where they lie, and what they are."""

import math

import numpy as np

from fleet.codec.bits import bound, inflate, pack, unpack
from fleet.codec.dense import Format, Rounding, Shape, float16, float32, size_of
from fleet.errors import UpdateError

_JUMP = 255  # a gap byte that passes over so many numbers and names none


def sparse(base: str) -> Format:
    """The numbers of a tensor that are not zero; all others come back as zero.

    Which ones those are, `keep_largest` has settled before. Layout: how many
    (uint32), how many bytes their gaps take (uint32), the packed gaps, and the
    values as `base` writes them.

    Positions are gaps of a byte each, in the order of the tensor, and packed:
    with a share of 1 % that takes 8.15 bits a number, where the entropy is
    8.08. Values in int8 and int4 are a sign and a magnitude on even levels
    between the smallest and the largest that is kept: levels around nought
    would be wasted on numbers that are not sent.
    """
    values = _VALUES[base]

    def encode(array: np.ndarray, rounding: Rounding) -> bytes:
        flat = array.ravel()
        positions = np.flatnonzero(flat)
        gaps = pack(_gaps(positions))
        head = np.array([len(positions), len(gaps)], "<u4").tobytes()
        return head + gaps + values.encode(flat[positions], rounding)

    def decode(data: memoryview, shape: Shape) -> np.ndarray:
        size = size_of(shape)
        if len(data) < 8:
            raise UpdateError(f"a sparse tensor has {len(data)} bytes, its header alone 8")
        count, gap_bytes = (int(n) for n in np.frombuffer(data[:8], "<u4"))
        if count > size:
            raise UpdateError(f"a sparse tensor names {count} of {size} numbers; it was damaged")
        if 8 + gap_bytes > len(data):
            raise UpdateError(f"gaps take {gap_bytes} bytes of {len(data)}; they were cut")
        positions = _positions(data[8 : 8 + gap_bytes], count, size)
        numbers = values.decode(data[8 + gap_bytes :], (count,))
        array = np.zeros(size, np.float32)
        array[positions] = numbers
        return array.reshape(shape)

    def most(shape: Shape) -> int:
        size = size_of(shape)
        return 8 + bound(size + size // _JUMP) + values.most((size,))

    return Format(most, encode, decode)


def keep_largest(arrays: dict[str, np.ndarray], share: float) -> dict[str, np.ndarray]:
    """Zero all but the numbers of largest magnitude, over all tensors together.

    Args:
        arrays: float32.
        share: of all numbers, how many stay; at least one.

    Returns:
        Copies. Among equal magnitudes the first in the tensors' order stay.

    Source: Stich et al., Sparsified SGD with memory, arXiv:1809.07599.
    """
    total = sum(array.size for array in arrays.values())
    count = max(1, round(share * total))
    if not arrays or count >= total:
        return {name: array.copy() for name, array in arrays.items()}
    magnitudes = np.concatenate([np.abs(array).ravel() for array in arrays.values()])
    threshold = np.partition(magnitudes, total - count)[total - count]
    kept = magnitudes > threshold
    ties = np.flatnonzero(magnitudes == threshold)
    kept[ties[: count - int(kept.sum())]] = True
    bounds = np.cumsum([array.size for array in arrays.values()])[:-1]
    return {
        name: np.where(mask.reshape(array.shape), array, np.float32(0))
        for (name, array), mask in zip(arrays.items(), np.split(kept, bounds), strict=True)
    }


def _gaps(positions: np.ndarray) -> np.ndarray:
    """Rising positions → a byte for each: how many lie between it and the one before."""
    between = np.diff(positions, prepend=-1) - 1
    jumps = between // _JUMP
    gaps = np.full(len(positions) + int(jumps.sum()), _JUMP, np.uint8)
    gaps[np.cumsum(jumps + 1) - 1] = between % _JUMP
    return gaps


def _positions(data: memoryview, count: int, size: int) -> np.ndarray:
    gaps = np.frombuffer(inflate(data, count + size // _JUMP), np.uint8)
    named = gaps != _JUMP
    steps = gaps.astype(np.int64) + named
    positions = np.cumsum(steps)[named] - 1
    ends_well = not len(gaps) or bool(named[-1])
    if len(positions) != count or not ends_well or (count and positions[-1] >= size):
        raise UpdateError(
            f"gaps name {len(positions)} numbers, expected {count} of {size}; they were damaged"
        )
    return positions


def _magnitude_levels(bits: int) -> Format:
    """A row of numbers, each a sign and one of 2^(bits − 1) magnitudes.

    Magnitudes lie evenly from the least to the most. Layout: these two
    (float32); 2·level + 1 if negative, for each number, Huffman-coded.
    """
    top = 2 ** (bits - 1) - 1

    def encode(numbers: np.ndarray, rounding: Rounding) -> bytes:
        magnitudes = np.abs(numbers).astype(np.float64)
        least = np.float32(magnitudes.min() if len(numbers) else 0)
        most = np.float32(magnitudes.max(initial=0))
        levels = np.zeros(len(numbers))
        if most > least:
            levels = (magnitudes - least) / (float(most) - float(least)) * top
        levels = np.clip(rounding(levels), 0, top).astype(np.uint8)
        return np.array([least, most], "<f4").tobytes() + pack(levels << 1 | (numbers < 0))

    def decode(data: memoryview, shape: Shape) -> np.ndarray:
        if len(data) < 8:
            raise UpdateError(f"values take {len(data)} bytes, their range alone 8; they were cut")
        least, most = map(float, np.frombuffer(data[:8], "<f4"))
        if not 0 <= least <= most < math.inf:
            raise UpdateError(f"magnitudes run from {least} to {most}; they were damaged")
        codes = unpack(data[8:], size_of(shape), 2 * top + 1)
        magnitudes = least + (codes >> 1) * ((most - least) / top)
        return np.where(codes & 1, -magnitudes, magnitudes).astype(np.float32)

    return Format(lambda shape: 8 + bound(size_of(shape)), encode, decode)


_VALUES = {
    "float32": float32(),
    "float16": float16(),
    "int8": _magnitude_levels(8),
    "int4": _magnitude_levels(4),
}
