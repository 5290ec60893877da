import math
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet.codec.bits import pack
from fleet.codec.dense import nearest, stochastic
from fleet.codec.names import BASES
from fleet.codec.sparse import keep_largest, sparse
from fleet.errors import UpdateError
from tests.damage import damaged
from tests.many import many

pytestmark = pytest.mark.filterwarnings("error")

TOP = {"int4": 7, "int8": 127}  # levels of magnitude, beside nought


def there_and_back(base, array, rounding=nearest):
    form = sparse(base)
    data = form.encode(array, rounding)
    assert len(data) <= form.most(array.shape)
    decoded = form.decode(memoryview(data), array.shape)
    assert (decoded.shape, decoded.dtype) == (array.shape, np.float32)
    return decoded


def some(seed, size=2000, share=0.02):
    """Normal numbers, all but the largest zero."""
    array = np.random.default_rng(seed).normal(size=size).astype(np.float32)
    return keep_largest({"a": array}, share)["a"]


def sparse_bytes(count, gaps, values, gap_bytes=None):
    gaps = pack(np.array(gaps, np.uint8)) if isinstance(gaps, list) else gaps
    head = np.array([count, len(gaps) if gap_bytes is None else gap_bytes], "<u4")
    return memoryview(head.tobytes() + gaps + values)


# Keeping the largest


def by_sorting(arrays, share):
    """All numbers sorted by magnitude, the first of equal ones first; one at a time."""
    places = [(-abs(float(x)), n, i) for n, a in arrays.items() for i, x in enumerate(a.ravel())]
    order = {name: rank for rank, name in enumerate(arrays)}
    places.sort(key=lambda place: (place[0], order[place[1]], place[2]))
    kept = {name: np.zeros(array.size, np.float32) for name, array in arrays.items()}
    for _, name, i in places[: max(1, round(share * len(places)))]:
        kept[name][i] = arrays[name].ravel()[i]
    return {name: kept[name].reshape(array.shape) for name, array in arrays.items()}


@pytest.mark.parametrize("share", [1e-9, 0.01, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("ties", [False, True])
@many("seed", range(6))
def test_the_largest_stay_and_of_equal_ones_the_first(seed, ties, share):
    rng = np.random.default_rng(seed)
    arrays = {
        name: (rng.integers(-3, 4, shape) if ties else rng.normal(size=shape)).astype(np.float32)
        for name, shape in (("z", (5, 4)), ("a", (7,)), ("m", (2, 3, 3)))
    }
    expected = by_sorting(arrays, share)
    for name, array in keep_largest(arrays, share).items():
        np.testing.assert_array_equal(array, expected[name])
        assert not np.shares_memory(array, arrays[name])


def test_tensors_of_zeros_stay_zeros():
    zeros = {"a": np.zeros((3, 4), np.float32), "b": np.zeros(5, np.float32)}
    assert not any(array.any() for array in keep_largest(zeros, 0.5).values())
    few = zeros | {"b": np.array([0, 0, 2, 0, 0], np.float32)}
    kept = keep_largest(few, 0.9)
    np.testing.assert_array_equal(kept["b"], few["b"])
    assert not kept["a"].any()


def test_nothing_is_kept_of_nothing():
    assert keep_largest({}, 0.5) == {}


def test_share_is_over_all_tensors_together():
    small, large = np.full(50, 1, np.float32), np.full(50, 2, np.float32)
    kept = keep_largest({"small": small, "large": large}, 0.25)
    assert (np.count_nonzero(kept["small"]), np.count_nonzero(kept["large"])) == (0, 25)


# Where they lie


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("gap", [0, 1, 254, 255, 256, 509, 510, 511, 765, 1999])
def test_gaps_of_any_length_come_back(gap, base):
    first = np.zeros(2000, np.float32)
    first[gap] = 3
    between = np.zeros(4000, np.float32)
    between[[5, 5 + gap + 1]] = 3
    for array in (first, first[: gap + 1], between):
        np.testing.assert_array_equal(there_and_back(base, array), array)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("shape", [(1,), (1, 1), (4, 3), (255, 1), (2, 255), (16, 16, 3, 3)])
def test_none_and_all_come_back(shape, base):
    for value in (0, -2):
        array = np.full(shape, value, np.float32)
        np.testing.assert_array_equal(there_and_back(base, array), array)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 1), st.integers(1, 3000))
def test_positions_are_exact_whatever_they_are(seed, share, size):
    rng = np.random.default_rng(seed)
    array = np.where(rng.random(size) < share, rng.normal(size=size), 0).astype(np.float32)
    np.testing.assert_array_equal(there_and_back("float32", array), array)


# What they are


@pytest.mark.parametrize("base", ["int4", "int8"])
def test_magnitudes_rounded_stochastically_are_unbiased_and_less_than_a_level_off(base):
    draws = 800
    for seed in range(20):
        exact = np.random.default_rng(seed).normal(size=12).astype(np.float32)
        array = np.repeat(exact, draws)
        decoded = there_and_back(base, array, stochastic(np.random.default_rng(seed)))
        magnitudes = np.abs(exact.astype(np.float64))
        step = (magnitudes.max() - magnitudes.min()) / TOP[base]
        assert (np.abs(decoded - array) < step * (1 + 1e-6)).all()
        assert (np.sign(decoded) == np.sign(array)).all()
        mean = decoded.astype(np.float64).reshape(12, draws).mean(axis=1)
        # A level's standard deviation is at most half of it: 5.5 deviations of the mean.
        assert (np.abs(mean - exact) < 5.5 * 0.5 * step / math.sqrt(draws)).all()


