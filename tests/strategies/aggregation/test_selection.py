"""Krum and Multi-Krum against scores of Python numbers."""

import dataclasses

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fleet.errors import ConfigError
from strategies.aggregation.by_group import groups_of, squared_distances
from strategies.aggregation.selection import krum, multi_krum
from tests import reference
from tests.many import many

SEEDS = range(10)


def once(own, updates):
    return own.aggregate(updates, own.init())[0]


def selected(updates, names, hostile, count):
    vectors = [reference.vector(u, names) for u in updates]
    scores = reference.krum_scores(vectors, hostile)
    return sorted(sorted(range(len(updates)), key=lambda i: scores[i])[:count])


@pytest.mark.parametrize("scale", (1.0, 1e-3, 1e-6))
@many("seed", SEEDS)
def test_distances_agree_with_the_oracle_also_for_tiny_updates(
    toy_plan, random_update, seed, scale
):
    rng = np.random.default_rng(seed)
    common = random_update("all", toy_plan, rng)
    updates = []
    for i in range(6):  # all share a step a thousand times as long as what tells them apart
        own = random_update(f"pi-{i}", toy_plan, rng)
        delta = {n: np.float32(scale) * (a + common.delta[n] * 1000) for n, a in own.delta.items()}
        updates.append(dataclasses.replace(own, delta=delta))
    (group,) = groups_of(updates)
    ours = squared_distances(group.inner_products())
    vectors = [reference.vector(u, group.names) for u in updates]
    for i, x in enumerate(vectors):
        for j, y in enumerate(vectors):
            assert ours[i, j] == pytest.approx(reference.squared_distance(x, y), rel=1e-8)


@pytest.mark.parametrize("hostile", (0, 1, 2))
@many("seed", SEEDS)
def test_krum_is_the_update_that_the_oracle_picks(toy_plan, random_update, seed, hostile):
    rng = np.random.default_rng(seed)
    updates = [random_update(f"pi-{i}", toy_plan, rng) for i in range(8)]
    (best,) = selected(updates, sorted(updates[0].delta), hostile, 1)
    for name, array in once(krum(hostile), updates).delta.items():
        assert_array_equal(array, updates[best].delta[name].astype(np.float64))


@many("seed", SEEDS)
def test_multi_krum_selects_in_every_set_of_tensors_that_the_same_clients_trained(unequal, seed):
    updates = unequal(np.random.default_rng(seed), blocks=(1, 3, 5, 1, 0, 3, 5, 5, 3, 5, 5))
    ours = once(multi_krum(1), updates).delta
    by_client = {u.client: u for u in updates}
    parts = reference.groups(updates)
    assert len(parts) == 4 and min(map(len, parts)) == 5
    for clients, names in parts.items():
        trainers = [by_client[client] for client in clients]
        chosen = selected(trainers, names, 1, len(trainers) - 1)
        for name in names:
            mean = np.mean([trainers[i].delta[name].astype(np.float64) for i in chosen], axis=0)
            assert_allclose(ours[name], mean, rtol=1e-12, atol=1e-15)


@many("seed", SEEDS)
def test_hostile_clients_are_never_selected(toy_plan, random_update, poisoned, seed):
    rng = np.random.default_rng(seed)
    updates = [random_update(f"pi-{i}", toy_plan, rng) for i in range(9)]
    places = rng.choice(9, 3, replace=False)
    for i in places:
        updates[i] = poisoned(updates[i], delta=-10.0)
    honest = [u for i, u in enumerate(updates) if i not in places]
    ours = once(multi_krum(3), updates).delta
    for name, array in ours.items():
        mean = np.mean([u.delta[name].astype(np.float64) for u in honest], axis=0)
        assert_allclose(array, mean, rtol=1e-12, atol=1e-15)


def test_where_few_trained_fewer_can_be_hostile(toy_plan, random_update, poisoned):
    rng = np.random.default_rng(0)
    updates = [random_update(f"pi-{i}", toy_plan, rng) for i in range(5)]
    updates[2] = poisoned(updates[2], delta=100.0)
    ours, lowered = once(multi_krum(4), updates).delta, once(multi_krum(1), updates).delta
    assert all(ours[name].tobytes() == lowered[name].tobytes() for name in ours)
    assert all(np.abs(array).max() < 5 for array in ours.values())


def test_clients_that_krum_leaves_out_are_read_once(unequal, lazily):
    updates, reads = lazily(unequal(np.random.default_rng(0), blocks=(5,) * 6))
    once(krum(1), updates)
    twice = {client for (client, name), count in reads.items() if count == 2}
    assert len(twice) == 1


@pytest.mark.parametrize("hostile", (-1, 0.5))
def test_a_number_of_clients_is_a_whole_number(hostile):
    text = "number of hostile clients must be a whole number of at least 0, got"
    with pytest.raises(ConfigError, match=f"^krum's {text}"):
        krum(hostile)
    with pytest.raises(ConfigError, match=f"^multi_krum's {text}"):
        multi_krum(hostile)
    with pytest.raises(ConfigError, match="multi_krum must select a whole number of clients"):
        multi_krum(1, selected=0)
