"""What holds for all rules alike, over unequal plans."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fleet.errors import UpdateError
from strategies.aggregation import RULES, copies, rule

SPECS = (
    "mean",
    "clipped_mean",
    "clipped_mean:0.5",
    "median",
    "trimmed_mean",
    "krum:1",
    "multi_krum:1",
    "geometric_median",
    "geometric_median:2",
    "centred_clipping",
    "centred_clipping:0.5",
    "median+coverage:0.5",
)
ROBUST = [spec for spec in SPECS if spec not in ("mean", "clipped_mean:0.5")]
# Passes over the deltas: with lengths or distances one to measure, one to combine.
READS = {"clipped_mean": 3, "mean": 1, "median": 1, "trimmed_mean": 1, "centred_clipping": 1}


def base(spec):
    return spec.partition("+")[0].partition(":")[0]


def same_bits(first, second):
    for ours, theirs in ((first.delta, second.delta), (first.statistics, second.statistics)):
        assert list(ours) == list(theirs)
        assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
    assert first.coverage == second.coverage


def test_every_rule_is_here():
    assert {base(spec) for spec in SPECS} == RULES.keys()


@pytest.mark.parametrize("spec", SPECS)
def test_arrival_order_changes_no_bit_in_two_rounds(unequal, spec):
    rounds = [unequal(np.random.default_rng(seed)) for seed in range(2)]
    orders = [(0, 1, 2, 3, 4, 5), *itertools.islice(itertools.permutations(range(6)), 7, 720, 97)]
    first = None
    for order in orders:
        own = rule(spec)
        state = own.init()
        results = []
        for updates in rounds:
            result, state = own.aggregate([updates[i] for i in order], state)
            results.append(result)
        first = first or results
        for ours, theirs in zip(first, results, strict=True):
            same_bits(ours, theirs)


@pytest.mark.parametrize("spec", SPECS)
def test_a_tensor_is_float64_of_its_shape_and_counted(unequal, toy_plan, spec):
    updates = unequal(np.random.default_rng(0))
    own = rule(spec)
    result, _ = own.aggregate(updates, own.init())
    everything = result.delta | result.statistics
    assert everything.keys() == result.coverage.keys() == toy_plan.by_name.keys()
    for name, array in everything.items():
        assert array.dtype == np.float64
        assert array.shape == toy_plan.by_name[name].shape
        counted = [u for u in updates if u.client not in result.left_out]
        assert result.coverage[name] == sum(name in u.plan.by_name for u in counted)


@pytest.mark.parametrize("spec", SPECS)
def test_the_given_state_and_updates_stay_as_they_were(unequal, spec):
    own = rule(spec)
    _, state = own.aggregate(unequal(np.random.default_rng(0)), own.init())
    updates = unequal(np.random.default_rng(1))
    before, updates_before = copy.deepcopy(state), copy.deepcopy(updates)
    first, _ = own.aggregate(updates, state)
    assert repr(state) == repr(before)
    second, _ = own.aggregate(updates_before, before)
    same_bits(first, second)
    for update, old in zip(updates, updates_before, strict=True):
        assert all(update.delta[n].tobytes() == old.delta[n].tobytes() for n in old.delta)


@pytest.mark.parametrize("spec", SPECS)
def test_equal_updates_come_out_as_they_are(toy_plan, random_update, poisoned, spec):
    one = random_update("pi-0", toy_plan, np.random.default_rng(0), num_examples=9)
    one = poisoned(one, delta=0.01)  # shorter than the fixed bounds, so that nothing clips
    updates = [dataclasses.replace(one, client=f"pi-{i}") for i in range(7)]
    own = rule(spec)
    result, _ = own.aggregate(updates, own.init())
    for name, array in (one.delta | one.statistics).items():
        assert_allclose((result.delta | result.statistics)[name], array, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("spec", SPECS)
def test_tensors_are_read_seldom_and_those_of_one_name_together(unequal, lazily, spec):
    updates, reads = lazily(unequal(np.random.default_rng(0)))
    own = rule(spec)
    own.aggregate(updates, own.init())
    assert {count for (_, name), count in reads.items() if ".running_" in name} == {1}
    most = max(count for (_, name), count in reads.items() if ".running_" not in name)
    assert most == READS.get(base(spec), 2)


@pytest.mark.parametrize("spec", SPECS)
def test_blocks_of_a_few_coordinates_change_nothing(unequal, monkeypatch, spec):
    updates = unequal(np.random.default_rng(0))
    own = rule(spec)
    whole, _ = own.aggregate(updates, own.init())
    monkeypatch.setattr(copies, "_BLOCK_BYTES", 6 * 4 * 5)  # five coordinates of six clients
    parts, _ = own.aggregate(updates, own.init())
    for name, array in whole.delta.items():
        assert_allclose(parts.delta[name], array, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("spec", ROBUST)
def test_a_hostile_client_moves_nothing_far(toy_plan, random_update, poisoned, spec):
    rng = np.random.default_rng(0)
    honest = [random_update(f"pi-{i}", toy_plan, rng, num_examples=10) for i in range(7)]
    hostile = poisoned(honest[3], delta=-1e6, statistics=1e6)
    own = rule(spec)
    result, _ = own.aggregate([*honest[:3], hostile, *honest[4:]], own.init())
    for name, array in result.delta.items():
        assert np.abs(array).max() < 5, name
    for name, array in result.statistics.items():
        assert np.abs(array).max() < 20, name


@pytest.mark.parametrize("spec", ROBUST)
def test_wild_statistics_beside_an_inconspicuous_delta_do_no_harm(
    toy_plan, random_update, poisoned, spec
):
    rng = np.random.default_rng(0)
    updates = [random_update(f"pi-{i}", toy_plan, rng, num_examples=10) for i in range(7)]
    # The mean of all is nearest to all, so a rule that selects selects it.
    delta = {n: np.mean([u.delta[n] for u in updates], axis=0) for n in updates[0].delta}
    updates[3] = dataclasses.replace(poisoned(updates[3], statistics=1e6), delta=delta)
    own = rule(spec)
    result, _ = own.aggregate(updates, own.init())
    for name, array in result.statistics.items():
        assert np.abs(array).max() < 20, name


@pytest.mark.parametrize("spec", SPECS)
def test_two_updates_of_one_client_are_refused(unequal, spec):
    updates = unequal(np.random.default_rng(0))
    own = rule(spec)
    with pytest.raises(UpdateError, match="client pi-3 sent two updates in one round"):
        own.aggregate([*updates, updates[3]], own.init())


@pytest.mark.parametrize("spec", SPECS)
def test_shapes_that_would_broadcast_are_refused(unequal, spec):
    updates = unequal(np.random.default_rng(0))
    name = "blocks.4.conv.weight"
    updates[3] = dataclasses.replace(updates[3], delta=dict(updates[3].delta) | {name: np.zeros(3)})
    own = rule(spec)
    with pytest.raises(UpdateError, match=rf"{name} has shape \(3,\) from client pi-3, \(4, 3\)"):
        own.aggregate(updates, own.init())


@pytest.mark.parametrize("spec", SPECS)
def test_a_lone_client_decides_what_it_alone_trains(unequal, spec):
    updates = unequal(np.random.default_rng(0), blocks=(1, 3, 1, 1, 5))
    own = rule(spec.partition("+")[0].replace(":0.5", ":100.0"))
    result, _ = own.aggregate(updates, own.init())
    name = "blocks.0.conv.weight"
    assert_array_equal(result.delta[name], updates[4].delta[name].astype(np.float64))
