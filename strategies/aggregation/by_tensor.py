"""Rules that treat every tensor, or every coordinate, on its own."""

from collections.abc import Callable, Sequence

import numpy as np

from fleet.state import ClientUpdate
from strategies.aggregation.copies import Copies, blocks, counts_of, in_order, trainers_of
from strategies.aggregation.protocol import Aggregate
from strategies.aggregation.statistics import Pool, combine_statistics, pooled_statistics

# Copies of one tensor and their clients' num_examples → one tensor of that shape.
Combine = Callable[[Sequence[np.ndarray], Sequence[int]], np.ndarray]


def combine_by_tensor(
    updates: Sequence[ClientUpdate], combine: Combine, pool: Pool = pooled_statistics
) -> Aggregate:
    """Combine every tensor's copies with `combine`, the running statistics with `pool`.

    One tensor after the other: beyond the updates themselves, memory holds the
    result and what `combine` needs for a single tensor.

    Args:
        updates: at most one per client, in any order.
        combine: takes the copies of one tensor and their num_examples, sorted by
            client name, so that arrival order changes no bit. A copy is read when it
            is asked for, so one that goes through them once holds one at a time.
        pool: clients' means, variances and num_examples → one mean and variance.

    Raises:
        UpdateError: if there is no update, a client sent two, num_examples is below 1,
            copies of one tensor differ in shape, or statistics come unpaired.
    """
    ordered = in_order(updates)
    delta, coverage = {}, {}
    for name, trainers in trainers_of(ordered).items():
        coverage[name] = len(trainers)
        delta[name] = combine(Copies(name, trainers), counts_of(trainers))
    statistics, counted = combine_statistics(ordered, pool)
    return Aggregate(delta, statistics, coverage | counted)


def by_coordinate(combine: Callable[[np.ndarray], np.ndarray]) -> Combine:
    """Lift a function of coordinates to tensors, a block of coordinates at a time.

    Args:
        combine: (n, w) values, a row a client → (w,) float64.
    """

    def whole(copies: Sequence[np.ndarray], counts: Sequence[int]) -> np.ndarray:
        parts = [combine(block) for _, block in blocks(copies)]
        shape = copies.shape if isinstance(copies, Copies) else copies[0].shape
        return np.concatenate(parts, dtype=np.float64).reshape(shape)

    return whole
