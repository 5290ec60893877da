"""Flower's own strategy classes, unmodified, as algorithms behind our gate and codecs."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.app.exception import AppExitException
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fleet.errors import CheckpointError, ConfigError, UpdateError
from fleet.plan import UpdatePlan
from fleet.state import Arrays, ClientUpdate, TrainableState
from fleet.tree import flatten
from strategies.algorithm import Algorithm, Step

_READ_BY_CLIENTS = {"server-round"}  # of what a strategy may tell them; ours know the round
_DISLIKES = (AppExitException, RuntimeError, ValueError)  # by which Flower's strategies end a run
_FIRST_NODE_ID = 2  # 1 is the server's


def flower_algorithm(strategy: Strategy) -> Algorithm:
    """A strategy of `flwr.serverapp.strategy`, or of its kind, as an `Algorithm`.

    Every round it is shown a `configure_train` with the whole state, then an
    `aggregate_train` with a reply for each admitted update, in order of the
    clients' names; the arrays that it returns, as float32, are the next state.
    If it returns none, as Bulyan does of too few replies, the state stays.

    - A reply holds all tensors of the plan, statistics too, in the plan's order,
      and the metrics `num-examples` and `train_loss` (mean over the local epochs).
    - A tensor in it is the server's own plus the client's delta, in float32. What
      the client has is the version that it was sent plus delta, which differs by
      the rounding of a lossy codec-down. A client's step is from where it began,
      so the server's own is right here: it keeps that rounding out of the model.
    - Sampling, evaluation and minimum numbers of clients are the run's settings;
      the strategy's own are without effect.
    - Its rounds count those that moved the model, from 1.
    - All replies are in memory at once, as in Flower.

    `strategy` itself stays as it is: what it comes to remember is in a copy, so
    that `step` is pure, unless it draws random numbers as the DP wrappers do.

    `init` raises ConfigError if the strategy cannot be copied, or tells clients
    what ours do not read. `step` does too, and raises UpdateError for unequal
    plans, in Flower's words for what the strategy dislikes, and if arrays come
    back that are no state.
    """
    name = type(strategy).__name__

    def init(state: TrainableState) -> _Memory:
        # Of a copy that is thrown away: what is wrong is told before anybody trains.
        _configure(_copied(strategy), 1, _record(state.plan, state.tensors), _Cohort([2, 3]))
        return _Memory(_copied(strategy), 0, {})

    def step(updates: Sequence[ClientUpdate], state: TrainableState, memory: _Memory) -> Step:
        _check_plans(updates, state.plan, name)
        own, server_round = _copied(memory.strategy), memory.rounds + 1
        nodes = dict(memory.nodes)
        for update in updates:
            nodes.setdefault(update.client, _FIRST_NODE_ID + len(nodes))
        cohort = [nodes[update.client] for update in updates]
        _configure(own, server_round, _record(state.plan, state.tensors), _Cohort(cohort))
        replies = [_reply(update, state, nodes[update.client]) for update in updates]
        try:
            arrays, _ = own.aggregate_train(server_round, replies)
        except _DISLIKES as error:
            raise UpdateError(f"{name} stopped at its round {server_round}: {error}") from error
        stepped = _state(arrays, state.plan, name) if arrays else state
        coverage = dict.fromkeys(state.tensors, len(updates))
        return Step(stepped, _Memory(own, server_round, nodes), coverage)

    def save(memory: _Memory) -> Any:
        return _saved(memory.strategy, strategy), memory.rounds, dict(memory.nodes)

    def restore(saved: Any, initial: TrainableState) -> _Memory:
        attributes, rounds, nodes = saved
        own = _copied(strategy)
        _restore(own, attributes)
        return _Memory(own, rounds, nodes)

    return Algorithm(init, step, equal_plans=True, save=save, restore=restore)


@dataclass(frozen=True)
class _Memory:
    """What is left of the rounds so far.

    Attributes:
        strategy: with what it remembers; never changed, only copied.
        rounds: how many it has aggregated.
        nodes: client → the node id under which the strategy knows it.
    """

    strategy: Strategy
    rounds: int
    nodes: Mapping[str, int]


class _Cohort(Grid):
    """The nodes of a cohort, to be seen by a strategy and not to be spoken to.

    FedAvg looks twice, and then again every second until there are as many
    nodes as it wants at least. Those that matter have answered by now, so from
    the third look on there are twice as many as at the last.
    """

    def __init__(self, nodes: Sequence[int]) -> None:
        self._nodes = list(nodes)
        self._looks = 0

    def get_node_ids(self) -> Iterable[int]:
        self._looks += 1
        if self._looks > 2:
            beyond = max(self._nodes) + 1
            self._nodes += range(beyond, beyond + len(self._nodes))
        return list(self._nodes)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise ConfigError(
            "a Flower strategy wants to send messages of its own in configure_train; only its "
            "aggregate_train is used here, write an Algorithm instead (README, A strategy of your "
            "own)"
        )

    set_run = create_message = push_messages = pull_messages = send_and_receive = _refuse
    run = property(_refuse)


def _configure(strategy: Strategy, server_round: int, arrays: ArrayRecord, grid: Grid) -> None:
    """Let the strategy see the round begin; what it would send must be what ours are sent.

    Raises:
        ConfigError: if it is more.
    """
    name = type(strategy).__name__
    try:
        messages = list(strategy.configure_train(server_round, arrays, ConfigRecord(), grid))
    except _DISLIKES as error:
        raise UpdateError(f"{name} stopped at its round {server_round}: {error}") from error
    for content in (message.content for message in messages):
        told = {key for config in content.config_records.values() for key in config}
        if unread := sorted(told - _READ_BY_CLIENTS):
            raise ConfigError(
                f"{name} tells its clients {', '.join(unread)}, and the fleet's read only "
                f"{', '.join(_READ_BY_CLIENTS)}; take a strategy that works on the server alone "
                f"(for FedProx, fedavg with objective fedprox)"
            )
        if any(sent is not arrays and sent != arrays for sent in content.array_records.values()):
            raise ConfigError(
                f"{name} sends its clients other tensors than the model's, and the fleet's "
                f"always begin from the model; take a strategy that works on the server alone"
            )


def _reply(update: ClientUpdate, state: TrainableState, node: int) -> Message:
    """An update as Flower's strategies expect a client's reply."""
    trained = dict(update.statistics)
    for name, delta in update.delta.items():
        trained[name] = state.tensors[name] + delta
    metrics = {"num-examples": update.num_examples, "train_loss": float(update.loss)}
    content = RecordDict({"arrays": _record(state.plan, trained), "metrics": MetricRecord(metrics)})
    return Message(content, reply_to=Message(RecordDict(), node, MessageType.TRAIN))


def _record(plan: UpdatePlan, tensors: Arrays) -> ArrayRecord:
    """Tensors in the plan's order: some of Flower's strategies pair them by position."""
    return ArrayRecord(
        {name: Array(np.asarray(tensors[name], np.float32)) for name in plan.by_name}
    )


def _state(arrays: ArrayRecord, plan: UpdatePlan, name: str) -> TrainableState:
    """What a strategy returned as a state.

    Raises:
        UpdateError: if tensors, shapes or values are none of a state.
    """
    if arrays.keys() != plan.by_name.keys():
        odd = min(arrays.keys() ^ plan.by_name.keys())
        raise UpdateError(
            f"{name} returned {len(arrays)} tensors for the plan's {len(plan.by_name)}, and {odd} "
            f"is in one of them only; it must return every tensor that it was shown"
        )
    tensors = {}
    for spec in plan.specs:
        with np.errstate(over="ignore"):  # it is told below
            array = np.asarray(arrays[spec.name].numpy(), dtype=np.float32)
        if array.shape != spec.shape:
            raise UpdateError(
                f"{name} returned {spec.name} of shape {array.shape}, the plan's is {spec.shape}; "
                f"it must keep shapes"
            )
        if not np.isfinite(array).all():
            raise UpdateError(f"{name} made {spec.name} infinite or NaN; lower its learning rate")
        if spec.role == "var" and array.min(initial=0) < 0:
            raise UpdateError(
                f"{name} made the variance {spec.name} negative ({array.min():.3g}), as it steps "
                f"statistics like weights; lower its learning rate, or take the fleet's own "
                f"strategy, which pools them"
            )
        tensors[spec.name] = array
    return TrainableState(plan, tensors)


def _check_plans(updates: Sequence[ClientUpdate], plan: UpdatePlan, name: str) -> None:
    for update in updates:
        if update.plan.digest != plan.digest:
            raise UpdateError(
                f"{update.client} trained plan {update.plan.digest[:8]} ({update.plan.blocks} "
                f"blocks), the server's is {plan.digest[:8]} ({plan.blocks} blocks), and {name} "
                f"needs equal plans; set blocks to one value and budget-mib to off, also on the "
                f"devices"
            )


def _saved(own: Strategy, made: Strategy) -> dict[str, tuple[str, Any]]:
    """A strategy's attributes, each with how it is kept; functions that it was made with are not.

    Args:
        own: what it has become.
        made: as the run's settings make it.

    Raises:
        CheckpointError: naming an attribute that came to be and cannot be kept.
    """
    attributes: dict[str, tuple[str, Any]] = {}
    for name, value in vars(own).items():
        before = vars(made).get(name)
        if isinstance(value, Strategy) and type(value) is type(before):  # of a wrapper
            attributes[name] = "strategy", _saved(value, before)
        elif type(value) is ArrayRecord:
            arrays = [(key, array.numpy()) for key, array in value.items()]
            attributes[name] = "arrays", arrays
        elif value is not before or not callable(value):
            try:
                flatten(value)
            except CheckpointError as error:
                raise CheckpointError(f"{name} of {type(own).__name__}: {error}") from error
            attributes[name] = "value", value
    return attributes


def _restore(own: Strategy, attributes: Mapping[str, tuple[str, Any]]) -> None:
    for name, (kind, value) in attributes.items():
        if kind == "strategy":
            _restore(getattr(own, name), value)
        elif kind == "arrays":
            setattr(own, name, ArrayRecord({key: Array(array) for key, array in value}))
        else:
            setattr(own, name, value)


def _copied(strategy: Strategy) -> Strategy:
    try:
        return copy.deepcopy(strategy)
    except Exception as error:  # whatever a user's strategy holds
        raise ConfigError(
            f"{type(strategy).__name__} cannot be copied ({error}), and a round works on a copy, "
            f"so that it can be repeated; keep files, locks and connections out of it"
        ) from error
