import tracemalloc
import zlib
from contextlib import suppress
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet.codec.bits import bound, inflate, pack, unpack
from fleet.errors import UpdateError
from tests.many import many

LEVELS = np.random.default_rng(0).integers(0, 15, 1000).astype(np.uint8)


def of_levels(seed, size, values):
    """Numbers of which some are likelier: from one value alone to all alike."""
    rng = np.random.default_rng(seed)
    likely = rng.dirichlet(np.full(values, 10 ** rng.uniform(-2, 2)))
    return rng.choice(values, size=size, p=likely).astype(np.uint8)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 70_000), st.integers(1, 256))
def test_numbers_come_back_and_never_take_more_than_the_bound(seed, size, values):
    levels = of_levels(seed, size, values)
    data = pack(levels)
    assert len(data) <= bound(size)
    np.testing.assert_array_equal(unpack(memoryview(data), size, 255), levels)


@pytest.mark.parametrize("size", [0, 1, 255, 32766, 32767, 32768, 65535, 65536, 1_000_000])
def test_bytes_that_do_not_compress_stay_within_the_bound(size):
    rng = np.random.default_rng(size)
    every_byte = np.resize(np.arange(256, dtype=np.uint8), size)
    for levels in (rng.permutation(every_byte), rng.integers(0, 256, size).astype(np.uint8)):
        assert size <= len(pack(levels)) <= bound(size)


@many("seed", range(5))
def test_packed_numbers_take_their_entropy(seed):
    levels = of_levels(seed, 30_000, 15)
    shares = np.bincount(levels) / levels.size
    shares = shares[shares > 0]
    entropy = -(shares * np.log2(shares)).sum()
    bits = 8 * len(pack(levels)) / levels.size
    # Huffman's bound: less than one bit a number above it; and the table of codes.
    assert entropy <= bits < entropy + 1 + 8 * 100 / levels.size


def test_fewer_or_more_numbers_than_expected_are_refused():
    data = memoryview(pack(LEVELS))
    with pytest.raises(UpdateError, match="packed numbers are 1000, expected 1001; they were cut"):
        unpack(data, 1001, 14)
    with pytest.raises(UpdateError, match="inflate to more than the 999 expected; refused"):
        unpack(data, 999, 14)


def test_a_number_beyond_the_largest_is_refused():
    data = memoryview(pack(LEVELS))
    text = "a packed number is 14, the largest 13; they were damaged"
    with pytest.raises(UpdateError, match=text):
        unpack(data, LEVELS.size, 13)


def test_bytes_that_are_no_stream_are_refused():
    with pytest.raises(UpdateError, match=r"packed numbers are damaged \(.*\); they changed on"):
        inflate(memoryview(b"\xff" * 20), 100)


@pytest.mark.parametrize("data", [b"", pack(LEVELS)[:-1], pack(LEVELS) + b"\0", pack(LEVELS) * 2])
def test_a_stream_that_does_not_end_with_its_bytes_is_refused(data):
    text = "do not end where their bytes do; they were cut or padded"
    with pytest.raises(UpdateError, match=text):
        inflate(memoryview(data), LEVELS.size)


@cache
def bomb():
    """A good stream that inflates to 100 MB."""
    packer = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    return b"".join(packer.compress(bytes(10**7)) for _ in range(10)) + packer.flush()


@pytest.mark.parametrize("size", [0, 100, 10_000])
def test_a_bomb_of_100_mb_takes_no_memory(size):
    data = memoryview(bomb())
    assert len(data) < 500_000
    tracemalloc.start()
    with pytest.raises(UpdateError, match=f"inflate to more than the {size} expected; refused"):
        unpack(data, size, 255)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * size + 600_000  # zlib's window, and what of the bomb is left over


@settings(max_examples=300)
@given(st.binary(max_size=60), st.integers(0, 300))
def test_no_bytes_raise_anything_else(data, size):
    with suppress(UpdateError):
        assert len(unpack(memoryview(data), size, 255)) == size
