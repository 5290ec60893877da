"""The norm-clipped mean against its formula, over equal and unequal plans."""

import dataclasses
import math

import numpy as np
import pytest
from numpy.testing import assert_allclose

from fleet.errors import ConfigError
from strategies.aggregation import rule, weighted_mean
from strategies.aggregation.mean import clipped_mean, mean
from tests import reference
from tests.many import many

SEEDS = range(10)


def once(own, updates):
    return own.aggregate(updates, own.init())[0]


def lower_median(values):
    return sorted(values)[(len(values) - 1) // 2]


def clipped(updates, names, bounds):
    """Σ w·x·min(1, bound/‖x‖) / Σ w over the named tensors end to end, w = min(n, 3·median n)."""
    most = 3 * lower_median([u.num_examples for u in updates])
    counts = [min(u.num_examples, most) for u in updates]
    total = sum(counts)
    vectors = [reference.vector(u, names) for u in updates]
    weights = [
        count * min(1.0, bound / length)
        for count, (length, bound) in zip(counts, bounds, strict=True)
    ]
    return [
        math.fsum(w * x for w, x in zip(weights, column, strict=True)) / total
        for column in zip(*vectors, strict=True)
    ]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_part_is_clipped_to_the_median_of_who_trained_it(unequal, seed, monkeypatch):
    monkeypatch.setattr("strategies.aggregation.mean.LEAST_COSINE", -2.0)  # nobody is left out
    rng = np.random.default_rng(seed)
    updates = unequal(rng, blocks=(1, 3, 5, 1, 0, 3, 5, 5, 3))
    ours = once(clipped_mean(), updates).delta
    by_client = {u.client: u for u in updates}
    for clients, names in reference.groups(updates).items():
        trainers = [by_client[client] for client in clients]
        lengths = [reference.norm(reference.vector(u, names)) for u in trainers]
        bounds = [(length, lower_median(lengths)) for length in lengths]
        flat = np.concatenate([ours[name].ravel() for name in names])
        assert_allclose(flat, clipped(trainers, names, bounds), rtol=1e-12, atol=1e-14)


@many("seed", SEEDS)
def test_with_equal_plans_whole_deltas_are_clipped_to_their_median_norm(
    toy_plan, random_update, seed
):
    rng = np.random.default_rng(seed)
    updates = [random_update(f"pi-{i}", toy_plan, rng) for i in range(7)]
    names = sorted(updates[0].delta)
    lengths = [np.linalg.norm(reference.vector(u, names)) for u in updates]
    ours = once(clipped_mean(), updates).delta
    flat = np.concatenate([ours[name].ravel() for name in names])
    expected = clipped(updates, names, [(length, np.median(lengths)) for length in lengths])
    assert_allclose(flat, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("bound", (0.1, 3.0, 6.0))
def test_a_given_bound_is_on_the_whole_delta(unequal, bound):
    updates = unequal(np.random.default_rng(0))
    lengths = {u.client: reference.norm(reference.vector(u, u.delta)) for u in updates}
    ours = once(clipped_mean(bound), updates).delta
    for name, array in ours.items():
        trainers = [u for u in updates if name in u.delta]
        bounds = [(lengths[u.client], bound) for u in trainers]
        expected = clipped(trainers, [name], bounds)
        assert_allclose(array.ravel(), expected, rtol=1e-12, atol=1e-14)


def test_a_bound_above_all_norms_is_the_weighted_mean(unequal):
    updates = [
        dataclasses.replace(u, num_examples=100 + 10 * i)
        for i, u in enumerate(unequal(np.random.default_rng(0)))
    ]
    ours, plain = once(clipped_mean(1e6), updates).delta, weighted_mean(updates).delta
    for name, array in plain.items():
        assert_allclose(ours[name], array, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("bound", [None, 1.0])
def test_a_client_that_claims_ten_million_images_weighs_three_typical_ones(
    toy_plan, random_update, bound
):
    """Nine that agree, and one that sends ten times the opposite and says it has them all."""
    honest = random_update("pi-0", toy_plan, np.random.default_rng(0), num_examples=250)
    updates = [dataclasses.replace(honest, client=f"pi-{i}") for i in range(9)]
    flipped = {name: -10 * array for name, array in honest.delta.items()}
    liar = dataclasses.replace(honest, client="pi-9", delta=flipped, num_examples=10_000_000)
    direction = reference.vector(honest, sorted(honest.delta))
    for own, sign in ((clipped_mean(bound), 1), (mean(), -1)):
        delta = once(own, [*updates, liar]).delta
        ours = np.concatenate([delta[name].ravel() for name in sorted(honest.delta)])
        cosine = ours @ direction / np.linalg.norm(ours) / np.linalg.norm(direction)
        assert cosine == pytest.approx(sign, abs=1e-6)


def test_being_huge_where_few_train_buys_no_room_where_all_do(unequal, poisoned):
    updates = unequal(np.random.default_rng(0), blocks=(1, 1, 1, 1, 5))
    honest = once(clipped_mean(), updates).delta["head.weight"]
    updates[4] = poisoned(updates[4], delta=1e6)
    assert np.abs(once(clipped_mean(), updates).delta["head.weight"] - honest).max() < 2


def test_of_two_trainers_the_shorter_sets_the_bound(unequal, poisoned):
    updates = unequal(np.random.default_rng(0), blocks=(5, 5))
    updates[0] = poisoned(updates[0], delta=1e6)
    names = sorted(updates[1].delta)
    length = reference.norm(reference.vector(updates[1], names))
    ours = once(clipped_mean(), updates).delta
    assert np.linalg.norm(np.concatenate([ours[n].ravel() for n in names])) <= length


@pytest.mark.parametrize("bound", (0, -1.0, math.inf, math.nan))
def test_a_bound_that_is_none_is_refused(bound):
    with pytest.raises(ConfigError, match="clipped_mean's bound must be above 0 and finite, got"):
        clipped_mean(bound)


def test_clients_that_did_not_move_divide_by_no_zero(unequal, poisoned):
    updates = [poisoned(u, delta=0.0) for u in unequal(np.random.default_rng(0))]
    with np.errstate(all="raise"):
        result = once(clipped_mean(), updates)
    assert all(not array.any() for array in result.delta.values())


def scaled(update, factor):
    return dataclasses.replace(update, delta={n: factor * a for n, a in update.delta.items()})


@pytest.mark.parametrize("bound", [None, 1.0])
def test_who_is_six_times_as_long_as_the_median_counts_for_nothing(
    toy_plan, random_update, poisoned, bound
):
    rng = np.random.default_rng(0)
    updates = [random_update(f"pi-{i}", toy_plan, rng, num_examples=10) for i in range(10)]
    flipped = [poisoned(scaled(u, -10), statistics=1e6) for u in updates[:4]]
    result = once(clipped_mean(bound), [*flipped, *updates[4:]])
    without = once(clipped_mean(bound), updates[4:])
    assert result.left_out.keys() == {"pi-0", "pi-1", "pi-2", "pi-3"}
    assert set(result.coverage.values()) == {6}
    for ours, theirs in (
        (result.delta, without.delta),
        (result.statistics, without.statistics),
    ):
        assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)


def test_the_reason_names_both_lengths(toy_plan, random_update):
    one = random_update("pi-0", toy_plan, np.random.default_rng(0))
    length = reference.norm(reference.vector(one, one.delta))
    updates = [dataclasses.replace(one, client=f"pi-{i}") for i in range(4)]
    updates.append(dataclasses.replace(scaled(one, 8.0), client="pi-4"))
    assert once(clipped_mean(), updates).left_out == {
        "pi-4": f"update is {8 * length:.3g} long, the median of those who train the same tensors "
        f"is {length:.3g}; above 5 times that clipped_mean leaves it out"
    }


@pytest.mark.parametrize("factor", [0.01, 4.9])
def test_who_is_shorter_or_less_than_five_medians_long_counts(toy_plan, random_update, factor):
    one = random_update("pi-0", toy_plan, np.random.default_rng(0))
    updates = [dataclasses.replace(one, client=f"pi-{i}") for i in range(5)]
    updates[4] = scaled(updates[4], factor)
    assert once(clipped_mean(), updates).left_out == {}


def test_of_two_who_differ_neither_is_left_out(toy_plan, random_update):
    rng = np.random.default_rng(0)
    updates = [random_update(f"pi-{i}", toy_plan, rng) for i in range(2)]
    assert once(clipped_mean(), [updates[0], scaled(updates[1], 100.0)]).left_out == {}


def test_under_unequal_plans_lengths_compare_over_the_tensors_that_the_same_clients_train(unequal):
    updates = unequal(np.random.default_rng(0), blocks=(1, 1, 1, 5, 5, 5))
    name = "blocks.0.conv.weight"  # trained by the last three
    longer = {name: updates[5].delta[name] * 100}
    updates[5] = dataclasses.replace(updates[5], delta=dict(updates[5].delta) | longer)
    result = once(clipped_mean(), updates)
    assert result.left_out.keys() == {"pi-5"}
    assert result.coverage[name] == 2 and result.coverage["head.weight"] == 5


def test_a_tensor_below_its_quorum_without_those_left_out_stays(toy_plan, random_update):
    rng = np.random.default_rng(0)
    updates = [random_update(f"pi-{i}", toy_plan, rng) for i in range(3)]
    own = rule("clipped_mean", quorum=3)
    result = once(own, [*updates[:2], scaled(updates[2], 100.0)])
    assert result.delta == {} and result.statistics == {}
    assert set(result.coverage.values()) == {2}


@pytest.mark.parametrize("epsilon", [0.1, 0.5, 1.0])
@many("seed", range(5))
def test_who_sends_the_opposite_of_what_the_others_trained_counts_for_nothing(
    toy_plan, random_update, seed, epsilon
):
    """Inner product manipulation: the honest mean, turned round and shortened."""
    rng = np.random.default_rng(seed)
    honest = [random_update(f"pi-{i}", toy_plan, rng, num_examples=10) for i in range(8)]
    mean_of = {n: np.mean([u.delta[n] for u in honest], axis=0) for n in honest[0].delta}
    hostile = [
        scaled(dataclasses.replace(honest[0], client=f"pi-{i}", delta=mean_of), -epsilon)
        for i in (8, 9)
    ]
    result = once(clipped_mean(), [*honest, *hostile])
    assert {"pi-8", "pi-9"} <= result.left_out.keys()
    assert "update has a cosine of -" in result.left_out["pi-9"]
    assert (
        "with what the others amount to; below -0.5 clipped_mean leaves it out"
        in (result.left_out["pi-9"])
    )


@many("seed", SEEDS)
def test_the_cosine_is_with_the_weighted_sum_of_the_others_over_shared_tensors(unequal, seed):
    rng = np.random.default_rng(seed)
    updates = unequal(rng, blocks=(1, 3, 5, 1, 3, 5))
    turned = scaled(updates[2], -0.9)
    updates[2] = dataclasses.replace(updates[2], delta=updates[5].delta)
    updates[5] = dataclasses.replace(turned, client="pi-5", delta=scaled(updates[5], -0.9).delta)
    most = 3 * lower_median([u.num_examples for u in updates])
    counts = {u.client: min(u.num_examples, most) for u in updates}
    products, own, others = (dict.fromkeys(counts, 0.0) for _ in range(3))
    for clients, names in reference.groups(updates).items():
        trainers = [u for u in updates if u.client in clients]
        vectors = {u.client: np.array(reference.vector(u, names)) for u in trainers}
        lengths = {c: np.linalg.norm(v) for c, v in vectors.items()}
        bound = lower_median(list(lengths.values()))
        capped = 3 * lower_median([u.num_examples for u in trainers])
        weights = {
            u.client: min(u.num_examples, capped) * min(1, bound / lengths[u.client])
            for u in trainers
        }
        total = sum(min(u.num_examples, capped) for u in trainers)
        for c, v in vectors.items():
            rest = sum(weights[o] / total * vectors[o] for o in vectors if o != c)
            rest = np.zeros_like(v) if isinstance(rest, int) else rest
            products[c] += v @ rest
            own[c] += v @ v
            others[c] += rest @ rest
    expected = {c for c in counts if products[c] < -0.5 * np.sqrt(own[c] * others[c]) and others[c]}
    assert once(clipped_mean(), updates).left_out.keys() == expected
