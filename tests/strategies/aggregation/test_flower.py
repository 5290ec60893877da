"""Flower's robust strategies on equal plans, and where they go wrong.

Flower pairs arrays by position: every reply here has its keys in the plan's order.
"""

import dataclasses

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedMedian, FedTrimmedAvg, Krum, MultiKrum
from flwr.serverapp.strategy.multikrum import compute_distances
from numpy.testing import assert_allclose

from strategies.aggregation.by_group import groups_of, squared_distances
from strategies.aggregation.coordinatewise import median, trimmed_mean
from strategies.aggregation.selection import krum, multi_krum
from tests import reference
from tests.many import many

PAIRS = {
    "median": (FedMedian, {}, median()),
    "trimmed_mean": (FedTrimmedAvg, {"beta": 0.2}, trimmed_mean(0.2)),
    "krum": (Krum, {"num_malicious_nodes": 2}, krum(2)),
    "multi_krum": (
        MultiKrum,
        {"num_malicious_nodes": 2, "num_nodes_to_select": 8},
        multi_krum(2),
    ),
}


@pytest.fixture
def fleet(toy_plan, random_update):
    """Function (rng, sigma) → params ~ N(0, 1), what ten clients trained, and their updates.

    A reply is params + delta in float32, so the delta is taken from there, exactly.
    """

    def build(rng, sigma):
        specs = [spec for spec in toy_plan.specs if not spec.is_statistic]
        params = {s.name: rng.normal(size=s.shape).astype(np.float32) for s in specs}
        updates, trained = [], []
        for i in range(10):
            update = random_update(f"pi-{i}", toy_plan, rng, num_examples=10)
            reply = {n: p + np.float32(sigma) * update.delta[n] for n, p in params.items()}
            delta = {n: np.float64(reply[n]) - p for n, p in params.items()}
            updates.append(dataclasses.replace(update, delta=delta, statistics={}))
            trained.append(reply)
        return params, trained, updates

    return build


@pytest.mark.parametrize("name", PAIRS)
@many("seed", range(10))
def test_equal_plans_come_out_as_flowers(fleet, flower_round, name, seed):
    params, trained, updates = fleet(np.random.default_rng(seed), sigma=1.0)
    strategy, settings, own = PAIRS[name]
    flowers = flower_round(strategy(**settings), 1, params, trained, [10] * 10)
    ours = own.aggregate(updates, own.init())[0].delta
    assert flowers.keys() == ours.keys()
    for tensor, array in flowers.items():
        assert_allclose(params[tensor] + ours[tensor], array, rtol=1e-5, atol=1e-6)


def test_flowers_distances_are_wrong_for_small_updates_and_ours_are_right(fleet):
    worst = {"flower": 0.0, "ours": 0.0}
    for seed in range(5):
        _, trained, updates = fleet(np.random.default_rng(seed), sigma=1e-3)
        records = [ArrayRecord({n: Array(a) for n, a in reply.items()}) for reply in trained]
        (group,) = groups_of(updates)
        found = {
            "flower": compute_distances(records),
            "ours": squared_distances(group.inner_products()),
        }
        vectors = [reference.vector(u, group.names) for u in updates]
        for i, x in enumerate(vectors):
            for j, y in enumerate(vectors[:i]):
                true = reference.squared_distance(x, y)
                for who, distances in found.items():
                    worst[who] = max(worst[who], abs(distances[i, j] / true - 1))
    assert worst["flower"] > 0.1
    assert worst["ours"] < 1e-12


def test_so_flower_selects_other_clients_than_the_oracle_and_ours_the_same(fleet, flower_round):
    differ = 0
    for seed in range(10):
        params, trained, updates = fleet(np.random.default_rng(seed), sigma=1e-3)
        names = list(params)
        scores = reference.krum_scores([reference.vector(u, names) for u in updates], 2)
        best = int(np.argmin(scores))
        own = krum(2)
        ours = own.aggregate(updates, own.init())[0].delta
        flowers = flower_round(Krum(num_malicious_nodes=2), 1, params, trained, [10] * 10)
        for name in names:
            assert_allclose(ours[name], updates[best].delta[name], rtol=1e-12)
        differ += any(flowers[name].tobytes() != trained[best][name].tobytes() for name in names)
    assert differ >= 3
