"""What a strategy is: two functions that turn a round's updates into the next model.

A strategy of one's own is an `Algorithm`, or one of Flower's classes
(`strategies.flower_adapter`); those built in are a rule that makes one update
of many (`strategies.aggregation`) and an optimiser that steps the model by it
(`strategies.server_opt`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fleet.config import FederationConfig, default_settings
from fleet.errors import ConfigError, FleetError
from fleet.state import ClientUpdate, TrainableState
from strategies.aggregation import Rule, check_cohort, rule
from strategies.named import import_named
from strategies.server_opt import ServerOptimizer, server_optimizer


@dataclass(frozen=True)
class Step:
    """What a round came to.

    Attributes:
        state: the model's tensors after the round.
        memory: what the algorithm wants back in the next round.
        coverage: tensor → how many clients trained it.
        left_out: client → why its update counted for nothing.
    """

    state: TrainableState
    memory: Any
    coverage: Mapping[str, int]
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Algorithm:
    """How a round's updates move the model, as two pure functions.

    Attributes:
        init: state before the first round → memory.
        step: (updates, state, memory) → `Step`. Updates are admitted ones, at
            most one per client, at least one, in order of the clients' names;
            of unequal plans, so each carries the tensors that its client
            trained. `delta` is float32, trained minus received; `statistics`
            are running means and variances as they are.
        equal_plans: whether all clients must train the same tensors.
        save: memory → plain values and NumPy arrays (`fleet.tree`), from which the run
            can be resumed. A memory that is made of these needs neither this nor `restore`.
        restore: (what `save` made, state before the first round) → memory.
    """

    init: Callable[[TrainableState], Any]
    step: Callable[[Sequence[ClientUpdate], TrainableState, Any], Step]
    equal_plans: bool = False
    save: Callable[[Any], Any] = lambda memory: memory
    restore: Callable[[Any, TrainableState], Any] = lambda saved, initial: saved


def compose(combine: Rule, optimizer: ServerOptimizer) -> Algorithm:
    """Aggregate with a rule, step the parameters with an optimiser.

    Statistics are what the rule makes of them; they never go through the
    optimiser.
    """

    def init(state: TrainableState) -> Any:
        return combine.init(), optimizer.init(parameters_of(state))

    def step(updates: Sequence[ClientUpdate], state: TrainableState, memory: Any) -> Step:
        of_rule, of_optimizer = memory
        left_out = dict(combine.screen(updates, state))
        updates = [update for update in updates if update.client not in left_out]
        aggregate, of_rule = combine.aggregate(updates, of_rule)
        parameters, of_optimizer = optimizer.update(
            aggregate.delta, of_optimizer, parameters_of(state), aggregate.coverage
        )
        statistics = {n: np.asarray(a, np.float32) for n, a in aggregate.statistics.items()}
        tensors = {**state.tensors, **parameters, **statistics}
        stepped = TrainableState(state.plan, tensors)
        memory = of_rule, of_optimizer
        return Step(stepped, memory, dict(aggregate.coverage), left_out | aggregate.left_out)

    return Algorithm(init, step)


def parameters_of(state: TrainableState) -> dict[str, np.ndarray]:
    """What a server optimiser steps: all but the statistics."""
    by_name = state.plan.by_name
    return {name: a for name, a in state.tensors.items() if not by_name[name].is_statistic}


def algorithm(config: FederationConfig, seed: int, clients: int = 1) -> Algorithm:
    """The algorithm of a run's settings.

    Args:
        seed: of rules that draw lots.
        clients: of the whole fleet; FedDyn needs it.

    Raises:
        ConfigError: for an unknown strategy or rule, a value out of range, or a
            setting that a strategy of the user's own would not see.
    """
    if ":" in config.strategy:
        _check_unused(config)
        return own_algorithm(config.strategy)
    limits = {"sampled": config.sampled, "goal": config.goal}
    check_cohort(config.rule, {setting: most for setting, most in limits.items() if most})
    optimizer = server_optimizer(
        config.strategy,
        learning_rate=config.server_learning_rate,
        momentum=config.server_momentum,
        clients=clients,
    )
    return compose(rule(config.rule, quorum=config.quorum, seed=seed), optimizer)


def own_algorithm(where: str) -> Algorithm:
    """An algorithm of the user's own: `package.module:name`.

    Args:
        where: names an `Algorithm`, a strategy of `flwr.serverapp.strategy`'s kind, or
            a class or function without required arguments that makes either.

    Raises:
        ConfigError: if it cannot be imported or made, or is none.
    """
    # Here, not above: the adapter makes an `Algorithm`.
    from flwr.serverapp.strategy import Strategy

    from strategies.flower_adapter import flower_algorithm

    found = import_named(where)
    if not isinstance(found, Algorithm | Strategy) and callable(found):
        found = _made(where, found)
    if isinstance(found, Strategy):
        return flower_algorithm(found)
    if not isinstance(found, Algorithm):
        raise ConfigError(
            f"strategy {where} is a {type(found).__name__}, not a strategies.algorithm.Algorithm "
            f"nor a flwr.serverapp.strategy.Strategy, nor a function that makes one"
        )
    return found


def _made(where: str, maker: Callable[[], Any]) -> Any:
    try:
        return maker()
    except FleetError:
        raise
    except Exception as error:  # whatever the user's function does
        raise ConfigError(
            f"strategy {where} cannot be made ({type(error).__name__}: {error}); if it needs "
            f"arguments, name a function without any that returns it"
        ) from error


def _check_unused(config: FederationConfig) -> None:
    """Settings of the built-in strategies are not passed over in silence."""
    defaults = default_settings()
    for key in ("rule", "quorum", "server-learning-rate", "server-momentum"):
        value = getattr(config, key.replace("-", "_"))
        if value != defaults[key]:
            raise ConfigError(
                f"{key} is {value}, which strategy {config.strategy} would not see; leave it at "
                f"{defaults[key]}, and settle it in the strategy"
            )
