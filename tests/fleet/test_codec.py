import dataclasses
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet.codec import decode, encode
from fleet.errors import ConfigError, UpdateError
from fleet.plan import TensorSpec, UpdatePlan

SPECS = (
    TensorSpec(name="block.conv.weight", shape=(4, 3), role="weight", depth=1),
    TensorSpec(name="block.bn.bias", shape=(4,), role="shift", depth=1),
    TensorSpec(name="head.weight", shape=(2, 6), role="weight", depth=0),
)
PLAN = UpdatePlan(
    backbone="toy",
    preprocessing={},
    step_digests={},
    weights_digest="0" * 64,
    method="mobiletl",
    blocks=1,
    train_tail=False,
    specs=SPECS,
)
ARRAYS = {
    spec.name: np.random.default_rng(0).normal(size=spec.shape).astype(np.float32) for spec in SPECS
}
PAYLOAD = encode(ARRAYS, PLAN)


def malformed(**changes):
    return dataclasses.replace(PAYLOAD, **changes)


def swapped(values, i, j):
    values = list(values)
    values[i], values[j] = values[j], values[i]
    return tuple(values)


@pytest.mark.parametrize("seed", range(20))
def test_float32_keeps_every_bit(seed):
    bits = np.random.default_rng(seed).integers(0, 2**32, size=28, dtype=np.uint32)
    special = np.array([-0.0, 0.0, 1e-45, -1e-45, 3.4e38, np.inf, -np.inf, np.nan], np.float32)
    values = np.concatenate([special, bits.view(np.float32)])
    parts = np.split(values[:28], [12, 16])
    arrays = {s.name: p.reshape(s.shape) for s, p in zip(SPECS, parts, strict=True)}
    decoded = decode(encode(arrays, PLAN), PLAN)
    assert list(decoded) == [spec.name for spec in SPECS]
    for name, array in arrays.items():
        assert decoded[name].shape == array.shape
        assert decoded[name].dtype == np.float32
        assert decoded[name].tobytes() == array.tobytes()


def test_tensors_lie_end_to_end_in_the_plans_order():
    shuffled = dict(reversed(ARRAYS.items()))
    assert encode(shuffled, PLAN).data == b"".join(a.tobytes() for a in ARRAYS.values())


def test_layout_of_memory_changes_nothing():
    columns = {name: np.asfortranarray(array) for name, array in ARRAYS.items()}
    assert encode(columns, PLAN) == PAYLOAD


def test_size_is_that_of_the_floats_and_nothing_more():
    assert PAYLOAD.nbytes == PLAN.nbytes == 4 * (12 + 4 + 12)


def test_what_is_no_state_of_the_plan_is_not_encoded():
    with pytest.raises(UpdateError, match=r"head.weight has dtype float64, plan"):
        encode(ARRAYS | {"head.weight": np.zeros((2, 6))}, PLAN)


def test_an_unknown_codec_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="unknown codec zip; known: float32"):
        encode(ARRAYS, PLAN, "zip")


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (malformed(data=PAYLOAD.data[:-1]), "payload has 111 bytes, plan .* takes 112; it was cut"),
        (malformed(data=PAYLOAD.data + b"x"), "payload has 113 bytes, plan .* takes 112"),
        (malformed(data=b""), "payload has 0 bytes"),
        (malformed(codec="zip"), "payload is in codec zip; known: float32"),
        (
            malformed(plan_digest="f" * 64),
            "payload is of plan ffffffff, expected " + PLAN.digest[:8],
        ),
        (
            malformed(names=("stem.weight", *PAYLOAD.names[1:])),
            r"unknown tensor stem.weight \(of 1\)",
        ),
        (malformed(names=(PAYLOAD.names[0],) * 3), "payload names a tensor twice"),
        (malformed(shapes=PAYLOAD.shapes[:-1]), "not every name has a shape"),
        (
            malformed(names=PAYLOAD.names[:-1], shapes=PAYLOAD.shapes[:-1]),
            r"missing tensor head.weight \(of 1\)",
        ),
        (
            malformed(shapes=swapped(PAYLOAD.shapes, 0, 2)),
            r"block.conv.weight has shape \(2, 6\), plan .* expects \(4, 3\)",
        ),
        (malformed(shapes=((12,), *PAYLOAD.shapes[1:])), r"has shape \(12,\), plan"),
        (malformed(shapes=((-4, -3), *PAYLOAD.shapes[1:])), r"has shape \(-4, -3\), plan"),
    ],
)
def test_a_malformed_payload_is_refused(payload, text):
    with pytest.raises(UpdateError, match=text):
        decode(payload, PLAN)


