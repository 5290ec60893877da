"""How many must train a tensor for it to move, and how far those few may move it."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np

from fleet.errors import ConfigError
from fleet.state import Arrays, ClientUpdate
from strategies.aggregation.copies import counts_of, in_order, trainers_of
from strategies.aggregation.protocol import Aggregate, Rule, RuleState


def with_quorum(rule: Rule, quorum: int) -> Rule:
    """The rule over tensors that at least `quorum` clients trained; the others stay.

    The rule never sees what too few trained; the aggregate's `coverage` counts it still.

    Raises:
        ConfigError: if the quorum is not a whole number of at least 1.
    """
    if not isinstance(quorum, int) or quorum < 1:
        raise ConfigError(f"quorum must be a whole number of at least 1, got {quorum}")
    if quorum == 1:
        return rule

    def aggregate(updates: Sequence[ClientUpdate], state: RuleState) -> tuple[Aggregate, RuleState]:
        trainers = trainers_of(in_order(updates), lambda u: (*u.delta, *u.statistics))
        coverage = {name: len(clients) for name, clients in trainers.items()}
        enough = {name for name, count in coverage.items() if count >= quorum}
        result, state = rule.aggregate([_narrow(update, enough) for update in updates], state)
        coverage |= result.coverage  # without those that the rule left out
        delta, statistics = (
            {name: array for name, array in arrays.items() if coverage[name] >= quorum}
            for arrays in (result.delta, result.statistics)
        )
        result = dataclasses.replace(result, delta=delta, statistics=statistics, coverage=coverage)
        return result, state

    return dataclasses.replace(rule, aggregate=aggregate)


def with_coverage_correction(rule: Rule, power: float = 1.0) -> Rule:
    """The rule, with steps of tensors that few train made smaller.

    delta ← delta·share^power, where share is the trainers' part of the cohort's examples.

    **What it corrects.** A tensor's aggregate is over those who trained it. So a deep block
    that one client in ten reaches moves as far as the head, which all train, on a tenth of
    the evidence: towards that client's own data, with its noise, and every round, though
    other clients are sampled the next time and pull elsewhere. With power 1 the step is
    what federated averaging gives if those who did not train the tensor count as voting
    for no change. Power 0.5 scales the step as the noise of a mean over the share grows,
    a middle way; a power near 0 corrects nothing. With equal plans every share is 1.

    Statistics are values, not steps, and stay as the rule combined them.

    Args:
        rule: any.
        power: above 0.

    Raises:
        ConfigError: if the power is not above 0 and finite.
    """
    if not 0 < power < math.inf:
        raise ConfigError(f"coverage's power must be above 0 and finite, got {power}")

    def aggregate(updates: Sequence[ClientUpdate], state: RuleState) -> tuple[Aggregate, RuleState]:
        result, state = rule.aggregate(updates, state)
        trainers, cohort = trainers_of(in_order(updates)), sum(counts_of(updates))
        delta = {
            name: step * (sum(counts_of(trainers[name])) / cohort) ** power
            for name, step in result.delta.items()
        }
        return dataclasses.replace(result, delta=delta), state

    return dataclasses.replace(rule, aggregate=aggregate)


class _Part(Mapping[str, Any]):
    """Some of a mapping's names, each still read when it is asked for."""

    def __init__(self, whole: Arrays, names: Set[str]) -> None:
        self._whole = whole
        self._names = {name: None for name in whole if name in names}  # in the whole's order

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self:
            raise KeyError(name)
        return self._whole[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _narrow(update: ClientUpdate, names: Set[str]) -> ClientUpdate:
    return dataclasses.replace(
        update,
        delta=_Part(update.delta, names),
        statistics=_Part(update.statistics, names),
    )
