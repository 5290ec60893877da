from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.linear_model import Ridge

from fleet.closed_form import Moments, encode_moments
from fleet.errors import UpdateError
from fleet.plan import TensorSpec
from fleet.state import TrainableState
from strategies.gate import MAX_EXAMPLES
from strategies.head_start import head_from

FACTS = {"features": 4, "classes": 2, "exponent": 0}


def images(seed, number=30):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, number)
    return np.rint(rng.normal(0, 3, (number, 4)) + 2 * labels[:, None]), labels


def moments(codes, labels):
    x, targets = codes.astype(np.int64), np.eye(2, dtype=np.int64)[labels]
    return Moments(x.T @ x, targets.T @ x, targets.sum(axis=0), 0)


def reply(seed, number=30):
    return encode_moments(moments(*images(seed, number)))


def test_the_head_is_that_of_all_clients_images_together():
    start = head_from({f"pi-{seed}": reply(seed) for seed in range(5)}, **FACTS, ridge=7.0)
    x, y = (np.concatenate(parts) for parts in zip(*map(images, range(5)), strict=True))
    expected = Ridge(7.0).fit(x, np.eye(2)[y])
    scale = start.weight[0, 0] / expected.coef_[0, 0]
    assert scale > 1
    assert_allclose(start.weight, scale * expected.coef_, rtol=1e-5)
    assert_allclose(start.bias, scale * expected.intercept_, rtol=1e-5)
    assert start.num_examples == {f"pi-{seed}": 30 for seed in range(5)}
    assert not start.refused


def test_neither_order_nor_partition_changes_a_bit():
    x, y = images(0, 60)
    whole = head_from({"all": encode_moments(moments(x, y))}, **FACTS)
    rng = np.random.default_rng(0)
    for _ in range(5):
        order = rng.permutation(60)
        shares = np.split(order, np.sort(rng.choice(np.arange(1, 60), 4, replace=False)))
        names = rng.permutation(5)
        replies = {
            str(n): encode_moments(moments(x[s], y[s])) for n, s in zip(names, shares, strict=True)
        }
        parts = head_from(replies, **FACTS)
        assert_array_equal(parts.weight, whole.weight)
        assert_array_equal(parts.bias, whole.bias)


def test_a_bad_reply_is_refused_with_its_reason_and_changes_nothing():
    good = {f"pi-{seed}": reply(seed) for seed in range(3)}
    crowd = replace(moments(*images(7)), counts=np.array([MAX_EXAMPLES, 30]))
    lie = replace(moments(*images(8)), class_sums=10 * moments(*images(8)).class_sums)
    bad = {
        "crowd": encode_moments(crowd),
        "cut": reply(9)[:-4],
        "empty": b"",
        "liar": encode_moments(lie),
        "noise": np.random.default_rng(0).bytes(500),
    }
    with_bad, without = head_from(good | bad, **FACTS), head_from(good, **FACTS)
    assert_array_equal(with_bad.weight, without.weight)
    assert with_bad.num_examples == without.num_examples
    assert list(with_bad.refused) == ["crowd", "cut", "empty", "liar", "noise"]
    assert f"1 to {MAX_EXAMPLES} together, got {MAX_EXAMPLES + 30}" in with_bad.refused["crowd"]
    assert "moments end" in with_bad.refused["cut"]
    assert "vary by less than nothing" in with_bad.refused["liar"]


def test_without_any_moments_there_is_no_head():
    with pytest.raises(UpdateError, match=r"no client's moments .* \(there are no replies\)"):
        head_from({}, **FACTS)
    with pytest.raises(UpdateError, match=r"were admitted \(pi-1: moments end 6 bytes early"):
        head_from({"pi-1": b""}, **FACTS)


def test_a_head_takes_the_place_of_the_state_s(toy_plan):
    head = (
        TensorSpec(name="head.weight", shape=(2, 4), role="weight", depth=0),
        TensorSpec(name="head.bias", shape=(2,), role="bias", depth=0),
    )
    plan = replace(toy_plan, specs=(*toy_plan.specs[:-1], *head))
    state = TrainableState(plan, {s.name: np.zeros(s.shape, np.float32) for s in plan.specs})
    start = head_from({"pi-1": reply(0)}, **FACTS)
    started = start.into(state, "head")
    assert_array_equal(started.tensors["head.weight"], start.weight)
    assert_array_equal(started.tensors["head.bias"], start.bias)
    assert not any(started.tensors[spec.name].any() for spec in toy_plan.specs[:-1])
    assert not state.tensors["head.weight"].any()
    with pytest.raises(UpdateError, match=r"unknown tensor classifier\.bias"):
        start.into(state, "classifier")
    wider = replace(start, weight=np.zeros((2, 5), np.float32))
    with pytest.raises(UpdateError, match=r"head.weight has shape \(2, 5\), .* expects \(2, 4\)"):
        wider.into(state, "head")
