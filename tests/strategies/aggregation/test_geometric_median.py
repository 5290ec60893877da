"""The geometric median by what defines it, and its buckets."""

import numpy as np
import pytest

from fleet.errors import ConfigError
from strategies.aggregation.geometric_median import _buckets, geometric_median
from tests import reference
from tests.many import many

SEEDS = range(10)


def once(own, updates, state=None):
    return own.aggregate(updates, own.init() if state is None else state)[0]


def flat(arrays, names):
    return np.concatenate([np.ravel(arrays[name]) for name in names]).astype(np.float64)


def pull(vectors, point):
    """Σ (x − z)/‖x − z‖, which is 0 in the geometric median and nowhere else."""
    apart = np.array(vectors) - point
    return np.linalg.norm((apart / np.linalg.norm(apart, axis=1, keepdims=True)).sum(axis=0))


@pytest.mark.parametrize("scale", (1.0, 1e-3))
@many("seed", SEEDS)
def test_the_pull_of_all_clients_is_in_balance(unequal, poisoned, seed, scale):
    blocks = (1, 3, 5, 1, 0, 3, 5, 5, 3)
    updates = unequal(np.random.default_rng(seed), blocks)
    updates = [poisoned(u, delta=np.float32(scale)) for u in updates]
    own = geometric_median(smoothing=1e-6 * scale)
    ours = once(own, updates).delta
    by_client = {u.client: u for u in updates}
    parts = reference.groups(updates)
    assert len(parts) == 4
    for clients, names in parts.items():
        vectors = [flat(by_client[client].delta, names) for client in clients]
        assert pull(vectors, np.mean(vectors, axis=0)) > 1e-3  # the mean is not it
        assert pull(vectors, flat(ours, names)) < 1e-6


@pytest.mark.parametrize("factor", (1e3, 1e9, 1e30))
def test_just_under_half_hostile_move_it_little(toy_plan, random_update, poisoned, factor):
    rng = np.random.default_rng(0)
    updates = [random_update(f"pi-{i}", toy_plan, rng) for i in range(9)]
    hostile = [poisoned(u, delta=np.float32(factor)) for u in updates[:4]]
    ours = once(geometric_median(), [*hostile, *updates[4:]]).delta
    assert np.abs(flat(ours, sorted(ours))).max() < 5


@many("seed", SEEDS)
@pytest.mark.parametrize("size", (2, 3))
def test_with_buckets_it_is_the_median_of_their_means(toy_plan, random_update, seed, size):
    rng = np.random.default_rng(seed)
    updates = [random_update(f"pi-{i}", toy_plan, rng) for i in range(11)]
    names = sorted(updates[0].delta)
    own = geometric_median(size, seed=seed)
    ours = once(own, updates, {"round": seed}).delta
    buckets = _buckets([u.client for u in updates], size, seed, seed)
    means = buckets @ np.array([flat(u.delta, names) for u in updates])
    assert pull(means, flat(ours, names)) < 1e-6


def test_a_bucket_holds_so_many_clients_and_each_is_in_one():
    names = [f"pi-{i}" for i in range(11)]
    for size, sizes in ((2, [1, 2, 2, 2, 2, 2]), (3, [2, 3, 3, 3]), (9, [2, 3, 3, 3])):
        members = _buckets(names, size, 0, 0) > 0
        assert sorted(members.sum(axis=1)) == sizes
        assert (members.sum(axis=0) == 1).all()
    for few in range(1, 6):  # two buckets would have no majority
        np.testing.assert_array_equal(_buckets(names[:few], 2, 0, 0), np.eye(few))


def test_the_shuffle_depends_on_seed_and_round_and_nothing_else(toy_plan, random_update):
    rng = np.random.default_rng(0)
    updates = [random_update(f"pi-{i}", toy_plan, rng) for i in range(8)]

    def two_rounds(seed):
        own, state, results = geometric_median(2, seed=seed), {"round": 0}, []
        for _ in range(2):
            result, state = own.aggregate(updates, state)
            results.append(result.delta["head.weight"].tobytes())
        assert state == {"round": 2}
        return results

    first, second = two_rounds(seed=0)
    assert two_rounds(seed=0) == [first, second]
    assert len({first, second, *two_rounds(seed=1)}) == 4


@pytest.mark.parametrize("size", (0, -2, 1.5))
def test_a_bucket_size_is_a_whole_number(size):
    with pytest.raises(ConfigError, match="bucket size must be a whole number of at least 1, got"):
        geometric_median(size)
