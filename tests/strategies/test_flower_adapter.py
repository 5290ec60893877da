import dataclasses
import gc
import threading

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyClientSideFixedClipping,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedXgbBagging,
    FedYogi,
    Krum,
    MultiKrum,
    QFedAvg,
)
from numpy.testing import assert_allclose, assert_array_equal

from fleet.errors import ConfigError, UpdateError
from fleet.state import TrainableState
from strategies.aggregation import MEAN
from strategies.algorithm import compose
from strategies.flower_adapter import flower_algorithm
from strategies.server_opt import adam, sgd

CLASSES = {
    "FedAvg": lambda: FedAvg(),
    "FedAvgM": lambda: FedAvgM(server_learning_rate=0.5, server_momentum=0.9),
    "FedAdagrad": lambda: FedAdagrad(eta=0.01),
    "FedAdam": lambda: FedAdam(eta=0.01),
    "FedYogi": lambda: FedYogi(eta=0.01),
    "FedMedian": lambda: FedMedian(),
    "FedTrimmedAvg": lambda: FedTrimmedAvg(beta=0.2),
    "Krum": lambda: Krum(num_malicious_nodes=1),
    "MultiKrum": lambda: MultiKrum(num_malicious_nodes=1, num_nodes_to_select=4),
    "Bulyan": lambda: Bulyan(num_malicious_nodes=1),
    "QFedAvg": lambda: QFedAvg(client_learning_rate=0.1),
}


@pytest.fixture(autouse=True)
def flowers_surroundings(task_identity, monkeypatch):
    """Messages are made outside a run, and garbage is not collected for every reply.

    Some of Flower's classes ask for that, and in a session of tests it takes 0.1 s each.
    """
    monkeypatch.setattr(gc, "collect", lambda *_: 0)


@pytest.fixture
def initial(toy_plan):
    rng = np.random.default_rng(99)
    arrays = {s.name: 2 + rng.random(s.shape, dtype=np.float32) for s in toy_plan.specs}
    return TrainableState(toy_plan, arrays)


@pytest.fixture
def cohort(toy_plan, random_update):
    """Function (rng, clients) → their updates, of the whole plan, in order of their names."""

    def build(rng, clients=7, plan=toy_plan):
        updates = (random_update(f"pi-{i}", plan, rng) for i in range(clients))
        return [
            dataclasses.replace(u, statistics={n: a + 2 for n, a in u.statistics.items()})
            for u in updates
        ]

    return build


def small(updates):
    """The same with deltas a hundredth as large."""
    scale = np.float32(0.01)
    return [
        dataclasses.replace(u, delta={n: scale * d for n, d in u.delta.items()}) for u in updates
    ]


def trained_by(update, tensors):
    """What Flower's own client would send: every tensor as it is after training."""
    everything = dict(update.statistics) | {n: tensors[n] + d for n, d in update.delta.items()}
    return {name: everything[name] for name in tensors}


def run_ours(strategy, initial, rounds):
    algorithm = flower_algorithm(strategy)
    state, memory = initial, algorithm.init(initial)
    for updates in rounds:
        step = algorithm.step(updates, state, memory)
        state, memory = step.state, step.memory
        yield step


@pytest.fixture
def own_way(flower_round):
    """Function (strategy, initial, rounds) → the tensors after each, without the adapter.

    They are float32 between rounds, as the fleet's model is.
    """

    def run(strategy, initial, rounds):
        tensors = {spec.name: initial.tensors[spec.name] for spec in initial.plan.specs}
        for number, updates in enumerate(rounds, 1):
            trained = [trained_by(update, tensors) for update in updates]
            counts, losses = [u.num_examples for u in updates], [u.loss for u in updates]
            arrays = flower_round(strategy, number, tensors, trained, counts, losses)
            tensors = {name: np.asarray(a, np.float32) for name, a in arrays.items()}
            yield tensors

    return run


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("seed", range(3))
def test_a_flower_class_gives_bit_for_bit_what_it_gives_without_us(
    initial, cohort, own_way, name, seed
):
    rng = np.random.default_rng(seed)
    rounds = [small(cohort(rng)) for _ in range(4)]
    steps = run_ours(CLASSES[name](), initial, rounds)
    for step, expected in zip(steps, own_way(CLASSES[name](), initial, rounds), strict=True):
        for tensor, array in step.state.tensors.items():
            assert_array_equal(array, expected[tensor], strict=True)
        assert set(step.coverage.values()) == {7}


