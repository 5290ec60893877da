"""Centred clipping over rounds against the paper's algorithm in Python numbers."""

import math

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fleet.errors import ConfigError
from strategies.aggregation.centred_clipping import centred_clipping
from tests import reference
from tests.many import many

SEEDS = range(5)


@pytest.mark.parametrize("radius", (0.3, 3.0, 100.0))
@many("seed", SEEDS)
def test_equal_plans_over_rounds_match_the_oracle(toy_plan, random_update, seed, radius):
    rng = np.random.default_rng(seed)
    cohorts = [("a", "b", "c", "d"), ("b", "d", "e"), ("a", "b", "c"), ("e",), ("a", "e", "d")]
    rounds = [[random_update(name, toy_plan, rng) for name in names] for names in cohorts]
    order = list(rounds[0][0].delta)
    expected = reference.centred_clipping(
        [{u.client: reference.vector(u, order) for u in updates} for updates in rounds],
        radius,
        momentum=0.8,
    )
    own = centred_clipping(radius, momentum=0.8)
    state = own.init()
    for updates, centre in zip(rounds, expected, strict=True):
        result, state = own.aggregate(updates, state)
        flat = np.concatenate([result.delta[name].ravel() for name in order])
        assert_allclose(flat, centre, rtol=1e-10, atol=1e-13)


def test_without_a_radius_it_is_the_median_length(toy_plan, random_update):
    updates = [random_update(f"pi-{i}", toy_plan, np.random.default_rng(i)) for i in range(5)]
    lengths = [reference.norm(reference.vector(u, u.delta)) for u in updates]
    adaptive, fixed = centred_clipping(), centred_clipping(float(np.median(lengths)))
    ours, _ = adaptive.aggregate(updates, adaptive.init())
    expected, _ = fixed.aggregate(updates, fixed.init())
    for name, array in expected.delta.items():
        assert_allclose(ours.delta[name], array, rtol=1e-12, atol=1e-15)


def test_a_momentum_moves_only_when_its_tensor_is_trained(unequal):
    own = centred_clipping(momentum=0.5)
    first = unequal(np.random.default_rng(0), blocks=(5, 3, 5))
    second = unequal(np.random.default_rng(1), blocks=(1, 3))
    _, state = own.aggregate(first, own.init())
    _, after = own.aggregate(second, state)
    deep, head = "blocks.0.conv.weight", "head.weight"
    for name in (deep, head):
        assert after["momenta"]["pi-2"][name] is state["momenta"]["pi-2"][name]
    assert after["momenta"]["pi-0"][deep] is state["momenta"]["pi-0"][deep]
    assert after["centre"][deep] is state["centre"][deep]
    expected = (first[0].delta[head].astype(np.float64) + second[0].delta[head]) / 2
    assert_allclose(after["momenta"]["pi-0"][head], expected, rtol=1e-12)
    assert_array_equal(state["momenta"]["pi-0"][head], first[0].delta[head])  # as it was
    assert set(after["momenta"]) == {"pi-0", "pi-1", "pi-2"}


def test_a_client_moves_the_centre_by_no_more_than_its_share_of_the_radius(
    toy_plan, random_update, poisoned
):
    updates = [random_update(f"pi-{i}", toy_plan, np.random.default_rng(i)) for i in range(5)]
    own = centred_clipping(1.0)
    one, _ = own.aggregate(updates, own.init())
    wild = [poisoned(updates[0], delta=-1e6), *updates[1:]]
    other, _ = own.aggregate(wild, own.init())
    apart = [one.delta[name] - other.delta[name] for name in one.delta]
    assert np.linalg.norm(np.concatenate([a.ravel() for a in apart])) <= 2 * 1.0 / 5 + 1e-12


def test_more_iterations_come_nearer_to_the_mean(toy_plan, random_update):
    updates = [random_update(f"pi-{i}", toy_plan, np.random.default_rng(i)) for i in range(5)]
    mean = np.mean([u.delta["head.weight"] for u in updates], axis=0)

    def gap(iterations):
        own = centred_clipping(2.0, iterations=iterations)
        result, _ = own.aggregate(updates, own.init())
        return np.linalg.norm(result.delta["head.weight"] - mean)

    assert gap(1) > gap(3) > gap(10)


@pytest.mark.parametrize("radius", (0, -1.0, math.inf, math.nan))
def test_a_radius_that_is_none_is_refused(radius):
    with pytest.raises(ConfigError, match="centred_clipping's radius must be above 0 and finite"):
        centred_clipping(radius)


@pytest.mark.parametrize("momentum", (-0.1, 1.0, math.nan))
def test_a_momentum_of_one_is_refused(momentum):
    with pytest.raises(ConfigError, match="momentum must be at least 0 and below 1, got"):
        centred_clipping(momentum=momentum)


def test_no_iteration_is_refused():
    with pytest.raises(ConfigError, match="centred_clipping needs at least 1 iteration, got 0"):
        centred_clipping(iterations=0)
