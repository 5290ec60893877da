"""Whole numbers ↔ bytes, where both sides know about how large each one is.

Of a number that is expected near ±2^m only the bits above 2^m say anything
surprising. Those go through Huffman's code; the ones below are noise, and go as
they are. For normal deviates that is within a tenth of a bit of the entropy.

Source: Golomb–Rice coding (Rice, JPL 79-22), Huffman's code in place of the
unary one.
"""

import zlib

import numpy as np

from fleet.errors import UpdateError

QUARTERS = 4  # magnitudes are counted in quarters of a bit

_ESCAPE = 255  # the high part does not fit a byte
_LIMIT = 2**62


def quarter_log2(values: np.ndarray) -> np.ndarray:
    """⌊4·log2(max(x, 1))⌋ as int32, of whole numbers; the same on every machine."""
    mantissa, exponent = np.frexp(np.maximum(values, 1).astype(np.float64))
    above = sum((mantissa >= bound).astype(np.int32) for bound in _BOUNDS)
    return QUARTERS * (exponent.astype(np.int32) - 1) + above


_BOUNDS = (0.5946035575013605, 0.7071067811865476, 0.8408964152537145)  # 2^(−3/4), 2^(−1/2), …


def pack(values: np.ndarray, magnitudes: np.ndarray) -> bytes:
    """Encode whole numbers.

    Args:
        values: (N,) int64, below 2^62.
        magnitudes: (N,), 4·log2 of their expected sizes; the closer, the fewer bytes.
    """
    shifts, order = _shifts(magnitudes), _order(magnitudes)
    high = values >> shifts
    codes = np.where(high < 0, -2 * high - 1, 2 * high)[order]
    escaped = high[order][codes >= _ESCAPE]
    squeezed = _deflate(np.minimum(codes, _ESCAPE).astype(np.uint8).tobytes())
    planes = [
        np.packbits(((values[shifts > bit] >> bit) & 1).astype(bool)).tobytes()
        for bit in range(int(shifts.max(initial=0)))
    ]
    length = len(squeezed).to_bytes(4, "little")
    return b"".join([length, squeezed, escaped.astype("<i8").tobytes(), *planes])


def unpack(stream: "Reader", magnitudes: np.ndarray) -> np.ndarray:
    """Decode what `pack` wrote for the same magnitudes.

    Raises:
        UpdateError: for bytes that it never writes.
    """
    shifts, order = _shifts(magnitudes), _order(magnitudes)
    squeezed = stream.take(int.from_bytes(stream.take(4), "little"))
    codes = np.frombuffer(_inflate(squeezed, len(shifts)), np.uint8).astype(np.int64)
    escapes = np.flatnonzero(codes == _ESCAPE)
    sorted_high = np.where(codes % 2, -(codes + 1) // 2, codes // 2)
    sorted_high[escapes] = np.frombuffer(stream.take(8 * len(escapes)), "<i8")
    high = np.empty_like(sorted_high)
    high[order] = sorted_high
    if ((high < -_LIMIT >> shifts) | (high > _LIMIT >> shifts)).any():
        raise UpdateError("moments hold a number beyond 2^62; they were changed on the way")
    values = high << shifts
    for bit in range(int(shifts.max(initial=0))):
        there = np.flatnonzero(shifts > bit)
        plane = np.frombuffer(stream.take((len(there) + 7) // 8), np.uint8)
        values[there] |= np.unpackbits(plane, count=len(there)).astype(np.int64) << bit
    return values


class Reader:
    """Bytes from the front on; none is copied before it is known to be there."""

    def __init__(self, data: bytes) -> None:
        self._rest = memoryview(data)

    def take(self, length: int) -> memoryview:
        """The next bytes.

        Raises:
            UpdateError: if there are fewer.
        """
        if length > len(self._rest):
            raise UpdateError(
                f"moments end {length - len(self._rest)} bytes early; they were cut on the way"
            )
        taken, self._rest = self._rest[:length], self._rest[length:]
        return taken

    def end(self) -> None:
        """Make sure that nothing is left.

        Raises:
            UpdateError: if something is.
        """
        if len(self._rest):
            raise UpdateError(
                f"moments have {len(self._rest)} bytes too many; they were padded on the way"
            )


def _shifts(magnitudes: np.ndarray) -> np.ndarray:
    """Bits of each number that go as they are: down to half its size."""
    return np.clip(magnitudes.astype(np.int64) // QUARTERS - 1, 0, 48)


def _order(magnitudes: np.ndarray) -> np.ndarray:
    """Like beside like: deflate makes a new Huffman code every few thousand bytes."""
    left = magnitudes - QUARTERS * _shifts(magnitudes)
    return np.argsort(np.clip(left, -64, 127).astype(np.int8), kind="stable")


def _deflate(data: bytes) -> bytes:
    """The shorter of Huffman's code alone and with repetitions."""
    tries = []
    for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY):
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
        tries.append(deflate.compress(data) + deflate.flush())
    return min(tries, key=len)


def _inflate(data: memoryview, length: int) -> bytes:
    """Just `length` bytes; never makes more than one beyond that."""
    inflate = zlib.decompressobj(-15)
    try:
        inflated = inflate.decompress(data, length + 1)
    except zlib.error as error:
        raise UpdateError(
            f"moments do not inflate: {error}; they were changed on the way"
        ) from error
    if len(inflated) != length or not inflate.eof or inflate.unused_data:
        raise UpdateError(
            f"moments do not inflate to the {length} numbers expected; they were changed on the way"
        )
    return inflated
