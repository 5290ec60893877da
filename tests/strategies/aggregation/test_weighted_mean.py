import dataclasses
import itertools

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg
from numpy.testing import assert_allclose

from fleet.errors import UpdateError
from strategies.aggregation import combine_by_tensor, pooled_statistics, weighted_mean
from strategies.server_opt import sgd
from tests import reference
from tests.many import many

SEEDS = range(20)
BLOCKS = (1, 3, 5, 1, 0, 3)  # of the fixture's six clients


@many("seed", SEEDS)
def test_weighted_mean_over_unequal_plans_matches_the_oracle(unequal, seed):
    updates = unequal(np.random.default_rng(seed))
    ours, expected = weighted_mean(updates).delta, reference.weighted_mean(updates)
    assert ours.keys() == expected.keys()
    for name, mean in expected.items():
        assert ours[name].dtype == np.float64
        assert_allclose(ours[name], mean, rtol=1e-12, atol=1e-14)


@many("seed", SEEDS)
def test_statistics_over_unequal_plans_match_the_oracle(unequal, toy_plan, seed):
    updates = unequal(np.random.default_rng(seed))
    ours = weighted_mean(updates).statistics
    assert ours.keys() == {spec.name for spec in toy_plan.specs if spec.is_statistic}
    for block in range(5):
        norm = f"blocks.{block}.bn"
        trained = [u for u in updates if f"{norm}.running_mean" in u.statistics]
        mean, var = reference.pooled_statistics(
            [u.statistics[f"{norm}.running_mean"] for u in trained],
            [u.statistics[f"{norm}.running_var"] for u in trained],
            [u.num_examples for u in trained],
        )
        assert_allclose(ours[f"{norm}.running_mean"], mean, rtol=1e-12, atol=1e-14)
        assert_allclose(ours[f"{norm}.running_var"], var, rtol=1e-12)


@many("seed", SEEDS)
def test_pooled_statistics_are_those_of_all_the_data(seed):
    rng = np.random.default_rng(seed)
    shards = [rng.normal(rng.normal(), 2.0, size=(n, 4)) for n in (30, 10, 60)]
    mean, var = pooled_statistics(
        [s.mean(0) for s in shards], [s.var(0) for s in shards], counts=[30, 10, 60]
    )
    everything = np.concatenate(shards)
    assert_allclose(mean, everything.mean(0), rtol=1e-12)
    assert_allclose(var, everything.var(0), rtol=1e-12)


def test_pooled_variance_survives_a_mean_far_from_zero():
    rng = np.random.default_rng(0)
    shards = [rng.normal(1e6, 1e-2, size=(n, 4)) for n in (30, 10, 60)]
    counts = [len(s) for s in shards]
    _, var = pooled_statistics([s.mean(0) for s in shards], [s.var(0) for s in shards], counts)
    assert_allclose(var, np.concatenate(shards).var(0), rtol=1e-6)
    _, textbook = reference.pooled_statistics(
        [s.mean(0) for s in shards], [s.var(0) for s in shards], counts
    )
    assert np.abs(textbook / var - 1).max() > 0.1  # which is why it is not the form we use


@pytest.mark.parametrize("counts", ([], [3, 0], [3, float("nan")]))
def test_pooled_statistics_need_a_count_for_every_shard(counts):
    shards = [np.ones(4)] * len(counts)
    with pytest.raises(UpdateError, match="statistics pool over counts of at least 1, got"):
        pooled_statistics(shards, shards, counts)


def test_arrival_order_changes_no_bit(unequal):
    updates = unequal(np.random.default_rng(0))
    first = weighted_mean(updates)
    for permuted in itertools.permutations(updates):
        again = weighted_mean(permuted)
        for ours, theirs in ((first.delta, again.delta), (first.statistics, again.statistics)):
            assert list(ours) == list(theirs)
            assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
        assert first.coverage == again.coverage


def test_a_lone_trainer_passes_through_exactly(toy_plan, random_update):
    update = random_update("pi-0", toy_plan, np.random.default_rng(0), num_examples=7)
    aggregate = weighted_mean([update])
    for name, array in (update.delta | update.statistics).items():
        pooled = (aggregate.delta | aggregate.statistics)[name]
        np.testing.assert_array_equal(pooled, array.astype(np.float64))


def test_coverage_counts_the_trainers_of_each_tensor(unequal, toy_plan):
    coverage = weighted_mean(unequal(np.random.default_rng(0))).coverage
    assert coverage == {
        spec.name: sum(blocks >= spec.depth for blocks in BLOCKS) for spec in toy_plan.specs
    }


def test_what_nobody_trained_is_absent(toy_plan, random_update):
    rng = np.random.default_rng(0)
    updates = [random_update(f"pi-{i}", toy_plan.narrow(1), rng) for i in range(3)]
    aggregate = weighted_mean(updates)
    trained = toy_plan.narrow(1).by_name.keys()
    assert aggregate.delta.keys() | aggregate.statistics.keys() == trained
    assert aggregate.coverage.keys() == trained


