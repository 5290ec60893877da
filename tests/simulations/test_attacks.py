import itertools
import math
from statistics import fmean, pstdev

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fleet.errors import ConfigError
from fleet.plan import TensorSpec
from simulations.attacks import FORMS, alie_z, forge, hostile_clients, read_attack
from tests.many import many
from tests.plans import plan_of

SHAPES = {"weight": (4, 3), "shift": (4,), "mean": (4,), "var": (4,)}


def toy_plan(blocks):
    """A head and the tensors of one norm and one convolution in every block."""
    specs = [TensorSpec(name="head", shape=(2, 4), role="weight", depth=0)] + [
        TensorSpec(name=f"{depth}.{role}", shape=shape, role=role, depth=depth)
        for depth in range(1, blocks + 1)
        for role, shape in SHAPES.items()
    ]
    return plan_of(*specs, blocks=blocks)


def update(blocks, seed):
    rng = np.random.default_rng(seed)
    arrays = {s.name: rng.normal(size=s.shape).astype(np.float32) for s in toy_plan(blocks).specs}
    return {n: np.square(a) if n.endswith("var") else a for n, a in arrays.items()}


# The attacker trains two blocks; another hostile client one, and honest ones one, two or three.
OURS = [update(2, 0), update(1, 1)]
OTHERS = [update(1, 2), update(1, 3), update(2, 4), update(3, 5), update(1, 6), update(1, 7)]


def forged(spec, seed=0, ours=OURS, others=OTHERS):
    rng = np.random.default_rng(seed)
    return forge(read_attack(spec), toy_plan(2), ours[0], ours, others, rng)


def expected(formula, ours=OURS, others=OTHERS):
    """One Python number at a time: (own, hostile ones', honest ones') numbers → the attack's."""
    result = {}
    for name, own in ours[0].items():
        if name.endswith(("mean", "var")):
            continue
        result[name] = np.empty(own.shape)
        for index in np.ndindex(own.shape):
            hostile, honest = (
                [float(u[name][index]) for u in side if name in u] for side in (ours, others)
            )
            result[name][index] = formula(float(own[index]), hostile, honest)
    return result


def alie(own, hostile, honest, z=None):
    cohort = hostile + honest
    z = alie_z(len(cohort), len(hostile)) if z is None else z
    return fmean(cohort) - z * pstdev(cohort)


@pytest.mark.parametrize(
    ("spec", "formula"),
    [
        ("sign_flip:10", lambda own, hostile, honest: -10 * own),
        ("alie", alie),
        ("alie:1.5", lambda *numbers: alie(*numbers, z=1.5)),
        ("ipm:0.5", lambda own, hostile, honest: -0.5 * fmean(honest)),
        ("nan", lambda own, hostile, honest: math.nan),
        ("label_flip", lambda own, hostile, honest: own),
    ],
)
def test_forged_deltas_are_the_formula_over_those_who_train_the_tensor(spec, formula):
    ours, theirs = forged(spec), expected(formula)
    assert ours.keys() == OURS[0].keys()
    for name, array in theirs.items():
        assert ours[name].dtype == np.float32
        assert_allclose(ours[name], array, rtol=1e-6, atol=1e-7)


def test_a_tensor_that_no_honest_client_trains_is_attacked_by_the_hostile_ones_mean():
    others = [u for u in OTHERS if "2.weight" not in u]
    ours = forged("ipm:2", others=others)
    assert_allclose(ours["2.weight"], -2 * OURS[0]["2.weight"].astype(float), rtol=1e-6)
    assert_allclose(ours["head"], -2 * np.mean([u["head"].astype(float) for u in others], 0), 1e-5)


def test_gaussian_noise_is_of_its_size_and_of_its_seed():
    one = {"head": np.zeros((200, 100), np.float32)}
    spec = TensorSpec(name="head", shape=(200, 100), role="weight", depth=0)
    plan = plan_of(spec, blocks=0)

    def noise(seed):
        rng = np.random.default_rng(seed)
        return forge(read_attack("gaussian:0.1"), plan, one, [one], [], rng)["head"]

    assert abs(noise(0).mean()) < 0.1 * 4 / math.sqrt(20000)
    assert_allclose(noise(0).std(), 0.1, rtol=0.03)
    assert_array_equal(noise(0), noise(0))
    assert (noise(0) != noise(1)).all()