@pytest.mark.parametrize("base", ["int4", "int8"])
@many("seed", range(10))
def test_magnitudes_are_half_a_level_off_at_most_and_ends_are_exact(seed, base):
    array = some(seed)
    decoded = there_and_back(base, array)
    magnitudes = np.abs(array[array != 0])
    step = float(magnitudes.max() - magnitudes.min()) / TOP[base]
    assert (np.abs(decoded - array) <= 0.50001 * step).all()
    for end in (np.argmax(np.abs(array)), np.flatnonzero(array)[np.argmin(magnitudes)]):
        assert decoded[end] == array[end]
    # Levels around nought, as a dense format has them, would be further off.
    assert step < float(magnitudes.max()) / TOP[base]


@pytest.mark.parametrize("base", ["int4", "int8"])
@pytest.mark.parametrize("peak", [2**-149, 2**-130, np.finfo(np.float32).max])
def test_magnitudes_at_the_ends_of_float32_come_back_finite(peak, base):
    array = (np.array([1, -1, 0.5, 0, -0.3]) * peak).astype(np.float32)
    decoded = there_and_back(base, array, stochastic(np.random.default_rng(0)))
    assert np.isfinite(decoded).all()
    assert (np.abs(decoded) <= np.abs(array).max()).all()


@pytest.mark.parametrize(
    ("base", "bits"),
    # Measured, at 10,000 of a million: 11.0, 14.8, 24.2 and 40.2. Gaps take 8.15 of them.
    [("int4", 11.3), ("int8", 15), ("float16", 24.5), ("float32", 40.5)],
)
def test_bits_of_a_kept_number(base, bits):
    array = some(0, size=1_000_000, share=0.01)
    assert 8 * len(sparse(base).encode(array, nearest)) / 10_000 < bits


# Damage


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (memoryview(bytes(7)), "a sparse tensor has 7 bytes, its header alone 8"),
        (sparse_bytes(13, [], b""), "a sparse tensor names 13 of 12 numbers; it was damaged"),
        (sparse_bytes(1, [0], b"", gap_bytes=99), "gaps take 99 bytes of 11; they were cut"),
        (sparse_bytes(2, [0], bytes(8)), "gaps name 1 numbers, expected 2 of 12; they were dam"),
        (sparse_bytes(1, [12], bytes(4)), "gaps name 1 numbers, expected 1 of 12; they were dam"),
        (sparse_bytes(2, [5, 6], bytes(8)), "gaps name 2 numbers, expected 2 of 12; they were"),
        (sparse_bytes(1, [0, 3], bytes(4)), "packed numbers inflate to more than the 1 expected"),
        (sparse_bytes(2, [0, 255], bytes(4)), "gaps name 1 numbers, expected 2 of 12; they were"),
        (sparse_bytes(1, [3], bytes(3)), "3 bytes where 4 belong; they were cut or padded"),
    ],
)
def test_damaged_positions_are_refused(data, text):
    with pytest.raises(UpdateError, match=text):
        sparse("float32").decode(data, (3, 4))


def test_a_jump_that_leads_nowhere_is_refused():
    data = sparse_bytes(1, [0, 255], bytes(4))
    with pytest.raises(UpdateError, match="gaps name 1 numbers, expected 1 of 300; they were dam"):
        sparse("float32").decode(data, (300,))


def values(least, most, codes):
    return np.array([least, most], "<f4").tobytes() + pack(np.array(codes, np.uint8))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (bytes(7), "values take 7 bytes, their range alone 8; they were cut"),
        (values(2, 1, [0]), "magnitudes run from 2.0 to 1.0; they were damaged"),
        (values(-1, 1, [0]), "magnitudes run from -1.0 to 1.0; they were damaged"),
        (values(0, np.inf, [0]), "magnitudes run from 0.0 to inf; they were damaged"),
        (values(np.nan, 1, [0]), "magnitudes run from nan to 1.0; they were damaged"),
        (values(0, np.nan, [0]), "magnitudes run from 0.0 to nan; they were damaged"),
        (values(0, 1, [16]), "a packed number is 16, the largest 15; they were damaged"),
        (values(0, 1, []), "packed numbers are 0, expected 1; they were cut"),
    ],
)
def test_damaged_values_are_refused(data, text):
    with pytest.raises(UpdateError, match=text):
        sparse("int4").decode(sparse_bytes(1, [0], data), (3, 4))


@pytest.mark.parametrize("where", ["gaps", "values"])
def test_a_bomb_takes_no_memory(where):
    packer = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = b"".join(packer.compress(bytes(10**7)) for _ in range(10)) + packer.flush()
    data = sparse_bytes(1, bomb, b"") if where == "gaps" else sparse_bytes(1, [0], bytes(8) + bomb)
    tracemalloc.start()
    with pytest.raises(UpdateError, match="packed numbers inflate to more than the 1 expected"):
        sparse("int4").decode(data, (3, 4))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < len(bomb) + 150_000


@settings(max_examples=60, deadline=None)
@given(st.data())
@pytest.mark.parametrize("base", BASES)
def test_damaged_bytes_raise_nothing_else(base, data):
    form = sparse(base)
    good = form.encode(some(1, size=600, share=0.05), nearest)
    try:
        decoded = form.decode(memoryview(data.draw(damaged(good))), (600,))
    except UpdateError:
        return
    assert (decoded.shape, decoded.dtype) == ((600,), np.float32)