def test_a_huge_declared_shape_is_refused_before_anything_is_allocated():
    payload = malformed(shapes=((2**20, 2**20), *PAYLOAD.shapes[1:]))
    tracemalloc.start()
    with pytest.raises(UpdateError, match=r"has shape \(1048576, 1048576\), plan"):
        decode(payload, PLAN)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_tensors_follow_their_names_in_another_order():
    order = (2, 0, 1)
    data = b"".join(ARRAYS[SPECS[i].name].tobytes() for i in order)
    payload = malformed(
        names=tuple(PAYLOAD.names[i] for i in order),
        shapes=tuple(PAYLOAD.shapes[i] for i in order),
        data=data,
    )
    decoded = decode(payload, PLAN)
    assert all(decoded[name].tobytes() == array.tobytes() for name, array in ARRAYS.items())


names = st.sampled_from([*PAYLOAD.names, "", "stem.weight"])
lengths = st.one_of(st.integers(), st.sampled_from([2, 3, 4, 6]))
corruptions = st.fixed_dictionaries(
    {},
    optional={
        "codec": st.sampled_from(["float32", "zip", ""]),
        "plan_digest": st.sampled_from([PLAN.digest, ""]),
        "names": st.lists(names, max_size=5).map(tuple),
        "shapes": st.lists(st.lists(lengths, max_size=3).map(tuple), max_size=5).map(tuple),
        "data": st.binary(max_size=200),
    },
)


@settings(max_examples=400, deadline=None)
@given(corruptions)
def test_no_corruption_raises_anything_else(changes):
    try:
        decoded = decode(malformed(**changes), PLAN)
    except UpdateError:
        return
    assert {name: array.shape for name, array in decoded.items()} == {
        spec.name: spec.shape for spec in SPECS
    }


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_stochastic_rounding_is_unbiased_and_less_than_a_level_off(codec):
    decoded = np.stack(
        [decode(encode(ARRAYS, PLAN, codec, [seed]), PLAN)["head.weight"] for seed in range(2000)]
    )
    exact = ARRAYS["head.weight"].astype(np.float64)
    levels = {"int8": 127, "int4": 7}[codec]
    level = np.abs(exact).max(axis=1, keepdims=True) / levels * 1.0001
    assert (np.abs(decoded - exact) < level).all()
    # A level's standard deviation is at most half of it: five deviations of the mean.
    assert (np.abs(decoded.mean(axis=0) - exact) < 5 * 0.5 * level / np.sqrt(2000)).all()


def test_float16_keeps_eleven_bits_of_any_magnitude():
    for scale in (1e-30, 1.0, 1e30):
        arrays = {name: array * np.float32(scale) for name, array in ARRAYS.items()}
        for name, array in decode(encode(arrays, PLAN, "float16"), PLAN).items():
            np.testing.assert_allclose(array, arrays[name], rtol=2**-11)


@pytest.mark.parametrize("codec", ["float16", "int8", "int4"])
def test_a_codec_that_rounds_refuses_what_is_not_finite(codec):
    broken = ARRAYS | {"head.weight": np.full((2, 6), np.nan, np.float32)}
    with pytest.raises(UpdateError, match=r"head\.weight holds NaN or infinity"):
        encode(broken, PLAN, codec)
