"""Running means and variances of trained norms: combined as values, never stepped."""

from collections.abc import Callable, Sequence

import numpy as np

from fleet.errors import UpdateError
from fleet.state import Arrays, ClientUpdate
from strategies.aggregation.copies import Copies, average, counts_of, trainers_of

# Clients' means, variances and num_examples → one mean and one variance.
Pool = Callable[
    [Sequence[np.ndarray], Sequence[np.ndarray], Sequence[int]], tuple[np.ndarray, np.ndarray]
]


def combine_statistics(
    ordered: Sequence[ClientUpdate], pool: Pool
) -> tuple[Arrays, dict[str, int]]:
    """Every norm's statistics over the clients that sent them, and how many these were.

    Raises:
        UpdateError: if statistics come unpaired, are not in the client's plan, or
            copies of one tensor differ in shape.
    """
    statistics, coverage = {}, {}
    for (mean, var), trainers in trainers_of(ordered, _pairs).items():
        coverage[mean] = coverage[var] = len(trainers)
        means, variances = (Copies(name, trainers, lambda u: u.statistics) for name in (mean, var))
        statistics[mean], statistics[var] = pool(means, variances, counts_of(trainers))
    return statistics, coverage


def pooled_statistics(
    means: Sequence[np.ndarray], variances: Sequence[np.ndarray], counts: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of all the data, from every shard's own.

    mean = Σ w·m and var = Σ w·(v + (m − mean)²), with w = count/Σ count. This is
    Σ w·(v + m²) − mean² without its cancellation where |mean| ≫ √var. A plain
    mean of the variances would lose how far the shards' means lie apart.

    Exact for population variances. PyTorch's running variances carry Bessel's
    correction of their batches; it passes through as a factor on v.

    Args:
        means, variances: one (C,) array a shard.
        counts: examples behind each; all at least 1.

    Returns:
        (C,) float64 mean and (C,) float64 variance.

    Raises:
        UpdateError: if there is no shard, or one of fewer than 1 examples.

    Source: Chan, Golub and LeVeque, The American Statistician 37(3), 1983.
    """
    if not counts or not all(count >= 1 for count in counts):
        raise UpdateError(f"statistics pool over counts of at least 1, got {list(counts)}")
    means = list(means)
    mean = average(means, counts)
    return mean, average(_second_moments(means, variances, mean), counts)


def robust_statistics(
    combine: Callable[[Sequence[np.ndarray], Sequence[int]], np.ndarray],
) -> Pool:
    """Statistics that a few hostile clients cannot carry away.

    mean = combine(m) and var = combine(v + (m − mean)²): the pooled formula with a robust
    combination, say the coordinate median, in place of its weighted means. The spread of
    honest clients' means stays in the variance; a wild mean or variance is an outlier like
    any other.

    Rules that select or weigh clients by their deltas take the median over all trainers
    too, not the statistics of those they selected: an inconspicuous delta does not vouch
    for the statistics beside it.

    Args:
        combine: copies of one tensor and their num_examples → one tensor.
    """

    def pool(
        means: Sequence[np.ndarray], variances: Sequence[np.ndarray], counts: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        means = list(means)
        mean = combine(means, counts)
        return mean, combine(_second_moments(means, variances, mean), counts)

    return pool


def _second_moments(
    means: Sequence[np.ndarray], variances: Sequence[np.ndarray], mean: np.ndarray
) -> list[np.ndarray]:
    """Each client's mean square about a common mean: v + (m − mean)²."""
    pairs = zip(means, variances, strict=True)
    return [variance + np.square(shard - mean) for shard, variance in pairs]


def _pairs(update: ClientUpdate) -> list[tuple[str, str]]:
    """(running mean, running variance) of every norm whose statistics the client sent."""
    specs = update.plan.by_name
    names = {"mean": {}, "var": {}}  # role → norm → tensor name
    for name in update.statistics:
        if name not in specs or not specs[name].is_statistic:
            raise UpdateError(
                f"client {update.client} sent {name} as a statistic, plan "
                f"{update.plan.digest[:8]} has no such statistic; run the server's plan"
            )
        names[specs[name].role][name.rpartition(".")[0]] = name
    if unpaired := sorted(names["mean"].keys() ^ names["var"].keys()):
        norm = unpaired[0]
        present = names["mean"].get(norm) or names["var"].get(norm)
        raise UpdateError(
            f"client {update.client} sent {present} without its other half; "
            f"mean and variance of {norm} pool only together"
        )
    return [(mean, names["var"][norm]) for norm, mean in names["mean"].items()]
