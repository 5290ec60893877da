import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet.codec.bits import pack
from fleet.codec.dense import float16, float32, nearest, quantised, stochastic
from fleet.errors import UpdateError
from tests.damage import damaged
from tests.many import many

pytestmark = pytest.mark.filterwarnings("error")

LEVELS = {4: 7, 8: 127}
FORMATS = {
    "float32": float32(),
    "float16": float16(),
    "int8": quantised(8, by_channel=True),
    "int4": quantised(4, by_channel=True),
    "int8 of one scale": quantised(8, by_channel=False),
    "int4 of one scale": quantised(4, by_channel=False),
}
by_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
LARGEST = np.finfo(np.float32).max
SMALLEST = np.float32(2**-149)


def there_and_back(form, array, rounding=nearest):
    data = form.encode(array, rounding)
    assert len(data) <= form.most(array.shape)
    decoded = form.decode(memoryview(data), array.shape)
    assert (type(decoded), decoded.shape, decoded.dtype) == (np.ndarray, array.shape, np.float32)
    return decoded


def channels(seed, shape=(5, 6)):
    """Normal numbers in channels whose magnitudes lie up to 10^4 apart."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * 10.0 ** rng.uniform(-2, 2, (shape[0], 1))).astype(np.float32)


def steps_of(array, bits, by_channel):
    """What a level is worth in each channel, from the definition in `quantised`."""
    rows = np.abs(array.astype(np.float64))
    peak = rows.max()
    peaks = rows.max(axis=1, keepdims=True) if by_channel else np.array([[peak]])
    return np.ceil(65535 * peaks / peak) / 65535 * peak / LEVELS[bits]


class EveryWord:
    """Random bytes of which every pair comes up once."""

    def bytes(self, count):
        assert count == 2 * 65536
        return np.arange(65536, dtype="<u2").tobytes()


@many("seed", range(20))
@pytest.mark.parametrize("magnitude", [1e-6, 0.1, 1.0, 7.0, 127.0])
def test_rounding_keeps_the_mean_to_2_to_the_minus_17_of_a_level(magnitude, seed):
    level = np.float32(np.random.default_rng(seed).uniform(-magnitude, magnitude))
    rounded = stochastic(EveryWord())(np.full(65536, level))
    assert set(rounded) <= {math.floor(level), math.ceil(level)}
    assert abs(rounded.mean(dtype=np.float64) - float(level)) <= 2**-17 + 2**-25


def test_rounding_leaves_whole_numbers_alone():
    for level in range(-127, 128):
        assert (stochastic(EveryWord())(np.full(65536, np.float32(level))) == level).all()


@pytest.mark.parametrize("by_channel", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_stochastic_rounding_is_unbiased_and_less_than_a_level_off(bits, by_channel):
    draws = 800
    for seed in range(20):
        exact = channels(seed)
        array = np.repeat(exact, draws, axis=1)  # of the same peaks, and as many draws
        form = quantised(bits, by_channel=by_channel)
        decoded = there_and_back(form, array, stochastic(np.random.default_rng(seed)))
        step = steps_of(exact, bits, by_channel)
        assert (np.abs(decoded - array) < step * (1 + 1e-5)).all()
        mean = decoded.astype(np.float64).reshape(*exact.shape, draws).mean(axis=2)
        # A level's standard deviation is at most half of it: 5.5 deviations of the mean.
        assert (np.abs(mean - exact) < 5.5 * 0.5 * step / math.sqrt(draws)).all()


@pytest.mark.parametrize("bits", [8, 4])
@many("seed", range(10))
def test_rounding_to_nearest_is_half_a_level_off_at_most(bits, seed):
    exact = channels(seed)
    decoded = there_and_back(quantised(bits, by_channel=True), exact)
    assert (np.abs(decoded - exact) <= 0.5001 * steps_of(exact, bits, by_channel=True)).all()


def test_every_channel_has_its_own_scale():
    array = np.array([[1000, -500, 300], [0.01, 0.005, -0.003], [0, 0, 0]], np.float32)
    one, each = (
        there_and_back(quantised(8, by_channel=by_channel), array) for by_channel in (False, True)
    )
    assert (one[1] == 0).all()
    # 0.01 is less than a 65535th of 1000, so that is its channel's scale.
    np.testing.assert_allclose(each[1], array[1], atol=1000 / 65535 / 127)
    assert each[1, 0] > 0.0099
    assert (each[2] == 0).all()


@by_format
@pytest.mark.parametrize("shape", [(1,), (3,), (1, 1), (2, 3), (3, 1, 2, 2)])
def test_all_shapes_come_back_and_zeros_stay_zero(form, shape):
    decoded = there_and_back(form, np.zeros(shape, np.float32), stochastic(np.random.default_rng()))
    assert (decoded == 0).all()
    ones = np.ones(shape, np.float32)
    np.testing.assert_allclose(there_and_back(form, ones), ones, rtol=1e-6)


@pytest.mark.parametrize("name", ["float32", "float16", "int8 of one scale", "int4 of one scale"])
def test_a_number_without_dimensions_comes_back_as_an_array(name):
    number = np.array(-3, np.float32)
    np.testing.assert_allclose(there_and_back(FORMATS[name], number), number, rtol=1e-6)


@by_format
@pytest.mark.parametrize("peak", [SMALLEST, 2.0**-140, 2.0**-126, 1.0, 2.0**127, LARGEST])
def test_tensors_of_any_magnitude_come_back_finite_and_not_larger(form, peak):
    array = np.array([[1, -1, 0.5, -0.3], [-1, 0.9, 0.01, 0]], np.float64) * float(peak)
    array = array.astype(np.float32)
    for rounding in (nearest, stochastic(np.random.default_rng(0))):
        decoded = there_and_back(form, array, rounding)
        assert np.isfinite(decoded).all()
        assert (np.abs(decoded) <= np.abs(array).max()).all()
        np.testing.assert_allclose(decoded[:, 0], array[:, 0], rtol=2**-11)


@many("seed", range(10))
def test_a_power_of_two_changes_no_level(seed):
    array = channels(seed)
    for form in (float16(), quantised(4, by_channel=True)):
        expected = there_and_back(form, array)
        for exponent in (-60, 60):
            scaled = there_and_back(form, np.ldexp(array, exponent))
            np.testing.assert_array_equal(scaled, np.ldexp(expected, exponent))


@many("seed", range(10))
def test_float32_keeps_every_bit(seed):
    bits = np.random.default_rng(seed).integers(0, 2**32, size=30, dtype=np.uint32)
    special = np.array([-0.0, 0.0, 1e-45, -1e-45, LARGEST, np.inf, -np.inf, np.nan], np.float32)
    array = np.concatenate([special, bits.view(np.float32)]).reshape(2, 19)
    decoded = there_and_back(float32(), array)
    assert decoded.tobytes() == array.tobytes()


@many("seed", range(20))
def test_float16_is_as_close_as_it_says(seed):
    rng = np.random.default_rng(seed)
    array = (rng.choice([-1, 1], 2000) * 2.0 ** rng.uniform(-60, 0, 2000)).astype(np.float32)
    array *= np.float32(2.0 ** rng.integers(-60, 120))
    decoded = there_and_back(float16(), array).astype(np.float64)
    peak = np.abs(array).max()
    errors = np.abs(decoded - array)
    near = np.abs(array) >= float(peak) * 2.0**-28
    assert 0 < near.sum() < array.size
    assert (errors[near] <= 2.0**-11 * np.abs(array[near])).all()
    assert (errors[~near] <= 2.0**-39 * float(peak)).all()
    assert (decoded * array >= 0).all()


def test_sizes_are_what_the_layouts_say():
    assert len(float32().encode(np.ones((5, 6), np.float32), nearest)) == 4 * 30
    assert len(float16().encode(np.ones((5, 6), np.float32), nearest)) == 1 + 2 * 30
    array = channels(0, (64, 1000))
    assert len(quantised(8, by_channel=True).encode(array, nearest)) < 4 + 2 * 64 + 64_000


def test_an_int4_level_of_a_normal_distribution_takes_about_three_bits():
    normal = np.random.default_rng(0).normal(size=(64, 1000)).astype(np.float32)
    bits = [
        8 * len(quantised(4, by_channel=True).encode(normal, rounding)) / normal.size
        for rounding in (nearest, stochastic(np.random.default_rng(0)))
    ]
    assert max(bits) < 3.3  # 3.17 and 3.19: the entropy at a step of a seventh of 3.2 deviations
    wide = np.random.default_rng(0).normal(size=(2, 100_000)).astype(np.float32)
    assert 8 * len(quantised(4, by_channel=True).encode(wide, nearest)) / wide.size < 3


def test_rounded_levels_do_not_depend_on_the_layout_in_memory():
    array = channels(3)
    for form in FORMATS.values():
        assert form.encode(np.asfortranarray(array), nearest) == form.encode(array, nearest)


@pytest.mark.parametrize("nbytes", [0, 23, 25])
def test_a_wrong_size_of_floats_is_refused(nbytes):
    with pytest.raises(UpdateError, match=f"{nbytes} bytes where 24 belong; they were cut or pad"):
        float32().decode(memoryview(bytes(nbytes)), (2, 3))
    with pytest.raises(UpdateError, match=f"{nbytes} bytes where 13 belong; they were cut or pad"):
        float16().decode(memoryview(bytes(nbytes)), (2, 3))


def test_cut_scales_are_refused():
    with pytest.raises(UpdateError, match="7 bytes are fewer than the 8 of the scales"):
        quantised(8, by_channel=True).decode(memoryview(bytes(7)), (2, 3))


@pytest.mark.parametrize("peak", [np.nan, np.inf, -np.inf, -1.0])
def test_a_peak_that_no_tensor_has_is_refused(peak):
    data = np.float32(peak).tobytes() + pack(np.zeros(6, np.uint8))
    with pytest.raises(UpdateError, match=f"largest magnitude is {peak}; it was damaged"):
        quantised(8, by_channel=False).decode(memoryview(data), (2, 3))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_level_that_the_format_does_not_have_is_refused(bits):
    most = 2 * LEVELS[bits]
    data = np.float32(1).tobytes() + pack(np.full(6, most + 1, np.uint8))
    with pytest.raises(UpdateError, match=f"a packed number is {most + 1}, the largest {most};"):
        quantised(bits, by_channel=False).decode(memoryview(data), (2, 3))


def test_what_overflows_or_is_no_number_comes_as_such():
    # float16's largest, infinity, a quiet and a signalling NaN, times 2^113
    data = b"\xff" + np.array([0x7BFF, 0x7C00, 0x7E00, 0x7C01], "<u2").tobytes()
    decoded = float16().decode(memoryview(data), (4,))
    np.testing.assert_array_equal(decoded, np.array([np.inf, np.inf, np.nan, np.nan], np.float32))


@settings(max_examples=60, deadline=None)
@given(st.data())
@by_format
def test_damaged_bytes_raise_nothing_else(form, data):
    good = form.encode(channels(1), nearest)
    try:
        decoded = form.decode(memoryview(data.draw(damaged(good))), (5, 6))
    except UpdateError:
        return
    assert (decoded.shape, decoded.dtype) == ((5, 6), np.float32)
