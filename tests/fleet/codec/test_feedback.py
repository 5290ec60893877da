import numpy as np
import pytest

from fleet.codec import decode, encode, encode_with_feedback
from fleet.errors import UpdateError
from tests.plans import random_arrays, toy_plan

PLAN = toy_plan()
WITHOUT = ("float32", "float16", "int8", "int4")
CODECS = ("float32+feedback", "float16+feedback", "int8+feedback", "int4+feedback")
CODECS += ("topk:0.1", "topk:0.1+float16", "topk:0.1+int8", "topk:0.02+int4")


def statistics(plan):
    return {spec.name for spec in plan.specs if spec.is_statistic}


@pytest.mark.parametrize("codec", CODECS)
def test_what_was_sent_and_what_is_left_is_all_that_was_due_over_unequal_plans(codec):
    rng = np.random.default_rng(1)
    plans = [PLAN.narrow(blocks) for blocks in (0, 1, 2)]
    due = {spec.name: np.zeros(spec.shape) for spec in PLAN.specs}
    arrived = {name: array.copy() for name, array in due.items()}
    residual = {}
    for round_ in range(40):
        plan = plans[rng.integers(3)]
        update = random_arrays(plan, round_)
        payload, residual = encode_with_feedback(update, residual, plan, codec, [round_])
        for name, array in decode(payload, plan).items():
            due[name] += update[name]
            arrived[name] += array
    assert residual.keys() == PLAN.by_name.keys() - statistics(PLAN)
    for name, left in residual.items():
        scale = np.abs(due[name]).max() + np.abs(left).max()
        np.testing.assert_allclose(arrived[name] + left, due[name], atol=40 * 2e-7 * scale)


@pytest.mark.parametrize("codec", CODECS)
def test_tensors_that_a_plan_does_not_train_keep_their_residual(codec):
    narrow = PLAN.narrow(1)
    _, wide = encode_with_feedback(random_arrays(PLAN, 0), {}, PLAN, codec)
    _, after = encode_with_feedback(random_arrays(narrow, 1), wide, narrow, codec)
    assert after.keys() == wide.keys()
    for name in wide.keys() - narrow.by_name.keys():
        assert after[name].tobytes() == wide[name].tobytes()


@pytest.mark.parametrize("codec", CODECS)
def test_statistics_are_sent_as_they_are_and_leave_nothing(codec):
    update = random_arrays(PLAN, 0)
    wrong = {name: np.full_like(update[name], 1e6) for name in statistics(PLAN)}
    payload, residual = encode_with_feedback(update, wrong, PLAN, codec)
    decoded = decode(payload, PLAN)
    for name in statistics(PLAN):
        np.testing.assert_allclose(decoded[name], update[name], rtol=2**-11)
        assert residual[name] is wrong[name]  # neither used nor changed


@pytest.mark.parametrize("codec", WITHOUT)
def test_without_feedback_an_update_is_encoded_as_it_is(codec):
    update = random_arrays(PLAN, 0)
    kept = {"head.weight": np.ones((3, 6), np.float32)}
    payload, residual = encode_with_feedback(update, kept, PLAN, codec, [5])
    assert payload == encode(update, PLAN, codec, [5])
    assert residual == kept


def test_update_and_residual_are_left_alone():
    update, residual = random_arrays(PLAN, 0), random_arrays(PLAN, 1)
    before = {name: array.copy() for name, array in {**update, **residual}.items()}
    for arrays in (update, residual):
        for array in arrays.values():
            array.flags.writeable = False
    encode_with_feedback(update, residual, PLAN, "topk:0.1+int4")
    assert all(residual[name].tobytes() == before[name].tobytes() for name in residual)


def test_an_update_that_is_not_finite_is_refused():
    update = random_arrays(PLAN, 0) | {"head.bias": np.array([1, np.nan, 1], np.float32)}
    with pytest.raises(UpdateError, match=r"head\.bias holds NaN or infinity; lower the learning"):
        encode_with_feedback(update, {}, PLAN, "topk:0.1+int4")


def mean_error(plan, rounds, feedback):
    """Of the mean of what arrived, over that of what was due, in its norm; the same each round."""
    update, residual = random_arrays(plan, 0), {}
    total = {name: np.zeros(array.shape) for name, array in update.items()}
    for _ in range(rounds):
        payload, left = encode_with_feedback(update, residual, plan, "topk:0.1+int4")
        residual = left if feedback else {}
        for name, array in decode(payload, plan).items():
            total[name] += array
    weights = [name for name in update if name not in statistics(plan)]
    error = sum(np.square(total[name] / rounds - update[name]).sum() for name in weights)
    return np.sqrt(error / sum(np.square(update[name]).sum() for name in weights))


def test_the_mean_error_of_the_sum_goes_to_zero_as_one_over_the_rounds():
    """Karimireddy et al., arXiv:1901.09847, lemma 3: what is left stays bounded."""
    plan = toy_plan(width=12)
    errors = {rounds: mean_error(plan, rounds, feedback=True) for rounds in (10, 40, 160)}
    assert errors[40] < errors[10] / 2.5  # measured: 0.155, 0.050, 0.014
    assert errors[160] < errors[40] / 2.5
    assert errors[160] < 0.02


def test_without_what_was_left_the_mean_error_stays():
    plan = toy_plan(width=12)
    few, many = (mean_error(plan, rounds, feedback=False) for rounds in (10, 160))
    assert many == pytest.approx(few, rel=1e-6)
    assert many > 0.3  # measured: 0.37
