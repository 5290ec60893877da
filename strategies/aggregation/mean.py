"""Means weighted by examples: federated averaging, and the same with clipped norms."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from fleet.errors import ConfigError
from fleet.state import ClientUpdate
from strategies.aggregation.agreement import contradicting
from strategies.aggregation.by_group import (
    Group,
    Squares,
    clip_factors,
    combine_by_group,
    groups_of,
    lower_median,
    squared_norms,
)
from strategies.aggregation.by_tensor import combine_by_tensor
from strategies.aggregation.coordinatewise import median_statistics
from strategies.aggregation.copies import average, counts_of, in_order
from strategies.aggregation.protocol import Aggregate, Rule, stateless

# Of `clipped_mean`:
MOST_EXAMPLES = 3.0  # medians of num_examples; what a client states beyond weighs nothing
LONGEST = 5.0  # medians of the norms; a client whose update is longer is left out
LEAST_COSINE = -0.5  # with the sum of the others' updates; a client below is left out
FEWEST = 3  # clients among whom one may be left out


def mean() -> Rule:
    """`weighted_mean` as a rule."""
    return stateless(weighted_mean)


def weighted_mean(updates: Sequence[ClientUpdate]) -> Aggregate:
    """Mean of every tensor over those who trained it, weighted by num_examples.

    With equal plans this is federated averaging. Running statistics are pooled exactly.

    Args:
        updates: at most one per client, in any order: the result is the same bit for bit.

    Raises:
        UpdateError: as `combine_by_tensor`.

    Source: McMahan et al., arXiv:1602.05629, algorithm 1, taken per tensor.
    """
    return combine_by_tensor(updates, average)


MEAN = mean()


def clipped_mean(bound: float | None = None) -> Rule:
    """The weighted mean of deltas that are first shortened to a bound.

    x ← x·min(1, bound/‖x‖). Without a bound it is the cohort's median norm, so a single
    client moves the model no further than a typical one does; whom it points to is not
    looked at. The statistics are the clients' medians.

    **Who is left out.** Clipped or not, an attacker that sends −10 times what it trained
    takes back what an honest client brought. But honest updates do not differ that much in
    length: those above `LONGEST` medians count for nothing this round, and neither do
    their statistics. Of the others, those go that point against what all the rest amount
    to, with a cosine below `LEAST_COSINE`: as inner product manipulation does, which is
    short. The bound is far from 0 because honest updates are nearly at right angles to each
    other where clients' data differ: a bound of 0 leaves out many of them. Clients that
    train on wrong labels are told from honest ones by neither: before all else `contradicting`
    holds what they taught the head against the model.

    **Whose median, under unequal plans.** A client that trains five blocks has a longer
    delta than one that trains one, and is no more suspicious for it. So norms are only
    compared over tensors that the same clients trained, and each such part of a client's
    delta is clipped to the median norm of that part. To clip the whole delta by one
    factor, to what a typical trainer of the same tensors would have, would let a client
    hide: being huge in a part that few train, where it sets the median, would buy it room
    in the parts that all share. With equal plans the two are the same. A bound that is
    given is one on the whole delta, whichever tensors it has. A client is left out for any
    of its parts that at least `FEWEST` clients trained: of two that differ, nobody can say
    which is wrong.

    Weights are num_examples, which a client states itself. So none counts for more than
    `MOST_EXAMPLES` times the (lower) median of its group's: a client that claims ten
    million images weighs what three typical ones do.

    Args:
        bound: most that ‖delta‖ may be; None takes the (lower) median.

    Raises:
        ConfigError: if the bound is not above 0 and finite.

    Source: McMahan et al., arXiv:1710.06963 (flat clipping); Sun et al., arXiv:1911.07963
    (against hostile clients); Andrew et al., arXiv:1905.03871 (the median as a bound).
    """
    if bound is not None and not 0 < bound < math.inf:
        raise ConfigError(f"clipped_mean's bound must be above 0 and finite, got {bound}")

    def aggregate(updates: Sequence[ClientUpdate]) -> Aggregate:
        ordered = in_order(updates)
        squares = squared_norms(ordered)
        whole = {} if bound is None else _factors_of_whole(squares, bound)

        def weigh(group: Group) -> np.ndarray:
            counts = np.asarray(counts_of(group.trainers), dtype=np.float64)
            counts = np.minimum(counts, MOST_EXAMPLES * lower_median(counts))
            if bound is None:
                norms = group.norms(squares)
                factors = clip_factors(norms, lower_median(norms))
            else:
                factors = np.array([whole[update.client] for update in group.trainers])
            return counts * factors / counts.sum()

        left_out = _too_long(groups_of(ordered), squares)
        remaining = [update for update in ordered if update.client not in left_out]
        left_out |= _opposed(remaining, squares, weigh)
        remaining = [update for update in ordered if update.client not in left_out]
        result = combine_by_group(remaining, weigh, median_statistics)
        return dataclasses.replace(result, left_out=left_out)

    return dataclasses.replace(stateless(aggregate), screen=contradicting)


def _too_long(groups: Sequence[Group], squares: Squares) -> dict[str, str]:
    """Clients with a part above `LONGEST` median norms → that, in words.

    Never all of them: the client of the median is no longer than it.
    """
    found = {}
    for group in groups:
        if len(group.trainers) < FEWEST:
            continue
        norms = group.norms(squares)
        typical = lower_median(norms)
        for update, norm in zip(group.trainers, norms, strict=True):
            if norm > LONGEST * typical:
                found[update.client] = (
                    f"update is {norm:.3g} long, the median of those who train the same tensors "
                    f"is {typical:.3g}; above {LONGEST:g} times that clipped_mean leaves it out"
                )
    return found


def _opposed(
    updates: Sequence[ClientUpdate], squares: Squares, weigh: Callable[[Group], np.ndarray]
) -> dict[str, str]:
    """Clients whose cosine with the weighted sum of all others is too low → that, in words.

    The sum of the others, not of all: in a small cohort a client's own part would vouch for
    it. Under unequal plans it is over the tensors that the client trains. Where all oppose
    each other, nobody is found.
    """
    if len(updates) < FEWEST:
        return {}
    products, lengths, others = (dict.fromkeys(squares, 0.0) for _ in range(3))
    for group in groups_of(updates):
        weights, own = weigh(group), group.norms(squares) ** 2
        with_all = group.products_with(weights)
        total = weights @ with_all
        for i, client in enumerate(update.client for update in group.trainers):
            products[client] += with_all[i] - weights[i] * own[i]
            lengths[client] += own[i]
            others[client] += total - 2 * weights[i] * with_all[i] + weights[i] ** 2 * own[i]
    found = {}
    for client in (update.client for update in updates):
        scale = math.sqrt(lengths[client] * max(others[client], 0.0))
        cosine = products[client] / scale if scale else 0.0
        if cosine < LEAST_COSINE:
            found[client] = (
                f"update has a cosine of {cosine:.2f} with what the others amount to; "
                f"below {LEAST_COSINE:g} clipped_mean leaves it out"
            )
    return found if len(found) < len(updates) else {}


def _factors_of_whole(squares: Squares, bound: float) -> dict[str, float]:
    """Client → what its whole delta is multiplied by."""
    norms = np.sqrt([sum(of_client.values()) for of_client in squares.values()])
    return dict(zip(squares, clip_factors(norms, bound), strict=True))