@many("seed", SEEDS)
def test_equal_plans_with_plain_averaging_are_flowers_fedavg(
    toy_plan, random_update, flower_round, seed
):
    rng = np.random.default_rng(seed)
    updates = [random_update(f"pi-{i}", toy_plan, rng) for i in range(4)]
    params = {
        spec.name: rng.normal(size=spec.shape).astype(np.float32)
        for spec in toy_plan.specs
        if not spec.is_statistic
    }
    trained = [{name: params[name] + u.delta[name] for name in params} for u in updates]
    flowers = flower_round(
        FedAvg(),
        1,
        params | updates[0].statistics,
        [arrays | dict(u.statistics) for arrays, u in zip(trained, updates, strict=True)],
        [u.num_examples for u in updates],
    )
    # What the replies carry is rounded to float32, so the deltas are taken from there.
    updates = [
        dataclasses.replace(u, delta={name: arrays[name] - params[name] for name in params})
        for arrays, u in zip(trained, updates, strict=True)
    ]
    aggregate, optimizer = weighted_mean(updates), sgd(1.0)
    ours, _ = optimizer.update(aggregate.delta, optimizer.init(params), params)
    ours = ours | dict(aggregate.statistics)
    assert ours.keys() == flowers.keys()
    for name in ours:
        if name.endswith(".running_var"):  # Flower drops the spread between the clients
            assert np.all(ours[name] >= flowers[name] * (1 - 1e-6))
        else:
            assert_allclose(ours[name], flowers[name], rtol=1e-6, atol=1e-6)


def test_a_users_rule_needs_only_what_to_do_with_one_tensor(unequal):
    def unweighted_median(updates):
        return combine_by_tensor(updates, lambda copies, counts: np.median(copies, axis=0))

    updates = unequal(np.random.default_rng(0))
    copies = np.stack([update.delta["head.weight"] for update in updates])
    aggregate = unweighted_median(updates)
    np.testing.assert_array_equal(aggregate.delta["head.weight"], np.median(copies, axis=0))
    assert aggregate.statistics.keys() == weighted_mean(updates).statistics.keys()


def test_nan_is_passed_on(toy_plan, random_update):
    rng = np.random.default_rng(0)
    updates = [random_update(f"pi-{i}", toy_plan, rng) for i in range(3)]
    updates[1].delta["head.weight"][0, 1] = np.nan
    assert np.isnan(weighted_mean(updates).delta["head.weight"]).sum() == 1


def test_no_updates_are_refused():
    with pytest.raises(UpdateError, match="no updates to aggregate; keep the old state"):
        weighted_mean([])


@pytest.mark.parametrize("num_examples", (0, -3, float("nan")))
def test_a_weight_below_one_is_refused(unequal, num_examples):
    updates = unequal(np.random.default_rng(0))
    updates[2] = dataclasses.replace(updates[2], num_examples=num_examples)
    with pytest.raises(UpdateError, match=f"client pi-2 reports {num_examples} examples, a weight"):
        weighted_mean(updates)


def test_two_updates_of_one_client_are_refused(unequal):
    updates = unequal(np.random.default_rng(0))
    with pytest.raises(UpdateError, match="client pi-3 sent two updates in one round"):
        weighted_mean([*updates, updates[3]])


def test_shapes_that_would_broadcast_are_refused(unequal):
    updates = unequal(np.random.default_rng(0))
    name = "blocks.4.conv.weight"
    delta = dict(updates[3].delta) | {name: np.zeros(3, np.float32)}
    updates[3] = dataclasses.replace(updates[3], delta=delta)
    text = rf"{name} has shape \(3,\) from client pi-3, \(4, 3\) from client pi-0"
    with pytest.raises(UpdateError, match=text):
        weighted_mean(updates)


@pytest.mark.parametrize("half", ("running_mean", "running_var"))
def test_half_a_norms_statistics_are_refused(unequal, half):
    updates = unequal(np.random.default_rng(0))
    name = f"blocks.4.bn.{half}"
    updates[0] = dataclasses.replace(updates[0], statistics={name: np.ones(4)})
    with pytest.raises(UpdateError, match=f"client pi-0 sent {name} without its other half"):
        weighted_mean(updates)


@pytest.mark.parametrize("name", ("stem.bn.running_mean", "head.weight"))
def test_a_statistic_outside_the_plan_is_refused(unequal, name):
    updates = unequal(np.random.default_rng(0))
    updates[0] = dataclasses.replace(updates[0], statistics={name: np.ones(4)})
    with pytest.raises(UpdateError, match=f"client pi-0 sent {name} as a statistic, plan"):
        weighted_mean(updates)
