"""Aggregation over unequal plans: many clients' updates become one.

Clients train sub-plans of one plan, so their updates carry different sets of
tensor names. Every tensor is therefore combined on its own, over the clients
that trained it; what nobody trained is absent from the result and keeps its
old value on the server.

A rule is any function from updates to an `Aggregate`. Most differ only in how
they combine the copies of one tensor; `combine_by_tensor` does the rest:

    def unweighted_median(updates):
        return combine_by_tensor(updates, lambda copies, counts: np.median(copies, axis=0))
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from fleet.errors import ConfigError, UpdateError
from fleet.state import Arrays, ClientUpdate


@dataclass(frozen=True)
class Aggregate:
    """What a round's updates amount to.

    Attributes:
        delta: tensor name → float64 step for the server optimiser; only tensors
            that as many clients trained as the quorum asks for.
        statistics: pooled running means and variances, float64, under the same quorum.
        coverage: tensor name → how many clients trained it, quorum reached or not.
    """

    delta: Arrays
    statistics: Arrays
    coverage: Mapping[str, int]


@dataclass(frozen=True)
class Rule:
    """How a round's updates become one, as two pure functions.

    Attributes:
        init: () → state before the first round.
        aggregate: (updates, state) → (aggregate, state).
    """

    init: Callable[[], Mapping]
    aggregate: Callable[[Sequence[ClientUpdate], Mapping], tuple[Aggregate, Mapping]]


def stateless(combine: Callable[[Sequence[ClientUpdate]], Aggregate]) -> Rule:
    """A rule that remembers nothing."""
    return Rule(dict, lambda updates, state: (combine(updates), state))


def rule(name: str, quorum: int = 1) -> Rule:
    """A rule by its setting."""
    return stateless(lambda updates: weighted_mean(updates, quorum))


# Copies of one tensor and their clients' num_examples → one tensor of that shape.
Combine = Callable[[Sequence[np.ndarray], Sequence[int]], np.ndarray]


def weighted_mean(updates: Sequence[ClientUpdate], quorum: int = 1) -> Aggregate:
    """Mean of every tensor over those who trained it, weighted by num_examples.

    With equal plans this is federated averaging.

    Args:
        updates: at most one per client, in any order: the result is the same bit for bit.
        quorum: how many clients must have trained a tensor; below that it is left out.

    Raises:
        UpdateError: as `combine_by_tensor`.
        ConfigError: if the quorum is below 1.

    Source: McMahan et al., arXiv:1602.05629, algorithm 1, taken per tensor.
    """
    return combine_by_tensor(updates, _mean, quorum)


def combine_by_tensor(
    updates: Sequence[ClientUpdate], combine: Combine, quorum: int = 1
) -> Aggregate:
    """Combine every tensor's copies with `combine`; pool the running statistics.

    One tensor after the other: beyond the updates themselves, memory holds the
    result and what `combine` needs for a single tensor.

    Args:
        updates: at most one per client, in any order.
        combine: takes the copies of one tensor and their num_examples, sorted by
            client name, so that arrival order changes no bit.
        quorum: how many clients must have trained a tensor; below that it is left out.

    Raises:
        UpdateError: if there is no update, a client sent two, num_examples is below 1,
            copies of one tensor differ in shape, or statistics come unpaired.
        ConfigError: if the quorum is below 1.
    """
    if quorum < 1:
        raise ConfigError(f"quorum must be at least 1, got {quorum}")
    ordered = _in_order(updates)
    delta, statistics, coverage = {}, {}, {}
    for name, trainers in _trainers(ordered, lambda update: update.delta).items():
        coverage[name] = len(trainers)
        if len(trainers) >= quorum:
            copies = _copies(name, trainers, [update.delta[name] for update in trainers])
            delta[name] = combine(copies, _counts(trainers))
    for (mean, var), trainers in _trainers(ordered, _statistic_pairs).items():
        coverage[mean] = coverage[var] = len(trainers)
        if len(trainers) >= quorum:
            means = _copies(mean, trainers, [update.statistics[mean] for update in trainers])
            variances = _copies(var, trainers, [update.statistics[var] for update in trainers])
            statistics[mean], statistics[var] = pooled_statistics(
                means, variances, _counts(trainers)
            )
    return Aggregate(delta, statistics, coverage)


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
    mean = _mean(means, counts)
    spreads = (
        variance + np.square(shard - mean) for shard, variance in zip(means, variances, strict=True)
    )
    return mean, _mean(spreads, counts)


def _mean(copies: Iterable[np.ndarray], counts: Sequence[int]) -> np.ndarray:
    """Weighted mean as a running sum in float64, one further copy at a time."""
    total = None
    for copy, count in zip(copies, counts, strict=True):
        # Summing count·x and dividing once leaves a lone float32 copy exact.
        term = np.asarray(np.multiply(copy, float(count), dtype=np.float64))
        total = term if total is None else np.add(total, term, out=total)
    return np.asarray(total / float(sum(counts)))


def _in_order(updates: Sequence[ClientUpdate]) -> list[ClientUpdate]:
    """The updates sorted by client name, each fit to be weighed."""
    if not updates:
        raise UpdateError("no updates to aggregate; keep the old state when a round brings none")
    ordered = sorted(updates, key=lambda update: update.client)
    for update, following in pairwise(ordered):
        if update.client == following.client:
            raise UpdateError(
                f"client {update.client} sent two updates in one round; pass on one of them"
            )
    for update in ordered:
        if not update.num_examples >= 1:  # also true of NaN, unlike < 1
            raise UpdateError(
                f"client {update.client} reports {update.num_examples} examples, "
                f"a weight needs at least 1; refuse its update"
            )
    return ordered


def _trainers(ordered: Sequence[ClientUpdate], keys_of: Callable) -> dict:
    """What `keys_of` finds in an update → the updates in which it is found."""
    trainers = {}
    for update in ordered:
        for key in keys_of(update):
            trainers.setdefault(key, []).append(update)
    return trainers


def _statistic_pairs(update: ClientUpdate) -> list[tuple[str, str]]:
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


def _copies(
    name: str, trainers: Sequence[ClientUpdate], copies: list[np.ndarray]
) -> list[np.ndarray]:
    """The copies, all of one shape: numpy would broadcast (3,) into (4, 3) silently."""
    for update, copy in zip(trainers, copies, strict=True):
        if copy.shape != copies[0].shape:
            raise UpdateError(
                f"{name} has shape {copy.shape} from client {update.client}, "
                f"{copies[0].shape} from client {trainers[0].client}; "
                f"check updates against their plan before aggregating"
            )
    return copies


def _counts(trainers: Sequence[ClientUpdate]) -> list[int]:
    return [update.num_examples for update in trainers]
