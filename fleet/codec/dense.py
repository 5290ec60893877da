"""Formats that send every number of a tensor: as float32 or float16, or rounded to int8 or int4."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fleet.codec.bits import bound, pack, unpack
from fleet.errors import UpdateError

Shape = tuple[int, ...]

# Levels as float32 or float64, any shape → whole numbers as such floats, next to them.
Rounding = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Format:
    """How one tensor becomes bytes and comes back.

    Attributes:
        most: shape → the most bytes that it takes.
        encode: finite float32 array and rounding → bytes.
        decode: bytes and shape → float32 array of that shape, or UpdateError.
            What it allocates is bounded by the shape. Numbers may be inf or NaN
            if the bytes were not written by `encode`.
    """

    most: Callable[[Shape], int]
    encode: Callable[[np.ndarray, Rounding], bytes]
    decode: Callable[[memoryview, Shape], np.ndarray]


def nearest(levels: np.ndarray) -> np.ndarray:
    """Round to the nearest whole number, halves to even."""
    return np.rint(levels)


def stochastic(rng: np.random.Generator) -> Rounding:
    """Round up with the probability of the fraction, else down, so that the mean stays.

    Random numbers have 16 bits: the mean is off by 2^-17 of a level at most.
    """

    def round_(levels: np.ndarray) -> np.ndarray:
        words = np.frombuffer(rng.bytes(2 * levels.size), "<u2").astype(np.float32)
        # Half a 65536th more, so that whole numbers stay and errors of 16 bits cancel.
        words += np.float32(0.5)
        words *= np.float32(2**-16)
        return np.floor(levels + words.reshape(levels.shape))

    return round_


def float32() -> Format:
    """Four bytes a number, bit for bit."""

    def decode(data: memoryview, shape: Shape) -> np.ndarray:
        check_size(data, 4 * size_of(shape))
        return np.frombuffer(data, "<f4").astype(np.float32).reshape(shape)

    return Format(
        most=lambda shape: 4 * size_of(shape),
        encode=lambda array, rounding: array.astype("<f4", copy=False).tobytes(),
        decode=decode,
    )


def float16() -> Format:
    """Two bytes a number, and one for the tensor's exponent.

    Numbers are divided by a power of two that puts the largest between 2^14
    and 2^15: none overflows, and all down to 2^-28 of the largest are within a
    relative 2^-11. Smaller ones are off by at most 2^-39 of the largest, and
    never change sign.
    """

    def nbytes(shape: Shape) -> int:
        return 1 + 2 * size_of(shape)

    def encode(array: np.ndarray, rounding: Rounding) -> bytes:
        exponent = max(_exponent(_largest(array)), -_EXPONENT_BIAS)
        scaled = _times_power_of_two(array, 15 - exponent)
        np.clip(scaled, -_BELOW_2_15, _BELOW_2_15, out=scaled)  # 2^15 may be 2^128 as it comes back
        return bytes([exponent + _EXPONENT_BIAS]) + scaled.astype("<f2").tobytes()

    def decode(data: memoryview, shape: Shape) -> np.ndarray:
        check_size(data, nbytes(shape))
        numbers = np.frombuffer(data[1:], "<f2").astype(np.float32).reshape(shape)
        return _times_power_of_two(numbers, data[0] - _EXPONENT_BIAS - 15)

    return Format(nbytes, encode, decode)


def quantised(bits: int, *, by_channel: bool) -> Format:
    """Rounding to the whole levels −L to L, L = 2^(bits − 1) − 1.

    A level is worth peak/L, with the largest magnitude of the tensor as peak;
    by channel (index along the first dimension), that of the channel, rounded
    up to a 65535th of the tensor's. Rounded stochastically, every decoded
    number is less than a level off and has expectation x; none is beyond the
    tensor's peak, and a channel of zeros stays one.

    Layout: the tensor's peak (float32); by channel, a factor for each
    (uint16); the levels from −L on as 0 to 2L, Huffman-coded.

    Source: QSGD, Alistarh et al., arXiv:1610.02132, with the largest
    magnitude in place of the norm.
    """
    levels = 2 ** (bits - 1) - 1

    def scale_bytes(shape: Shape) -> int:
        return 4 + 2 * shape[0] if by_channel else 4

    def most(shape: Shape) -> int:
        return scale_bytes(shape) + bound(size_of(shape))

    def encode(array: np.ndarray, rounding: Rounding) -> bytes:
        rows = _rows(array, array.shape, by_channel)
        peaks = np.maximum(rows.max(axis=1, initial=0), -rows.min(axis=1, initial=0))
        peak = peaks.max(initial=0)
        factors = np.ceil(_FULL * (peaks.astype(np.float64) / (peak or 1))).astype("<u2")
        steps = _steps(float(peak), factors, levels)
        scaled = _times_power_of_two(rows, -_exponent(float(peak)))
        scaled /= np.where(steps > 0, steps, 1)[:, None]
        scaled = rounding(scaled)
        np.clip(scaled, -levels, levels, out=scaled)  # float32 may take a peak to L + 10^-5
        codes = (scaled + np.float32(levels)).astype(np.uint8).ravel()
        scales = factors.tobytes() if by_channel else b""
        return peak.astype("<f4").tobytes() + scales + pack(codes)

    def decode(data: memoryview, shape: Shape) -> np.ndarray:
        start, size = scale_bytes(shape), size_of(shape)
        if len(data) < start:
            raise UpdateError(f"{len(data)} bytes are fewer than the {start} of the scales")
        codes = unpack(data[start:], size, 2 * levels)
        factors = np.frombuffer(data[4:start], "<u2") if by_channel else np.array([_FULL], "<u2")
        peak = float(np.frombuffer(data[:4], "<f4")[0])
        if not 0 <= peak < math.inf:
            raise UpdateError(f"largest magnitude is {peak}; it was damaged")
        rows = _rows(codes, shape, by_channel).astype(np.float32)
        rows -= levels
        rows *= _steps(peak, factors, levels)[:, None]
        return _times_power_of_two(rows, _exponent(peak)).reshape(shape)

    return Format(most, encode, decode)


def check_size(data: memoryview, nbytes: int) -> None:
    """UpdateError unless there are so many bytes."""
    if len(data) != nbytes:
        raise UpdateError(f"{len(data)} bytes where {nbytes} belong; they were cut or padded")


def size_of(shape: Shape) -> int:
    """How many numbers a shape holds."""
    return math.prod(shape)


_BELOW_2_15 = np.float32(32752)  # the largest float16 below 2^15
_EXPONENT_BIAS = 127  # exponents −127 to 128 in a byte
_FULL = 65535  # factor of the channel that holds the tensor's peak


def _largest(array: np.ndarray) -> float:
    return float(max(array.max(initial=0), -array.min(initial=0)))


def _exponent(peak: float) -> int:
    """The e with 2^(e−1) ≤ peak < 2^e; 0 for zero."""
    return math.frexp(peak)[1]


def _times_power_of_two(array: np.ndarray, exponent: int) -> np.ndarray:
    """A float32 copy times 2^exponent, in two steps: 2^exponent itself may be no float32."""
    with np.errstate(over="ignore", invalid="ignore"):  # of damaged bytes; found as not finite
        scaled = np.empty(array.shape, np.float32)  # a product without dimensions is no array
        np.multiply(array, np.float32(2.0 ** (exponent // 2)), out=scaled)
        scaled *= np.float32(2.0 ** (exponent - exponent // 2))
    return scaled


def _steps(peak: float, factors: np.ndarray, levels: int) -> np.ndarray:
    """(channels,) float32: a level of every channel, over 2^exponent of the peak.

    Without that power, levels of tiny tensors would be subnormal and inexact.
    """
    exact = math.frexp(peak)[0] * factors.astype(np.float64) / (_FULL * levels)
    steps = exact.astype(np.float32)
    # Down, so that no level is beyond the peak: that may be the largest float32.
    return np.where(steps > exact, np.nextafter(steps, np.float32(0)), steps)


def _rows(array: np.ndarray, shape: Shape, by_channel: bool) -> np.ndarray:
    """As (channels, numbers of a channel); as one channel unless `by_channel`."""
    return array.reshape((shape[0], math.prod(shape[1:])) if by_channel else (1, math.prod(shape)))
