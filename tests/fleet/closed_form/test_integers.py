import zlib

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from fleet.closed_form.integers import Reader, pack, quarter_log2, unpack
from fleet.errors import UpdateError
from tests.many import many


def read(data, magnitudes):
    stream = Reader(data)
    values = unpack(stream, magnitudes)
    stream.end()
    return values


def test_quarters_of_bits_are_those_of_the_logarithm():
    values = np.unique(np.r_[1:5000, 2.0 ** np.arange(53), 3 * 2.0 ** np.arange(50)]).astype(int)
    assert_array_equal(quarter_log2(values), np.floor(4 * np.log2(values) + 1e-12))
    assert_array_equal(quarter_log2(np.array([0, -5])), [0, 0])


@many("seed", range(20))
def test_numbers_come_back_whatever_was_expected_of_their_size(seed):
    rng = np.random.default_rng(seed)
    length = int(rng.integers(0, 3000))
    sizes = 2.0 ** rng.uniform(0, 50, length)
    values = (rng.standard_normal(length) * sizes).astype(np.int64)
    magnitudes = (4 * np.log2(sizes)).astype(int) + rng.integers(-30, 30, length)
    assert_array_equal(read(pack(values, magnitudes), magnitudes), values)


def test_normal_numbers_take_a_tenth_of_a_bit_more_than_their_entropy():
    rng = np.random.default_rng(0)
    sizes = 2.0 ** rng.uniform(0, 12, 100_000)
    values = np.rint(rng.standard_normal(100_000) * sizes).astype(np.int64)
    entropy = np.log2(sizes * np.sqrt(2 * np.pi * np.e)).mean()
    bits = 8 * len(pack(values, (4 * np.log2(sizes)).astype(int))) / len(values)
    assert entropy < bits < entropy + 0.1


def test_rare_numbers_take_less_than_a_bit():
    values = (np.random.default_rng(0).random(80_000) < 0.01).astype(np.int64)
    assert len(pack(values, np.zeros(80_000, int))) < 1500


def test_bytes_that_are_cut_padded_or_changed_are_refused():
    values, magnitudes = np.arange(-50, 50), np.full(100, 16)
    data = pack(values, magnitudes)
    with pytest.raises(UpdateError, match="moments end 3 bytes early; they were cut on the way"):
        read(data[:-3], magnitudes)
    with pytest.raises(UpdateError, match="moments have 2 bytes too many; they were padded"):
        read(data + b"xx", magnitudes)
    with pytest.raises(UpdateError, match=r"do not inflate: .*; they were changed on the way"):
        read(data[:4] + b"\xff\xff" + data[6:], magnitudes)
    with pytest.raises(UpdateError, match="do not inflate to the 101 numbers expected"):
        read(data, np.full(101, 16))


def test_a_bomb_is_not_inflated(monkeypatch):
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = deflate.compress(bytes(50_000_000)) + deflate.flush()
    made = []
    new = zlib.decompressobj

    class Watched:
        def __init__(self, *args):
            self.inner = new(*args)

        def decompress(self, data, length):
            made.append(self.inner.decompress(data, length))
            return made[-1]

        def __getattr__(self, name):
            return getattr(self.inner, name)

    monkeypatch.setattr(zlib, "decompressobj", Watched)
    with pytest.raises(UpdateError, match="do not inflate to the 10 numbers expected"):
        read(len(bomb).to_bytes(4, "little") + bomb, np.zeros(10, int))
    assert [len(part) for part in made] == [11]


def test_numbers_that_would_overflow_are_refused():
    escaped = np.array([2**61], "<i8").tobytes()
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    squeezed = deflate.compress(b"\xff") + deflate.flush()
    data = len(squeezed).to_bytes(4, "little") + squeezed + escaped + b"\0" * 20
    with pytest.raises(UpdateError, match=r"a number beyond 2\^62; they were changed on the way"):
        unpack(Reader(data), np.array([80]))
