import dataclasses
import inspect
import json

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi
from numpy.testing import assert_allclose, assert_array_equal

from fleet.config import STRATEGIES
from fleet.errors import ConfigError, UpdateError
from strategies.aggregation import weighted_mean
from strategies.server_opt import (
    SERVER_OPTIMIZERS,
    adagrad,
    adam,
    feddyn,
    server_optimizer,
    sgd,
    yogi,
)
from tests.many import many

ROUNDS = 6
PAIRS = {
    "fedavg": (sgd(), lambda: FedAvg()),
    "fedavgm": (sgd(momentum=0.9), lambda: FedAvgM(server_momentum=0.9)),
    "fedavgm, half a step": (
        sgd(0.5, momentum=0.7),
        lambda: FedAvgM(server_learning_rate=0.5, server_momentum=0.7),
    ),
    "fedadam": (adam(), lambda: FedAdam()),
    "fedadam, other settings": (
        adam(0.03, beta_1=0.5, beta_2=0.8, tau=1e-2),
        lambda: FedAdam(eta=0.03, beta_1=0.5, beta_2=0.8, tau=1e-2),
    ),
    "fedyogi": (yogi(), lambda: FedYogi()),
    "fedyogi, other settings": (
        yogi(0.03, beta_1=0.5, beta_2=0.8, tau=1e-2),
        lambda: FedYogi(eta=0.03, beta_1=0.5, beta_2=0.8, tau=1e-2),
    ),
    "fedadagrad": (adagrad(), lambda: FedAdagrad()),
    "fedadagrad, other settings": (
        adagrad(0.03, tau=1e-2),
        lambda: FedAdagrad(eta=0.03, tau=1e-2),
    ),
}
ADAPTIVE = {"learning_rate": "eta", "beta_1": "beta_1", "beta_2": "beta_2", "tau": "tau"}
OPTIMIZERS = {name: pair[0] for name, pair in PAIRS.items()} | {"feddyn": feddyn(2)}

every_pair = pytest.mark.parametrize(("ours", "flowers"), PAIRS.values(), ids=PAIRS)
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)


def params_of(plan, rng):
    """Random float32 params of a plan, statistics left out."""
    return {
        spec.name: rng.normal(size=spec.shape).astype(np.float32)
        for spec in plan.specs
        if not spec.is_statistic
    }


def deltas_of(params, rng):
    return {name: rng.normal(size=p.shape) for name, p in params.items()}


def leaves(state):
    """Every array and number of a nested state, by path."""
    return {(name, slot): value for name, slots in state.items() for slot, value in slots.items()}


