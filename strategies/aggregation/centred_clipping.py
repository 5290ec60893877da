"""Centred clipping: clients' momenta, clipped around what the rule came to before."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fleet.errors import ConfigError
from fleet.state import ClientUpdate
from strategies.aggregation.by_group import Group, clip_factors, groups_of, lower_median
from strategies.aggregation.coordinatewise import median_statistics
from strategies.aggregation.copies import in_order
from strategies.aggregation.protocol import Aggregate, Rule, RuleState
from strategies.aggregation.statistics import combine_statistics

Momenta = dict[str, dict[str, np.ndarray]]  # client → tensor → float64


def centred_clipping(
    radius: float | None = None, *, momentum: float = 0.9, iterations: int = 1
) -> Rule:
    """What the clients' momenta say beyond the last aggregate, each heard up to a radius.

    m ← momentum·m + (1 − momentum)·x for every client's update x, from m = x in the first;
    then v ← v + Σ (m − v)·min(1, radius/‖m − v‖) / n, from the last round's v, at first 0.
    The aggregate is v. One voice a client. The momenta keep hostile clients from adding up
    small pushes over rounds behind the honest ones' noise.

    A client's momentum of a tensor moves when it trains that tensor, v where somebody does.
    Lengths are those over each set of tensors that the same clients trained, see
    `by_group`. Without a radius it is the (lower) median of ‖m − v‖ there: the papers' fixed
    one has to fit the scale of the updates, which differs with learning rate and round.
    The statistics are the clients' medians.

    Args:
        radius: τ, the most that one client moves v by, times n; None takes the median.
        momentum: β of the clients' momenta, at least 0 and below 1.
        iterations: how often v is moved towards the momenta in a round.

    Raises:
        ConfigError: if a value is out of range.

    State: `centre`, tensor → v; `momenta`, client → tensor → m, of clients seen. That is as
    much memory as all clients' updates at once take in float64.

    Source: Karimireddy et al., arXiv:2012.10333, algorithm 2.
    """
    if radius is not None and not 0 < radius < math.inf:
        raise ConfigError(f"centred_clipping's radius must be above 0 and finite, got {radius}")
    if not 0 <= momentum < 1:
        raise ConfigError(
            f"centred_clipping's momentum must be at least 0 and below 1, got {momentum}"
        )
    if iterations < 1:
        raise ConfigError(f"centred_clipping needs at least 1 iteration, got {iterations}")

    def aggregate(updates: Sequence[ClientUpdate], state: RuleState) -> tuple[Aggregate, RuleState]:
        ordered = in_order(updates)
        momenta = {client: dict(tensors) for client, tensors in state["momenta"].items()}
        delta, coverage = {}, {}
        for group in groups_of(ordered):
            _advance(momenta, group, momentum)
            centre = _start(state["centre"], momenta, group)
            for _ in range(iterations):
                centre = _move(centre, momenta, group, radius)
            delta |= centre
            coverage |= dict.fromkeys(group.names, len(group.trainers))
        statistics, counted = combine_statistics(ordered, median_statistics)
        state = {"centre": {**state["centre"], **delta}, "momenta": momenta}
        return Aggregate(delta, statistics, coverage | counted), state

    return Rule(lambda: {"centre": {}, "momenta": {}}, aggregate)


def _advance(momenta: Momenta, group: Group, momentum: float) -> None:
    """Put the momenta after this round in the place of those before it."""
    for name in group.names:
        for update, copy in zip(group.trainers, group.copies(name), strict=True):
            own = momenta.setdefault(update.client, {})
            moved = copy.astype(np.float64)  # a new array: the old one is the caller's
            if name in own:
                moved *= 1 - momentum
                moved += momentum * own[name]
            own[name] = moved


def _start(last: Mapping[str, Any], momenta: Momenta, group: Group) -> dict[str, np.ndarray]:
    """The last round's centre of the group's tensors, 0 where there was none."""
    first = momenta[group.trainers[0].client]
    return {
        name: last[name] if name in last else np.zeros(first[name].shape) for name in group.names
    }


def _move(
    centre: dict[str, np.ndarray], momenta: Momenta, group: Group, radius: float | None
) -> dict[str, np.ndarray]:
    """The centre after one step towards the clients' momenta."""
    of_trainers = [momenta[update.client] for update in group.trainers]
    squares = np.zeros(len(of_trainers))
    for i, own in enumerate(of_trainers):
        for name in group.names:
            apart = (own[name] - centre[name]).reshape(-1)
            squares[i] += apart @ apart
    lengths = np.sqrt(squares)
    shares = clip_factors(lengths, lower_median(lengths) if radius is None else radius)
    shares /= len(of_trainers)
    moved = {}
    for name in group.names:
        moved[name] = centre[name].copy()
        for own, share in zip(of_trainers, shares, strict=True):
            moved[name] += share * (own[name] - centre[name])
    return moved
