"""Formats that send every number of a tensor: as float32 or float16, or rounded to int8 or int4.

The size of a tensor in one of these formats follows from its shape alone, so
a receiver knows how many bytes to expect before it reads any.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Format:
    """How one tensor becomes bytes and comes back.

    Attributes:
        nbytes: shape → size of its bytes.
        encode: finite float32 array and generator of random numbers → bytes.
        decode: just those bytes and the shape → float32 array. Any bytes of
            that size decode; what overflows becomes inf or NaN.
    """

    nbytes: Callable[[Shape], int]
    encode: Callable[[np.ndarray, np.random.Generator], bytes]
    decode: Callable[[memoryview, Shape], np.ndarray]


def float32() -> Format:
    """Four bytes a number, bit for bit."""
    return Format(
        nbytes=lambda shape: 4 * math.prod(shape),
        encode=lambda array, rng: array.astype("<f4").tobytes(),
        decode=lambda data, shape: np.frombuffer(data, "<f4").astype(np.float32).reshape(shape),
    )


def float16() -> Format:
    """Two bytes a number, and one for the tensor's exponent.

    Numbers are divided by a power of two that puts the largest between 2^14
    and 2^15: none overflows, and all down to 2^-29 of the largest are within a
    relative 2^-11. Smaller ones are within 2^-40 of the largest, and never
    change sign. Numbers of a tensor that is wholly below 2^-112 lose no range.
    """

    def encode(array: np.ndarray, rng: np.random.Generator) -> bytes:
        exponent = max(_exponent(_largest(array)), -_EXPONENT_BIAS)
        scaled = _times_power_of_two(array, 15 - exponent)
        np.clip(scaled, -_BELOW_2_15, _BELOW_2_15, out=scaled)  # 2^15 may be 2^128 as it comes back
        return bytes([exponent + _EXPONENT_BIAS]) + scaled.astype("<f2").tobytes()

    def decode(data: memoryview, shape: Shape) -> np.ndarray:
        numbers = np.frombuffer(data[1:], "<f2").astype(np.float32).reshape(shape)
        return _times_power_of_two(numbers, data[0] - _EXPONENT_BIAS - 15)

    return Format(lambda shape: 1 + 2 * math.prod(shape), encode, decode)


def quantised(bits: int, *, by_channel: bool) -> Format:
    """Stochastic rounding to the whole levels −L to L, L = 2^(bits − 1) − 1.

    A level is worth peak/L, with the largest magnitude of the tensor as peak;
    by channel (index along the first dimension), that of the channel, rounded
    up to a 65535th of the tensor's. x/level is rounded up with the
    probability of its fraction, else down: every decoded number is less than
    a level off and has expectation x (to 2^-17 of a level, as the random
    numbers have 16 bits). A channel of zeros stays one.

    Layout: the tensor's peak (float32); by channel, a factor for each
    (uint16); then 8 bits a number, or two numbers a byte, low half first.

    Source: QSGD, Alistarh et al., arXiv:1610.02132, with the largest
    magnitude in place of the norm.
    """
    levels = 2 ** (bits - 1) - 1

    def scale_bytes(shape: Shape) -> int:
        return 4 + 2 * shape[0] if by_channel else 4

    def nbytes(shape: Shape) -> int:
        return scale_bytes(shape) + (bits * math.prod(shape) + 7) // 8

    def encode(array: np.ndarray, rng: np.random.Generator) -> bytes:
        rows = _rows(array, array.shape, by_channel)
        peaks = np.maximum(rows.max(axis=1, initial=0), -rows.min(axis=1, initial=0))
        peak = peaks.max(initial=0)
        factors = np.ceil(_FULL * (peaks.astype(np.float64) / (peak or 1))).astype("<u2")
        steps = _steps(float(peak), factors, levels)
        scaled = _times_power_of_two(rows, -_exponent(float(peak)))
        scaled /= np.where(steps > 0, steps, 1)[:, None]
        # Half a 65536th, so that whole numbers stay and errors of 16 bits cancel.
        scaled += (_random16(rng, rows.shape) + np.float32(0.5)) * np.float32(2**-16)
        np.floor(scaled, out=scaled)
        np.clip(scaled, -levels, levels, out=scaled)  # float32 may take a peak to L + 10^-5
        codes = scaled.astype(np.int8).ravel()
        scales = factors.tobytes() if by_channel else b""
        return peak.astype("<f4").tobytes() + scales + _pack(codes, bits)

    def decode(data: memoryview, shape: Shape) -> np.ndarray:
        peak = float(np.frombuffer(data[:4], "<f4")[0])
        start = scale_bytes(shape)
        factors = np.frombuffer(data[4:start], "<u2") if by_channel else np.array([_FULL], "<u2")
        codes = _unpack(data[start:], bits, math.prod(shape))
        rows = _rows(codes, shape, by_channel).astype(np.float32)
        rows *= _steps(peak, factors, levels)[:, None]
        return _times_power_of_two(rows, _exponent(peak)).reshape(shape)

    return Format(nbytes, encode, decode)


_BELOW_2_15 = np.float32(32752)  # the largest float16 below 2^15
_EXPONENT_BIAS = 127  # exponents −127 to 128 in a byte
_FULL = 65535  # factor of the channel that holds the tensor's peak


def _largest(array: np.ndarray) -> float:
    return float(max(array.max(initial=0), -array.min(initial=0)))


def _exponent(peak: float) -> int:
    """The e with 2^(e−1) ≤ |peak| < 2^e; 0 for zero, inf and NaN."""
    return math.frexp(peak)[1] if math.isfinite(peak) else 0


def _times_power_of_two(array: np.ndarray, exponent: int) -> np.ndarray:
    """A float32 copy times 2^exponent, in two steps: 2^exponent itself may be no float32."""
    scaled = array * np.float32(2.0 ** (exponent // 2))
    scaled *= np.float32(2.0 ** (exponent - exponent // 2))
    return scaled


def _steps(peak: float, factors: np.ndarray, levels: int) -> np.ndarray:
    """(channels,) float32: a level of every channel, over 2^exponent of the peak.

    Without that power, levels of tiny tensors would be subnormal and inexact.
    """
    mantissa = math.frexp(peak)[0]
    return (mantissa * factors.astype(np.float64) / (_FULL * levels)).astype(np.float32)


def _rows(array: np.ndarray, shape: Shape, by_channel: bool) -> np.ndarray:
    """As (channels, numbers of a channel); as one channel unless `by_channel`."""
    return array.reshape((shape[0], math.prod(shape[1:])) if by_channel else (1, math.prod(shape)))


def _random16(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    """Whole numbers from 0 to 65535, as float32."""
    words = np.frombuffer(rng.bytes(2 * math.prod(shape)), "<u2")
    return words.astype(np.float32).reshape(shape)


def _pack(codes: np.ndarray, bits: int) -> bytes:
    """Whole numbers as int8, or two a byte: 8 more than each, so 1 to 15."""
    if bits == 8:
        return codes.tobytes()
    halves = np.zeros(len(codes) + len(codes) % 2, np.uint8)
    halves[: len(codes)] = codes + 8
    return (halves[0::2] | halves[1::2] << 4).tobytes()


def _unpack(data: memoryview, bits: int, size: int) -> np.ndarray:
    if bits == 8:
        return np.frombuffer(data, np.int8)
    pairs = np.frombuffer(data, np.uint8)
    halves = np.empty((len(pairs), 2), np.int8)
    halves[:, 0], halves[:, 1] = pairs & 15, pairs >> 4
    return halves.ravel()[:size] - np.int8(8)
