"""Bytes that changed on their way: cut, padded, overwritten, flipped, or others altogether."""

from hypothesis import strategies as st


def damaged(good: bytes):
    """Strategy of what may have become of some bytes; it may be nothing."""
    where = st.integers(0, len(good))
    kinds = st.sampled_from((_cut, _cut_out, _padded, _overwritten, _flipped, _replaced))
    return st.builds(
        lambda kind, i, j, piece: kind(good, min(i, j), max(i, j), piece),
        kinds,
        where,
        where,
        st.binary(min_size=1, max_size=12),
    )


def _cut(good, start, stop, piece):
    return good[start:stop]


def _cut_out(good, start, stop, piece):
    return good[:start] + good[stop:]


def _padded(good, start, stop, piece):
    return good[:start] + piece + good[start:]


def _overwritten(good, start, stop, piece):
    return (good[:start] + piece + good[start + len(piece) :])[: len(good)]


def _flipped(good, start, stop, piece):
    """One bit, which of them the piece says."""
    data = bytearray(good)
    if start < len(data):
        data[start] ^= 1 << piece[0] % 8
    return bytes(data)


def _replaced(good, start, stop, piece):
    return piece
