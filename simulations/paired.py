"""Means over seeds, and differences between rows seed by seed, with Student's intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean of independent values.

    Attributes:
        mean: NaN of none.
        half_width: of its interval at `CONFIDENCE`; NaN of fewer than two.
        count: of values.
    """

    mean: float
    half_width: float
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and half of its interval, by Student's t with n − 1 degrees of freedom.

    Args:
        values: NaN is left out.
    """
    known = np.array([value for value in values if not math.isnan(value)], dtype=np.float64)
    n = len(known)
    if n < 2:
        return Estimate(float(known[0]) if n else math.nan, math.nan, n)
    from scipy.special import stdtrit  # here: it takes a moment to import

    error = known.std(ddof=1) / math.sqrt(n)
    return Estimate(float(known.mean()), float(stdtrit(n - 1, (1 + CONFIDENCE) / 2) * error), n)


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate:
    """Mean of ours − theirs, over the seeds that both have.

    What a seed does to both alike (partition, initial order) is not in the interval.
    """
    return estimate([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])