# Flower computes in the dtype of the replies. In float64 only our rounding of params is
# left, which pins the formulas; float32 replies are what travels.
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-6), (np.float32, 2e-5)])
@every_pair
def test_several_rounds_equal_flowers_strategy(
    toy_plan, random_update, flower_round, ours, flowers, dtype, tolerance
):
    rng = np.random.default_rng(0)
    params = params_of(toy_plan, rng)
    strategy, theirs = flowers(), {name: p.astype(dtype) for name, p in params.items()}
    state = ours.init(params)
    for server_round in range(1, ROUNDS + 1):
        updates = [random_update(f"pi-{i}", toy_plan, rng) for i in range(3)]
        trained = [{name: theirs[name] + u.delta[name] for name in theirs} for u in updates]
        updates = [
            dataclasses.replace(u, delta={name: arrays[name] - theirs[name] for name in theirs})
            for u, arrays in zip(updates, trained, strict=True)
        ]
        params, state = ours.update(weighted_mean(updates).delta, state, params)
        counts = [u.num_examples for u in updates]
        theirs = flower_round(strategy, server_round, theirs, trained, counts)
        assert params.keys() == theirs.keys()
        for name in params:
            assert params[name].dtype == np.float32
            assert_allclose(params[name], theirs[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("ours", "flowers", "names"),
    [
        (sgd, FedAvgM, {"learning_rate": "server_learning_rate", "momentum": "server_momentum"}),
        (adam, FedAdam, ADAPTIVE),
        (yogi, FedYogi, ADAPTIVE),
        (adagrad, FedAdagrad, {"learning_rate": "eta", "tau": "tau"}),
    ],
)
def test_defaults_are_flowers(ours, flowers, names):
    mine, theirs = inspect.signature(ours).parameters, inspect.signature(flowers).parameters
    assert {n: mine[n].default for n in names} == {n: theirs[f].default for n, f in names.items()}


@every_optimizer
def test_a_tensor_that_nobody_trained_keeps_value_and_state(toy_plan, optimizer):
    rng = np.random.default_rng(0)
    params = params_of(toy_plan, rng)
    params, state = optimizer.update(deltas_of(params, rng), optimizer.init(params), params)
    trained = "head.weight"
    after, state_after = optimizer.update({trained: rng.normal(size=(2, 4))}, state, params)
    assert list(after) == list(params)
    for name in params.keys() - {trained}:
        assert after[name].tobytes() == params[name].tobytes()
    assert np.all(after[trained] != params[trained])
    before, now = leaves(state), leaves(state_after)
    assert before.keys() == now.keys()
    for name, slot in before:
        same = np.array_equal(before[name, slot], now[name, slot])
        assert same == (name != trained)


@every_optimizer
def test_a_round_that_trained_nothing_changes_nothing(toy_plan, optimizer):
    params = params_of(toy_plan, np.random.default_rng(0))
    state = optimizer.init(params)
    after, state_after = optimizer.update({}, state, params)
    for name, p in params.items():
        assert_array_equal(after[name], p)
    assert leaves(state).keys() == leaves(state_after).keys()


@many("seed", range(20))
@every_optimizer
def test_a_tensor_steps_as_if_alone_with_only_its_rounds(toy_plan, optimizer, seed):
    rng = np.random.default_rng(seed)
    initial = params_of(toy_plan, rng)
    rounds = []
    for _ in range(8):
        deltas = deltas_of(initial, rng)
        rounds.append({name: d for name, d in deltas.items() if rng.random() < 0.5})
    params, state = initial, optimizer.init(initial)
    for delta in rounds:
        params, state = optimizer.update(delta, state, params)
    for name in initial:
        alone = {name: initial[name]}
        alone_state = optimizer.init(alone)
        for delta in rounds:
            if name in delta:
                alone, alone_state = optimizer.update({name: delta[name]}, alone_state, alone)
        assert params[name].tobytes() == alone[name].tobytes()
        for slot, value in alone_state[name].items():
            assert_array_equal(state[name][slot], value)


@every_optimizer
def test_update_leaves_its_arguments_alone(toy_plan, optimizer):
    rng = np.random.default_rng(0)
    params = params_of(toy_plan, rng)
    _, state = optimizer.update(deltas_of(params, rng), optimizer.init(params), params)
    delta = deltas_of(params, rng)
    for array in (*params.values(), *delta.values(), *leaves(state).values()):
        if isinstance(array, np.ndarray):
            array.flags.writeable = False  # so that writing in place raises
    names, slots = list(state), leaves(state)
    first = optimizer.update(delta, state, params)
    again = optimizer.update(delta, state, params)
    assert list(state) == names
    assert leaves(state).keys() == slots.keys()
    for name in params:
        assert first[0][name].tobytes() == again[0][name].tobytes()


@every_optimizer
def test_state_is_plain_arrays_and_numbers(toy_plan, optimizer):
    rng = np.random.default_rng(0)
    params = params_of(toy_plan, rng)
    _, state = optimizer.update(deltas_of(params, rng), optimizer.init(params), params)
    assert state.keys() == params.keys()
    for (name, _), value in leaves(state).items():
        if isinstance(value, np.ndarray):
            assert value.dtype == np.float64
            assert value.shape == params[name].shape
        else:
            assert json.loads(json.dumps(value)) == value == 1


@every_optimizer
def test_nan_is_passed_on(toy_plan, optimizer):
    rng = np.random.default_rng(0)
    params = params_of(toy_plan, rng)
    delta = deltas_of(params, rng)
    delta["head.weight"][0, 1] = np.nan
    after, _ = optimizer.update(delta, optimizer.init(params), params)
    assert np.isnan(after["head.weight"]).sum() == 1
    assert np.isnan(after["head.weight"][0, 1])


@every_optimizer
def test_a_tensor_of_no_dimensions_steps_too(optimizer):
    params = {"scale": np.array(2.0, dtype=np.float32)}
    params, state = optimizer.update({"scale": np.array(1.0)}, optimizer.init(params), params)
    assert isinstance(params["scale"], np.ndarray)
    assert params["scale"].shape == ()
    assert all(not hasattr(v, "shape") or v.shape == () for v in leaves(state).values())


def test_the_names_build_their_optimisers(toy_plan):
    rng = np.random.default_rng(0)
    params = params_of(toy_plan, rng)
    delta = [deltas_of(params, rng) for _ in range(3)]
    expected = {
        "fedavg": sgd(),
        "fedavgm": sgd(momentum=0.9),
        "fedadam": adam(),
        "fedyogi": yogi(),
        "fedadagrad": adagrad(),
        "feddyn": feddyn(4),
    }
    assert expected.keys() == SERVER_OPTIMIZERS.keys()
    for name, direct in expected.items():
        named = server_optimizer(name, momentum=0.9, clients=4)
        assert_same_steps(named, direct, delta, params)


def test_a_learning_rate_replaces_the_default(toy_plan):
    rng = np.random.default_rng(0)
    params = params_of(toy_plan, rng)
    delta = [deltas_of(params, rng) for _ in range(3)]
    named = server_optimizer("fedavgm", learning_rate=0.25, momentum=0.5)
    assert_same_steps(named, sgd(0.25, 0.5), delta, params)
    named = server_optimizer("fedyogi", learning_rate=0.25, momentum=0.5)
    assert_same_steps(named, yogi(0.25), delta, params)


def assert_same_steps(one, other, deltas, params):
    one_params, one_state = params, one.init(params)
    other_params, other_state = params, other.init(params)
    for delta in deltas:
        one_params, one_state = one.update(delta, one_state, one_params)
        other_params, other_state = other.update(delta, other_state, other_params)
    for name in params:
        assert_array_equal(one_params[name], other_params[name])
        assert np.any(one_params[name] != params[name])


def test_an_unknown_name_is_refused_with_the_known_ones():
    text = "'fedadm'; known are fedavg, fedavgm, fedadam, fedyogi, fedadagrad"
    with pytest.raises(ConfigError, match=text):
        server_optimizer("fedadm", momentum=0.9)


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
@pytest.mark.parametrize("learning_rate", (-0.1, float("inf"), float("nan")))
def test_a_learning_rate_out_of_range_is_refused(name, learning_rate):
    text = f"server learning rate must be above 0 and finite, got {learning_rate}"
    if name == "feddyn":
        text = (
            f"feddyn has no learning rate, and server-learning-rate is {learning_rate}; set it to"
        )
    with pytest.raises(ConfigError, match=text):
        server_optimizer(name, learning_rate=learning_rate, momentum=0.9)


def test_other_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="server momentum must be at least 0 and below 1, got 1"):
        server_optimizer("fedavgm", momentum=1.0)
    with pytest.raises(ConfigError, match=r"beta_1 must be at least 0 and below 1, got -0\.1"):
        adam(beta_1=-0.1)
    with pytest.raises(ConfigError, match="server beta_2 must be at least 0 and below 1, got 1"):
        yogi(beta_2=1.0)
    with pytest.raises(ConfigError, match="server tau must be above 0 and finite, got 0"):
        adagrad(tau=0.0)
    with pytest.raises(ConfigError, match="feddyn needs the number of the fleet's clients, got 0"):
        feddyn(0)


@every_optimizer
def test_a_delta_that_does_not_fit_is_refused(toy_plan, optimizer):
    rng = np.random.default_rng(0)
    params = params_of(toy_plan, rng)
    state = optimizer.init(params)
    with pytest.raises(UpdateError, match=r"delta names stem.weight, which is not among the 11"):
        optimizer.update({"stem.weight": np.zeros(3)}, state, params)
    with pytest.raises(UpdateError, match=r"the optimiser's state knows no head\.weight"):
        optimizer.update({"head.weight": np.zeros((2, 4))}, {}, params)
    text = r"delta of blocks.0.conv.weight has shape \(3,\), the param \(4, 3\)"
    with pytest.raises(UpdateError, match=text):
        optimizer.update({"blocks.0.conv.weight": np.zeros(3)}, state, params)


def test_the_run_configuration_names_every_server_optimiser():
    assert set(STRATEGIES) == set(SERVER_OPTIMIZERS)
