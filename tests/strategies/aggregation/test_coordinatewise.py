"""Median and trimmed mean against sorted Python numbers."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
from numpy.testing import assert_allclose

from fleet.errors import ConfigError
from strategies.aggregation import rule
from strategies.aggregation.coordinatewise import median, trimmed_mean
from tests import reference
from tests.many import many

SEEDS = range(10)


def once(own, updates):
    return own.aggregate(updates, own.init())[0]


def check(ours, expected):
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
        assert_allclose(ours[name], array, rtol=1e-12, atol=1e-15)


@many("seed", SEEDS)
def test_median_over_unequal_plans_matches_the_oracle(unequal, seed):
    updates = unequal(np.random.default_rng(seed))
    check(once(median(), updates).delta, reference.trimmed_mean(updates, lambda n: (n - 1) // 2))


@pytest.mark.parametrize("fraction", ("0", "0.1", "0.2", "0.28", "0.3", "0.49"))
@pytest.mark.parametrize("count", (1, 2, 3, 10, 11, 25))
def test_trimmed_mean_matches_the_oracle(unequal, fraction, count):
    blocks = [i % 6 for i in range(count)]  # of some tensors there is one copy, of others `count`
    updates = unequal(np.random.default_rng(count), blocks)

    def cut_of(n):
        return min(math.ceil(Fraction(fraction) * n), (n - 1) // 2)

    check(
        once(trimmed_mean(float(fraction)), updates).delta, reference.trimmed_mean(updates, cut_of)
    )


def test_fewer_trainers_than_one_over_the_fraction_are_trimmed_too(unequal, poisoned):
    updates = unequal(np.random.default_rng(0), blocks=(5, 5, 5, 0, 0))
    updates[1] = poisoned(updates[1], delta=1e9)
    largest = np.abs(once(trimmed_mean(0.2), updates).delta["blocks.0.conv.weight"]).max()
    assert largest < 5


def test_what_is_kept_is_added_in_float64(toy_plan, random_update):
    updates = [random_update(f"pi-{i}", toy_plan, np.random.default_rng(i)) for i in range(3)]
    values = (1.0, 1.0, 1.0 + 2.0**-23)  # float32 would round their mean
    updates = [
        dataclasses.replace(u, delta={"head.weight": np.full((2, 4), v, np.float32)})
        for u, v in zip(updates, values, strict=True)
    ]
    mean = once(trimmed_mean(0.0), updates).delta["head.weight"]
    assert_allclose(mean, 1 + 2.0**-23 / 3, rtol=1e-16)


def test_a_float64_copy_among_float32_ones_keeps_its_digits(toy_plan, random_update):
    fine = 1 + 2.0**-40
    values = (np.float32(0), np.float64(fine), np.float32(2))
    updates = [
        dataclasses.replace(
            random_update(f"pi-{i}", toy_plan, np.random.default_rng(i)),
            delta={"head.weight": np.full((2, 4), value)},
        )
        for i, value in enumerate(values)
    ]
    assert (once(median(), updates).delta["head.weight"] == fine).all()


@many("seed", SEEDS)
def test_statistics_are_combined_by_the_rule_with_the_spread_of_the_means(unequal, seed):
    updates = unequal(np.random.default_rng(seed))
    ours = once(median(), updates).statistics
    for block in range(5):
        mean, var = (f"blocks.{block}.bn.running_{part}" for part in ("mean", "var"))
        trained = [u.statistics for u in updates if mean in u.statistics]
        means = np.stack([s[mean] for s in trained]).astype(np.float64)
        variances = np.stack([s[var] for s in trained]).astype(np.float64)
        expected = np.median(means, axis=0)
        assert_allclose(ours[mean], expected, rtol=1e-12, atol=1e-15)
        assert_allclose(
            ours[var], np.median(variances + (means - expected) ** 2, axis=0), rtol=1e-12
        )


@pytest.mark.parametrize("fraction", (-0.1, 0.5, math.nan))
def test_a_fraction_of_half_or_more_is_refused(fraction):
    with pytest.raises(ConfigError, match="trimmed_mean's fraction per side must be at least 0"):
        trimmed_mean(fraction)


def test_arrays_without_coordinates_or_dimensions_pass(toy_plan, random_update):
    updates = [
        dataclasses.replace(
            random_update(f"pi-{i}", toy_plan, np.random.default_rng(i)),
            delta={"empty": np.zeros((0, 3), np.float32), "scalar": np.float32(i)},
        )
        for i in range(3)
    ]
    for spec in ("median", "trimmed_mean", "krum:1", "geometric_median"):
        result = once(rule(spec), updates)
        assert result.delta["empty"].shape == (0, 3)
        assert result.delta["scalar"].shape == ()
    assert once(median(), updates).delta["scalar"] == 1.0
