"""What strategies remember, through a checkpoint and back: the next rounds are the same bits."""

import gc

import numpy as np
import pytest
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    FedAvgM,
)
from numpy.testing import assert_array_equal

from fleet.checkpoint import Checkpoints
from fleet.errors import CheckpointError
from fleet.state import TrainableState
from strategies.aggregation import rule
from strategies.aggregation.rules import RULES
from strategies.algorithm import compose
from strategies.flower_adapter import flower_algorithm
from strategies.server_opt import SERVER_OPTIMIZERS, server_optimizer
from tests.strategies.test_flower_adapter import CLASSES

SPECS = [*(name for name in RULES if name not in ("krum", "multi_krum")), "krum:1", "multi_krum:1"]
SPECS += ["clipped_mean+coverage"]


@pytest.fixture
def initial(toy_plan):
    rng = np.random.default_rng(99)
    arrays = {s.name: 2 + rng.random(s.shape, dtype=np.float32) for s in toy_plan.specs}
    return TrainableState(toy_plan, arrays)


@pytest.fixture
def rounds(toy_plan, random_update):
    """Four cohorts; the second and the third have other members."""
    rng = np.random.default_rng(0)
    members = (range(7), range(1, 8), range(7), range(8))
    return [[random_update(f"pi-{i}", toy_plan, rng) for i in each] for each in members]


def assert_goes_on(make, initial, rounds, folder):
    """Two rounds, a checkpoint, and two more end as four in a row."""
    states = []
    for interrupted in (False, True):
        algorithm = make()
        state, memory = initial, algorithm.init(initial)
        for n, updates in enumerate(rounds):
            if interrupted and n == 2:
                checkpoints = Checkpoints(folder)
                checkpoints.save(n, algorithm.save(memory))
                algorithm = make()
                algorithm.init(initial)
                memory = algorithm.restore(checkpoints.load()[1], initial)
            step = algorithm.step(updates, state, memory)
            state, memory = step.state, step.memory
        states.append(state)
    for name, array in states[0].tensors.items():
        assert (array != initial.tensors[name]).any()
        assert_array_equal(states[1].tensors[name], array)


@pytest.mark.parametrize("spec", SPECS)
def test_every_rule_goes_on(initial, rounds, tmp_path, spec):
    def make():
        chosen = server_optimizer("fedadam", learning_rate=0.01, momentum=0.9)
        return compose(rule(spec, quorum=2, seed=3), chosen)

    assert_goes_on(make, initial, rounds, tmp_path)


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_every_optimiser_goes_on(initial, rounds, tmp_path, name):
    def make():
        return compose(rule("mean"), server_optimizer(name, momentum=0.9, clients=8))

    assert_goes_on(make, initial, rounds, tmp_path)


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_of_flowers_goes_on(
    initial, rounds, tmp_path, task_identity, monkeypatch, name
):
    monkeypatch.setattr(gc, "collect", lambda *_: 0)  # some ask for it at every reply
    small = [[_scaled(update, np.float32(0.01)) for update in updates] for updates in rounds]
    assert_goes_on(lambda: flower_algorithm(CLASSES[name]()), initial, small, tmp_path)


def test_a_wrapper_keeps_what_the_strategy_in_it_remembers(
    initial, rounds, tmp_path, task_identity
):
    wrapped = DifferentialPrivacyServerSideFixedClipping(
        FedAvgM(server_learning_rate=0.5, server_momentum=0.9), 1e-9, 1e9, 8
    )
    algorithm = flower_algorithm(wrapped)
    step = algorithm.step(rounds[0][:7], initial, algorithm.init(initial))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, algorithm.save(step.memory))
    memory = algorithm.restore(checkpoints.load()[1], initial)
    ours, theirs = memory.strategy.strategy, step.memory.strategy.strategy
    assert ours is not wrapped.strategy
    for one, other in zip(ours.momentum_vector, theirs.momentum_vector, strict=True):
        assert one.any()
        assert_array_equal(one, other)
    assert (memory.rounds, memory.nodes) == (step.memory.rounds, step.memory.nodes)


def test_what_a_class_of_flowers_kind_keeps_and_none_can_is_named(initial, task_identity):
    class Odd(FedAvg):
        def aggregate_train(self, server_round, replies):
            self.seen = {1, 2}
            return super().aggregate_train(server_round, replies)

    algorithm = flower_algorithm(Odd())
    memory = algorithm.init(initial)
    algorithm.save(memory)  # functions that it was made with need not be kept
    memory.strategy.seen = {1, 2}
    with pytest.raises(CheckpointError, match="seen of Odd: / is a set, which a checkpoint cannot"):
        algorithm.save(memory)


def _scaled(update, factor):
    return type(update)(
        **vars(update)
        | {
            "delta": {name: factor * array for name, array in update.delta.items()},
            "statistics": {name: array + 2 for name, array in update.statistics.items()},
        }
    )
