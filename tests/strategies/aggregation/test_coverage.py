"""Quorum and coverage correction, around any rule."""

import math

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fleet.errors import ConfigError
from strategies.aggregation import rule, weighted_mean
from strategies.aggregation.coverage import with_coverage_correction
from tests import reference
from tests.many import many

RULES = ("mean", "median", "trimmed_mean", "krum:1", "geometric_median:2", "centred_clipping")


def once(own, updates):
    return own.aggregate(updates, own.init())[0]


@many("quorum", range(1, 8))
@pytest.mark.parametrize("spec", RULES)
def test_quorum_leaves_out_what_too_few_trained(unequal, toy_plan, spec, quorum):
    updates = unequal(np.random.default_rng(0))
    aggregate = once(rule(spec, quorum=quorum), updates)
    assert aggregate.delta.keys() | aggregate.statistics.keys() == {
        name for name, trainers in aggregate.coverage.items() if trainers >= quorum
    }
    assert aggregate.coverage == {
        spec.name: sum(spec.name in u.plan.by_name for u in updates) for spec in toy_plan.specs
    }
    unrestricted = once(rule(spec), updates)
    for name, array in (aggregate.delta | aggregate.statistics).items():
        assert_array_equal(array, (unrestricted.delta | unrestricted.statistics)[name])
    assert aggregate.delta.keys() == reference.weighted_mean(updates, quorum).keys()


def test_a_rule_never_reads_what_too_few_trained(unequal, lazily):
    updates, reads = lazily(unequal(np.random.default_rng(0)))
    once(rule("median", quorum=2), updates)
    assert ("pi-2", "head.weight") in reads
    assert not any("blocks.0" in name for _, name in reads)  # pi-2 alone reached that deep


@pytest.mark.parametrize("quorum", (0, -1, 1.5))
def test_a_quorum_below_one_is_refused(quorum):
    with pytest.raises(ConfigError, match="quorum must be a whole number of at least 1, got"):
        rule("mean", quorum=quorum)


@pytest.mark.parametrize("seed", range(5))
def test_with_power_one_who_did_not_train_votes_for_no_change(unequal, seed):
    updates = unequal(np.random.default_rng(seed))
    corrected = once(rule("mean+coverage"), updates)
    cohort = sum(u.num_examples for u in updates)
    for name, array in corrected.delta.items():
        zero = np.zeros(array.shape)
        votes = sum(u.num_examples * np.float64(u.delta.get(name, zero)) for u in updates)
        assert_allclose(array, votes / cohort, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("power", (0.25, 0.5, 2.0))
def test_a_step_is_scaled_by_the_share_of_examples_to_a_power(unequal, power):
    updates = unequal(np.random.default_rng(0))
    plain, corrected = (
        once(rule("median"), updates),
        once(rule(f"median+coverage:{power}"), updates),
    )
    cohort = sum(u.num_examples for u in updates)
    for name, array in plain.delta.items():
        share = sum(u.num_examples for u in updates if name in u.delta) / cohort
        assert_allclose(corrected.delta[name], array * share**power, rtol=1e-12)
    for name, array in plain.statistics.items():
        assert_array_equal(corrected.statistics[name], array)


def test_equal_plans_need_no_correction(toy_plan, random_update):
    updates = [random_update(f"pi-{i}", toy_plan, np.random.default_rng(i)) for i in range(4)]
    corrected = once(rule("mean+coverage"), updates)
    for name, array in weighted_mean(updates).delta.items():
        assert_array_equal(corrected.delta[name], array)


@pytest.mark.parametrize("power", (0, -1.0, math.inf, math.nan))
def test_a_power_that_corrects_nothing_is_refused(power):
    with pytest.raises(ConfigError, match="coverage's power must be above 0 and finite, got"):
        with_coverage_correction(rule("mean"), power)