@pytest.mark.parametrize(
    ("spec", "mean", "var"),
    [
        ("sign_flip:10", -1, 1),
        ("alie", 1, 1),
        ("ipm:0.5", 1, 1),
        ("gaussian:0.1", 1, 1),
        ("nan", math.nan, math.nan),
    ],
)
def test_statistics_are_values_and_variances_stay_variances(spec, mean, var):
    ours = forged(spec)
    for depth in (1, 2):
        assert_array_equal(ours[f"{depth}.mean"], mean * OURS[0][f"{depth}.mean"])
        assert_array_equal(ours[f"{depth}.var"], var * OURS[0][f"{depth}.var"])


def test_what_honest_clients_trained_is_left_as_it_was():
    before = [{n: a.copy() for n, a in u.items()} for u in OURS + OTHERS]
    for spec in ("sign_flip:10", "alie", "ipm:0.5", "nan", "gaussian:1"):
        forged(spec)
    for old, new in zip(before, OURS + OTHERS, strict=True):
        assert all((old[name] == new[name]).all() for name in old)


@pytest.mark.parametrize("workers", [10, 20, 25, 50, 51, 100])
def test_alie_hides_behind_just_as_many_as_make_a_majority(workers):
    """φ(z) < (n − m − s)/(n − m) for every smaller z, and for no larger one."""

    def phi(z):
        return (1 + math.erf(z / math.sqrt(2))) / 2

    for hostile in range(1, math.ceil(workers / 2)):
        supporters = math.floor(workers / 2 + 1) - hostile
        share = (workers - hostile - supporters) / (workers - hostile)
        z = alie_z(workers, hostile)
        if share <= 0.5:
            assert z == 0
        else:
            assert phi(z) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize(("workers", "hostile"), [(1, 1), (2, 1), (3, 2), (3, 3), (4, 3)])
def test_alie_has_a_finite_z_where_the_hostile_are_many(workers, hostile):
    assert 0 <= alie_z(workers, hostile) < 3


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("backdoor", "unknown attack 'backdoor'; known: sign_flip:FACTOR"),
        ("", "unknown attack ''; known: "),
        ("sign_flip", "attack 'sign_flip': sign_flip needs a number; known: "),
        ("nan:3", "attack 'nan:3': nan takes no number; known: "),
        ("ipm:half", "needs a number above 0 behind the colon, got 'half'; known: "),
        ("ipm:-1", "needs a number above 0 behind the colon, got '-1'; known: "),
        ("ipm:inf", "needs a number above 0 behind the colon, got 'inf'; known: "),
        ("alie:", "needs a number above 0 behind the colon, got ''; known: "),
    ],
)
def test_an_attack_that_is_wrong_is_refused_with_those_there_are(spec, text):
    with pytest.raises(ConfigError) as error:
        read_attack(spec)
    assert text in str(error.value)
    assert str(error.value).endswith(FORMS)


@pytest.mark.parametrize(("clients", "share", "count"), [(20, 0.2, 4), (10, 0.33, 3), (7, 1.0, 7)])
def test_the_hostile_are_a_seeded_draw_of_an_exact_count(clients, share, count):
    draws = [hostile_clients(clients, share, seed) for seed in range(200)]
    assert draws == [hostile_clients(clients, share, seed) for seed in range(200)]
    assert all(len(draw) == count and draw <= set(range(clients)) for draw in draws)
    times = [sum(client in draw for draw in draws) for client in range(clients)]
    sigma = math.sqrt(200 * share * (1 - share))
    assert max(abs(n - 200 * count / clients) for n in times) <= 4 * sigma


@many("seed", range(5))
def test_the_hostile_of_a_smaller_share_stay_hostile_in_a_larger_one(seed):
    draws = [hostile_clients(20, share, seed) for share in (0, 0.1, 0.2, 0.5, 1)]
    assert all(small < large for small, large in itertools.pairwise(draws))
