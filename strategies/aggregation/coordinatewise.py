"""Robust rules of single coordinates: the median and the trimmed mean.

A client has one voice, however many examples it says it has: a number that nobody can
check must not outvote the others.
"""

import functools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fleet.cores import available_cores
from fleet.errors import ConfigError
from fleet.state import ClientUpdate
from strategies.aggregation.by_tensor import by_coordinate, combine_by_tensor
from strategies.aggregation.protocol import Aggregate, Rule, stateless
from strategies.aggregation.statistics import robust_statistics

_LANES = 256  # coordinates sorted at a time: with 1,000 clients, 1 MB, which caches hold


def median() -> Rule:
    """Median of every coordinate over those who trained its tensor.

    Source: Yin et al., arXiv:1803.01498, definition 1.
    """

    def aggregate(updates: Sequence[ClientUpdate]) -> Aggregate:
        return combine_by_tensor(updates, _median, median_statistics)

    return stateless(aggregate)


def trimmed_mean(fraction: float = 0.2) -> Rule:
    """Mean of every coordinate without its largest and smallest values.

    Of n trainers of a tensor, fraction·n are left out on each side, rounded up, as long as
    one remains: rounded down, nothing would be trimmed of a tensor that fewer than
    1/fraction clients train. Where fraction·n is whole, Flower's FedTrimmedAvg is the same.

    Args:
        fraction: share of the trainers left out per side; 0.2 is Flower's default too.

    Raises:
        ConfigError: if it is not at least 0 and below 0.5.

    Source: Yin et al., arXiv:1803.01498, definition 2.
    """
    if not 0 <= fraction < 0.5:
        raise ConfigError(
            f"trimmed_mean's fraction per side must be at least 0 and below 0.5, got {fraction}"
        )
    combine = by_coordinate(functools.partial(_middle, fraction=fraction))

    def aggregate(updates: Sequence[ClientUpdate]) -> Aggregate:
        return combine_by_tensor(updates, combine, robust_statistics(combine))

    return stateless(aggregate)


def _middle(block: np.ndarray, fraction: float) -> np.ndarray:
    """Mean of every column without `fraction` of its values on each side: (n, w) → (w,)."""
    n, width = block.shape
    # 0.28·25 is a little above 7 in floating point, and must not count as 8.
    cut = min(math.ceil(fraction * n - 1e-9), (n - 1) // 2)
    means = np.empty(width)

    def fill(start: int) -> None:
        # Ordering float32 values is exact; only the kept ones are added, in float64.
        lanes = np.ascontiguousarray(block[:, start : start + _LANES].T)
        if cut:  # NumPy sorts all in less time than it takes to find both places
            lanes.sort(axis=1)
        kept = lanes[:, cut : n - cut]
        means[start : start + _LANES] = kept.sum(axis=1, dtype=np.float64) / (n - 2 * cut)

    with ThreadPoolExecutor(
        available_cores()
    ) as pool:  # NumPy lets others run as it orders numbers
        list(pool.map(fill, range(0, width, _LANES)))
    return means


_median = by_coordinate(functools.partial(_middle, fraction=0.5))  # one or two values remain

median_statistics = robust_statistics(_median)
