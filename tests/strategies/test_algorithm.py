import dataclasses
import sys

import numpy as np
import pytest
from flwr.serverapp.strategy import FedMedian
from numpy.testing import assert_allclose, assert_array_equal

from fleet.config import default_settings, read_config
from fleet.errors import ConfigError
from fleet.state import TrainableState
from strategies.aggregation import MEAN, rule
from strategies.algorithm import (
    Algorithm,
    algorithm,
    compose,
    own_algorithm,
    parameters_of,
)
from strategies.named import import_named
from strategies.server_opt import SERVER_OPTIMIZERS, sgd
from tests import reference
from tests.many import many

MODULE = """
from flwr.serverapp.strategy import FedMedian, QFedAvg
from fleet.errors import ConfigError
from strategies.algorithm import Algorithm, Step

keep = Algorithm(lambda state: 0, lambda updates, state, memory: Step(state, memory + 1, {}))
number = 3
median = FedMedian()


def make():
    return keep


def make_flowers():
    return QFedAvg(client_learning_rate=0.1)


def make_nothing():
    return None


def needs(rate):
    return keep


def fails():
    return 1 / 0


def refuses():
    raise ConfigError("rate must be above 0")
"""


@pytest.fixture(autouse=True)
def own_modules(tmp_path, monkeypatch):
    """A user's modules, found as PYTHONPATH has them found."""
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text("")
    (tmp_path / "my_package" / "mine.py").write_text(MODULE)
    (tmp_path / "my_broken.py").write_text("import no_such_thing\n")
    (tmp_path / "my_misspelt.py").write_text("x = = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


@pytest.fixture
def federation():
    """Function of settings → the federation's part of a run's."""
    return lambda **settings: (
        read_config(
            default_settings() | {key.replace("_", "-"): value for key, value in settings.items()}
        ).federation
    )


@pytest.fixture
def initial(toy_plan):
    rng = np.random.default_rng(99)
    arrays = {s.name: rng.random(s.shape, dtype=np.float32) for s in toy_plan.specs}
    return TrainableState(toy_plan, arrays)


def run(chosen, initial, rounds):
    state, memory = initial, chosen.init(initial)
    for updates in rounds:
        step = chosen.step(updates, state, memory)
        state, memory = step.state, step.memory
    return step


def assert_same(state, other):
    assert state.plan == other.plan
    for name, array in state.tensors.items():
        assert_array_equal(array, other.tensors[name], strict=True)


@many("seed", range(5))
def test_compose_steps_parameters_and_leaves_statistics_to_the_rule(initial, unequal, seed):
    updates = unequal(np.random.default_rng(seed), blocks=(1, 3, 0))
    step = run(compose(MEAN, sgd(0.5)), initial, [updates])
    deltas = reference.weighted_mean(updates)
    aggregate, _ = MEAN.aggregate(updates, MEAN.init())
    trained = {name for update in updates for name in update.plan.by_name}
    for spec in initial.plan.specs:
        before, after = initial.tensors[spec.name], step.state.tensors[spec.name]
        assert after.dtype == np.float32
        if spec.name not in trained:
            assert_array_equal(after, before)
        elif spec.is_statistic:
            assert_array_equal(after, aggregate.statistics[spec.name].astype(np.float32))
        else:
            assert_allclose(after, before + 0.5 * deltas[spec.name], rtol=1e-6, atol=1e-6)
    counts = {name: sum(name in u.plan.by_name for u in updates) for name in trained}
    assert step.coverage == counts


def test_compose_hands_rule_and_optimiser_their_own_memories(initial, unequal):
    """Momentum of both, against the two by themselves."""
    combine, optimizer = rule("centred_clipping:1.0"), sgd(1.0, 0.9)
    rounds = [unequal(np.random.default_rng(seed)) for seed in range(3)]
    of_rule, parameters = combine.init(), parameters_of(initial)
    of_optimizer = optimizer.init(parameters)
    for updates in rounds:
        aggregate, of_rule = combine.aggregate(updates, of_rule)
        parameters, of_optimizer = optimizer.update(aggregate.delta, of_optimizer, parameters)
    composed = run(compose(combine, optimizer), initial, rounds).state.tensors
    assert parameters.keys() == {s.name for s in initial.plan.specs if not s.is_statistic}
    for name, array in parameters.items():
        assert_array_equal(composed[name], array, strict=True)


PAIRS = [
    (strategy, rule_name)
    for strategy in SERVER_OPTIMIZERS
    for rule_name in ("mean", "trimmed_mean:0.2", "centred_clipping:1.0")
    if strategy != "feddyn" or rule_name == "mean"
]


@pytest.mark.parametrize(("strategy", "rule_name"), PAIRS)
def test_step_is_pure(initial, unequal, federation, strategy, rule_name):
    objective = "feddyn" if strategy == "feddyn" else "plain"
    config = federation(strategy=strategy, rule=rule_name, objective=objective)
    chosen = algorithm(config, seed=0)
    rounds = [unequal(np.random.default_rng(seed)) for seed in range(3)]
    memory = chosen.step(rounds[0], initial, chosen.init(initial)).memory
    before = {name: array.copy() for name, array in initial.tensors.items()}
    deltas = [{n: d.copy() for n, d in update.delta.items()} for update in rounds[1]]
    once = chosen.step(rounds[1], initial, memory)
    chosen.step(rounds[2], once.state, once.memory)
    again = chosen.step(rounds[1], initial, memory)
    assert_same(once.state, again.state)
    assert once.coverage == again.coverage
    for name, array in before.items():
        assert_array_equal(initial.tensors[name], array)
    for update, delta in zip(rounds[1], deltas, strict=True):
        for name, array in delta.items():
            assert_array_equal(update.delta[name], array)


def test_settings_reach_rule_and_optimiser(initial, unequal, federation):
    updates = unequal(np.random.default_rng(0))
    settings = {
        "rule": "median",
        "quorum": 2,
        "strategy": "fedavgm",
        "server_learning_rate": 0.5,
        "server_momentum": 0.5,
    }
    ours = run(algorithm(federation(**settings), seed=0), initial, [updates] * 2)
    by_hand = compose(rule("median", quorum=2), sgd(0.5, 0.5))
    assert_same(ours.state, run(by_hand, initial, [updates] * 2).state)
    for key in ("rule", "quorum", "strategy", "server_learning_rate", "server_momentum"):
        others = {k: v for k, v in settings.items() if k != key}
        other = run(algorithm(federation(**others), seed=0), initial, [updates] * 2)
        tensors = [step.state.tensors for step in (ours, other)]
        assert any(not np.array_equal(tensors[0][n], tensors[1][n]) for n in tensors[0]), key


def test_feddyn_knows_what_share_of_the_fleet_trained_a_tensor(initial, unequal, federation):
    updates = unequal(np.random.default_rng(0))
    config = federation(strategy="feddyn", objective="feddyn", rule="mean")
    moved = []
    for times in (1, 2):
        step = run(algorithm(config, 0, clients=times * len(updates)), initial, [updates])
        moved.append(step.state.tensors["head.weight"] - initial.tensors["head.weight"])
    assert_allclose(moved[0] / moved[1], 2 / 1.5, rtol=1e-4)


def test_a_rule_of_ones_own_comes_through_its_setting(
    initial, unequal, federation, tmp_path, monkeypatch
):
    (tmp_path / "my_package" / "rules.py").write_text(
        "import numpy as np\n"
        "from strategies.aggregation import combine_by_tensor\n\n\n"
        "def plain(updates):\n"
        "    return combine_by_tensor(updates, lambda copies, counts: np.mean(copies, axis=0))\n"
    )
    updates = unequal(np.random.default_rng(0))
    ours = run(algorithm(federation(rule="my_package.rules:plain"), seed=0), initial, [updates])
    alike = [dataclasses.replace(update, num_examples=1) for update in updates]
    expected = reference.weighted_mean(alike)
    for name, delta in expected.items():
        after = ours.state.tensors[name]
        assert_allclose(after, initial.tensors[name] + delta, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["keep", "make"])
def test_an_algorithm_of_ones_own_or_a_function_that_makes_it(federation, name):
    from my_package.mine import keep

    assert own_algorithm(f"my_package.mine:{name}") is keep
    assert algorithm(federation(strategy=f"my_package.mine:{name}"), seed=0) is keep
    assert not keep.equal_plans


@pytest.mark.parametrize(
    "where",
    [
        "my_package.mine:median",
        "my_package.mine:FedMedian",
        "my_package.mine:make_flowers",
        "flwr.serverapp.strategy:FedMedian",
    ],
)
def test_a_flower_strategy_its_class_or_a_function_that_makes_one_is_adapted(where):
    chosen = own_algorithm(where)
    assert isinstance(chosen, Algorithm) and chosen.equal_plans


def test_the_adapted_strategy_is_the_one_that_was_named(
    initial, toy_plan, random_update, task_identity
):
    rng = np.random.default_rng(0)
    updates = [random_update(f"pi-{i}", toy_plan, rng) for i in range(3)]
    after = run(own_algorithm("flwr.serverapp.strategy:FedMedian"), initial, [updates])
    assert isinstance(after.memory.strategy, FedMedian)
    deltas = np.stack([update.delta["head.weight"] for update in updates])
    expected = initial.tensors["head.weight"] + np.median(deltas, axis=0)
    assert_allclose(after.state.tensors["head.weight"], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("where", "text"),
    [
        (
            "no_such_module:make",
            r"cannot import no_such_module:make \(ModuleNotFoundError: No module named "
            r"'no_such_module'\); write package.module:name, with the package where Python finds "
            r"it \(PYTHONPATH\)",
        ),
        (
            "my_package.mine:absent",
            r"cannot import my_package.mine:absent \(AttributeError: .*has no attribute 'absent'\)",
        ),
        (":make", r"cannot import :make \(ValueError: Empty module name\); write package.module"),
        ("my_broken:make", r"cannot import my_broken:make \(ModuleNotFoundError: .*no_such_thing"),
        ("my_misspelt:make", r"cannot import my_misspelt:make \(SyntaxError: invalid syntax"),
        (
            "my_package.mine:number",
            "strategy my_package.mine:number is a int, not a strategies.algorithm.Algorithm nor a "
            "flwr.serverapp.strategy.Strategy, nor a function that makes one",
        ),
        ("my_package.mine:make_nothing", "my_package.mine:make_nothing is a NoneType, not a"),
        (
            "my_package.mine:needs",
            r"strategy my_package.mine:needs cannot be made \(TypeError: .*'rate'\); if it needs "
            "arguments, name a function without any that returns it",
        ),
        (
            "flwr.serverapp.strategy:QFedAvg",
            r"strategy flwr.serverapp.strategy:QFedAvg cannot be made \(TypeError: .*"
            r"'client_learning_rate'\); if it needs arguments, name a function",
        ),
        ("my_package.mine:fails", r"my_package.mine:fails cannot be made \(ZeroDivisionError: "),
        ("my_package.mine:refuses", "^rate must be above 0$"),
    ],
)
def test_what_is_no_algorithm_is_refused(where, text):
    with pytest.raises(ConfigError, match=text):
        own_algorithm(where)


def test_import_named_takes_anything():
    assert import_named("my_package.mine:number") == 3


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"rule": "median"},
            "rule is median, which strategy my_package.mine:keep would not see; leave it at "
            "clipped_mean, "
            "and settle it in the strategy",
        ),
        ({"quorum": 2}, "quorum is 2, which .* leave it at 1"),
        ({"server_learning_rate": 0.1}, "server-learning-rate is 0.1, which .* leave it at 0.0"),
        ({"server_momentum": 0.5}, "server-momentum is 0.5, which .* leave it at 0.9"),
    ],
)
def test_settings_that_an_own_strategy_would_not_see_are_refused(federation, settings, text):
    with pytest.raises(ConfigError, match=text):
        algorithm(federation(strategy="my_package.mine:keep", **settings), seed=0)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"rule": "krumm"}, "unknown rule krumm; known are mean, "),
        (
            {"rule": "krum:2+coverage", "sampled": 6},
            r"rule krum:2\+coverage needs the updates of 7 clients, and sampled is 6; raise",
        ),
        (
            {"rule": "multi_krum:3", "goal": 8, "quorum": 2},
            "rule multi_krum:3 needs the updates of 9 clients, and goal is 8; .* fewer hostile",
        ),
        ({"server_momentum": 1.0, "strategy": "fedavgm"}, "server momentum must be at least 0 and"),
    ],
)
def test_a_wrong_setting_of_a_built_in_strategy_is_refused(federation, settings, text):
    with pytest.raises(ConfigError, match=text):
        algorithm(federation(**settings), seed=0)


@pytest.mark.parametrize("spec", ["multi_krum:0", "krum:2", "clipped_mean"])
def test_a_rule_that_may_have_what_it_needs_is_taken(federation, spec):
    algorithm(federation(rule=spec, sampled=7), seed=0)