def test_sampling_and_minimum_numbers_are_the_runs_own(initial, cohort):
    updates = cohort(np.random.default_rng(0))
    (all_of_them,) = run_ours(FedAvg(), initial, [updates])
    (part,) = run_ours(FedAvg(fraction_train=0.3, min_train_nodes=1), initial, [updates])
    (none,) = run_ours(FedAvg(fraction_train=0), initial, [updates])
    for name, array in all_of_them.state.tensors.items():
        assert_array_equal(part.state.tensors[name], array)
        assert_array_equal(none.state.tensors[name], array)


def test_a_cohort_below_the_strategys_minimum_is_not_waited_for(initial, cohort):
    (alone,) = cohort(np.random.default_rng(0), clients=1)
    (step,) = run_ours(FedAvg(min_train_nodes=2), initial, [[alone]])
    for name, array in trained_by(alone, initial.tensors).items():
        assert_array_equal(step.state.tensors[name], array)


@pytest.mark.parametrize(
    ("flowers", "own"),
    [(FedAvgM(server_momentum=0.9), sgd(1.0, 0.9)), (FedAdam(eta=0.01), adam(0.01))],
    ids=["m", "adam"],
)
def test_parameters_go_where_our_own_optimiser_takes_them(initial, cohort, flowers, own):
    rng = np.random.default_rng(5)
    rounds = [small(cohort(rng)) for _ in range(3)]
    ours = compose(MEAN, own)
    state, memory = initial, ours.init(initial)
    for updates, step in zip(rounds, run_ours(flowers, initial, rounds), strict=True):
        own_step = ours.step(updates, state, memory)
        state, memory = own_step.state, own_step.memory
        for spec in initial.plan.specs:
            if not spec.is_statistic:
                theirs = step.state.tensors[spec.name]
                assert_allclose(theirs, state.tensors[spec.name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CLASSES)
def test_step_is_pure(initial, cohort, name):
    rng = np.random.default_rng(1)
    rounds = [small(cohort(rng)) for _ in range(3)]
    algorithm = flower_algorithm(CLASSES[name]())
    memory = algorithm.init(initial)
    memory = algorithm.step(rounds[0], initial, memory).memory
    once = algorithm.step(rounds[1], initial, memory)
    algorithm.step(rounds[2], once.state, once.memory)
    again = algorithm.step(rounds[1], initial, memory)
    for tensor, array in once.state.tensors.items():
        assert_array_equal(again.state.tensors[tensor], array)


def test_a_strategy_that_is_used_in_two_runs_starts_afresh(initial, cohort):
    strategy = FedAvgM(server_momentum=0.9)
    rounds = [cohort(np.random.default_rng(2))] * 2
    first, second = (list(run_ours(strategy, initial, rounds))[-1] for _ in range(2))
    for name, array in first.state.tensors.items():
        assert_array_equal(second.state.tensors[name], array)
    assert strategy.momentum_vector is None and strategy.current_arrays is None


class Watching(FedAvg):
    """Keeps what it was shown."""

    def configure_train(self, server_round, arrays, config, grid):
        self.nodes = list(grid.get_node_ids())
        self.arrays = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        self.replies, self.server_round = list(replies), server_round
        return super().aggregate_train(server_round, self.replies)


def test_what_a_strategy_is_shown(initial, cohort):
    updates = cohort(np.random.default_rng(3), clients=4)
    first, second = run_ours(Watching(), initial, [updates[1:], updates])
    shown, later = first.memory.strategy, second.memory.strategy
    order = [spec.name for spec in initial.plan.specs]
    assert list(shown.arrays) == order and shown.server_round == 1 and later.server_round == 2
    for name, array in shown.arrays.items():
        assert_array_equal(array.numpy(), initial.tensors[name], strict=True)
    for update, reply in zip(updates[1:], shown.replies, strict=True):
        (arrays,) = reply.content.array_records.values()
        assert list(arrays) == order
        for name, array in trained_by(update, initial.tensors).items():
            assert_array_equal(arrays[name].numpy(), array, strict=True)
        (metrics,) = reply.content.metric_records.values()
        assert dict(metrics) == {"num-examples": update.num_examples, "train_loss": update.loss}
    # A client keeps its node id, whoever else takes part.
    nodes, later_nodes = ([r.metadata.src_node_id for r in w.replies] for w in (shown, later))
    assert later_nodes[1:] == nodes and len(set(later_nodes)) == 4
    assert shown.nodes == nodes and later.nodes == later_nodes


def test_too_few_replies_for_bulyan_leave_the_model(initial, cohort):
    (step,) = run_ours(Bulyan(num_malicious_nodes=2), initial, [cohort(np.random.default_rng(0))])
    assert step.state is initial


def test_unequal_plans_are_refused_with_both_plans_and_the_way_out(initial, cohort, toy_plan):
    rng = np.random.default_rng(0)
    updates = [*cohort(rng, 2), *cohort(rng, 3, toy_plan.narrow(3))[2:]]
    algorithm = flower_algorithm(FedMedian())
    text = (
        rf"pi-2 trained plan {toy_plan.narrow(3).digest[:8]} \(3 blocks\), the server's is "
        rf"{toy_plan.digest[:8]} \(5 blocks\), and FedMedian needs equal plans; set blocks to "
        rf"one value and budget-mib to off"
    )
    with pytest.raises(UpdateError, match=text):
        algorithm.step(updates, initial, algorithm.init(initial))


class Wishing(FedAvg):
    """Says no, in one of the ways that Flower's classes do."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def aggregate_train(self, server_round, replies):
        raise self.error


def trimmed_too_much():
    strategy = FedTrimmedAvg()
    strategy.beta = 0.6
    return strategy


class OtherShape(FedAvg):
    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        arrays["head.weight"] = Array(np.zeros((4, 2), np.float32))
        return arrays, metrics


class Diverging(FedAvg):
    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        arrays["head.weight"] = Array(np.full((2, 4), 1e39))  # more than a float32 holds
        return arrays, metrics


class Forgetful(FedAvg):
    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        del arrays["head.weight"]
        return arrays, metrics


@pytest.mark.parametrize(
    ("strategy", "text"),
    [
        (trimmed_too_much(), r"FedTrimmedAvg stopped at its round 1: .*beta=0.6 is too large"),
        (FedAvg(weighted_by_key="weight"), "FedAvg stopped at .* Missing required key `weight`"),
        (
            QFedAvg(client_learning_rate=0.1, train_loss_key="loss"),
            "QFedAvg stopped at its round 1: .*expected a float value for the key 'loss'",
        ),
        (Wishing(RuntimeError("too hot")), "Wishing stopped at its round 1: too hot"),
        (Wishing(ValueError("too cold")), "Wishing stopped at its round 1: too cold"),
        (
            Forgetful(),
            "Forgetful returned 20 tensors for the plan's 21, and head.weight is in one of them "
            "only; it must return every tensor that it was shown",
        ),
        (
            OtherShape(),
            r"OtherShape returned head.weight of shape \(4, 2\), the plan's is \(2, 4\); it must",
        ),
        (Diverging(), "Diverging made head.weight infinite or NaN; lower its learning rate"),
        (
            FedAdam(eta=10.0),
            r"FedAdam made the variance blocks.*running_var negative \(-.*\), as it steps "
            r"statistics like weights; lower its learning rate, or take the fleet's own strategy",
        ),
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_a_strategy_dislikes_or_spoils_is_an_update_error(initial, cohort, strategy, text):
    updates = cohort(np.random.default_rng(0))
    updates = [
        dataclasses.replace(u, statistics={n: a - 1.5 for n, a in u.statistics.items()})
        for u in updates
    ]
    algorithm = flower_algorithm(strategy)
    memory = algorithm.init(initial)
    with pytest.raises(UpdateError, match=text):
        algorithm.step(updates, initial, memory)


class Locked(FedAvg):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


class Talkative(FedAvg):
    def configure_train(self, server_round, arrays, config, grid):
        grid.send_and_receive([])


class Halving(FedAvg):
    def configure_train(self, server_round, arrays, config, grid):
        half = {name: Array(array.numpy() / 2) for name, array in arrays.items()}
        return super().configure_train(server_round, ArrayRecord(half), config, grid)


@pytest.mark.parametrize(
    ("strategy", "text"),
    [
        (
            FedProx(proximal_mu=0.1),
            "FedProx tells its clients proximal-mu, and the fleet's read only server-round; take "
            "a strategy that works on the server alone .*fedavg with objective fedprox",
        ),
        (
            DifferentialPrivacyClientSideFixedClipping(FedAvg(), 1.0, 1.0, 2),
            "DifferentialPrivacyClientSideFixedClipping tells its clients clipping_norm",
        ),
        (Halving(), "Halving sends its clients other tensors than the model's"),
        (Talkative(), "wants to send messages of its own .* write an Algorithm instead"),
        (Locked(), "Locked cannot be copied .*lock.* keep files, locks and connections out of it"),
    ],
)
def test_what_needs_other_clients_is_refused_before_anybody_trains(initial, strategy, text):
    with pytest.raises(ConfigError, match=text):
        flower_algorithm(strategy).init(initial)


def test_boosted_trees_are_refused_before_anybody_trains(initial):
    with pytest.raises(UpdateError, match="FedXgbBagging stopped at its round 1: "):
        flower_algorithm(FedXgbBagging()).init(initial)
