"""Intervals against SciPy's own."""

import math

import numpy as np
import pytest
from scipy import stats

from simulations.paired import estimate, paired_difference


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_an_interval_is_students(n):
    values = np.random.default_rng(n).normal(3, 2, n)
    ours = estimate(list(values))
    low, high = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
    assert ours.mean == pytest.approx(values.mean())
    assert (ours.mean - ours.half_width, ours.mean + ours.half_width) == pytest.approx((low, high))


def test_a_difference_is_over_the_seeds_that_both_have():
    rng = np.random.default_rng(0)
    seeds = rng.normal(0, 10, 6)  # what a seed does to both
    ours = {s: seeds[s] + 1 + rng.normal(0, 0.1) for s in range(6)}
    theirs = {s: seeds[s] for s in range(1, 6)}
    found = paired_difference(ours, theirs)
    test = stats.ttest_rel([ours[s] for s in range(1, 6)], [theirs[s] for s in range(1, 6)])
    low, high = test.confidence_interval(0.95)
    assert found.count == 5
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx(
        (low, high)
    )
    assert found.half_width < 1 < estimate(list(ours.values())).half_width


def test_one_value_has_no_interval_and_none_has_no_mean():
    assert estimate([2.0]).mean == 2.0 and math.isnan(estimate([2.0]).half_width)
    assert math.isnan(estimate([]).mean) and math.isnan(estimate([math.nan]).mean)
