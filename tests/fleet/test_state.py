import re

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from fleet.backbones import load_backbone
from fleet.errors import UpdateError
from fleet.plan import make_plan
from fleet.state import TrainableState, capture, load


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("mobilenet_v3_small", num_classes=4, image_size=32, weights="none")


@pytest.fixture(scope="module")
def plan(backbone):
    return make_plan(backbone, method="mobiletl", blocks=2)


@pytest.fixture
def random_state(plan):
    def build(seed, plan=plan):
        rng = np.random.default_rng(seed)
        return TrainableState(
            plan, {s.name: rng.normal(size=s.shape).astype(np.float32) for s in plan.specs}
        )

    return build


@pytest.mark.parametrize("method", ["mobiletl", "full"])
def test_load_and_capture_keep_every_bit_of_a_channels_last_model(method, random_state):
    backbone = load_backbone("mobilenet_v3_small", num_classes=4, image_size=32, weights="none")
    plan = make_plan(backbone, method=method, blocks=2)
    untouched = {n: t.clone() for n, t in backbone.model.state_dict().items()}
    convs = [m.weight for m in backbone.model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert any(not weight.is_contiguous() for weight in convs)

    state = random_state(0, plan)
    load(backbone.model, state)
    own = backbone.model.state_dict()
    for name, before in untouched.items():
        expected = torch.tensor(state.tensors[name]) if name in plan.by_name else before
        assert torch.equal(own[name], expected), name
    again = capture(backbone.model, plan)
    assert list(again.tensors) == [spec.name for spec in plan.specs]
    for name, array in state.tensors.items():
        assert again.tensors[name].tobytes() == array.tobytes()


def test_a_captured_state_does_not_follow_the_model():
    backbone = load_backbone("mobilenet_v3_small", num_classes=4, image_size=32, weights="none")
    plan = make_plan(backbone, method="head")
    state = capture(backbone.model, plan)
    with torch.no_grad():
        backbone.head.weight += 1
    name = plan.specs[0].name
    assert_array_equal(state.tensors[name], np.zeros(plan.specs[0].shape))


def test_a_state_cannot_be_written_to(random_state):
    state = random_state(0)
    for states in (state, state + state, state * 2.0):
        for array in states.tensors.values():
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0


def test_arithmetic_is_numpys(random_state):
    a, b = random_state(0), random_state(1)
    for name in a.tensors:
        x, y = a.tensors[name], b.tensors[name]
        assert_array_equal((a + b).tensors[name], x + y)
        assert_array_equal((a - b).tensors[name], x - y)
        assert_array_equal((a * 0.1).tensors[name], x * np.float32(0.1))
        assert (a * 0.1).tensors[name].dtype == np.float32


def test_states_of_different_plans_do_not_combine(random_state, plan):
    narrow = plan.narrow(1)
    text = f"different plans do not combine: {plan.digest[:8]} and {narrow.digest[:8]}"
    for operation in (TrainableState.__add__, TrainableState.__sub__):
        with pytest.raises(UpdateError, match=text):
            operation(random_state(0), random_state(0, narrow))


def test_narrow_keeps_what_the_sub_plan_trains(random_state, plan):
    state, narrow = random_state(0), plan.narrow(1)
    assert state.narrow(narrow).tensors == {n: state.tensors[n] for n in narrow.by_name}


@pytest.fixture
def weight(plan):
    return next(spec for spec in plan.specs if spec.role == "weight")


def refused(plan, tensors, text):
    with pytest.raises(UpdateError, match=re.escape(text)):
        TrainableState(plan, tensors)


def test_an_unknown_name_is_refused(random_state, plan):
    tensors = dict(random_state(0).tensors) | {"stem.weight": np.zeros(3, np.float32)}
    refused(plan, tensors, f"unknown tensor stem.weight (of 1), plan {plan.digest[:8]} has no such")


def test_a_missing_name_is_refused(random_state, plan, weight):
    tensors = dict(random_state(0).tensors)
    del tensors[weight.name]
    refused(plan, tensors, f"missing tensor {weight.name} (of 1), plan {plan.digest[:8]} needs it")


def test_other_shapes_are_refused_even_if_they_broadcast(random_state, plan, weight):
    for shape in ((1,), weight.shape[1:], (1, *weight.shape), weight.shape[::-1]):
        tensors = dict(random_state(0).tensors) | {weight.name: np.zeros(shape, np.float32)}
        text = f"{weight.name} has shape {shape}, plan {plan.digest[:8]} expects {weight.shape}"
        refused(plan, tensors, text)


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", ">f4"])
def test_another_dtype_is_refused(random_state, plan, weight, dtype):
    tensors = dict(random_state(0).tensors) | {weight.name: np.zeros(weight.shape, dtype)}
    text = f"{weight.name} has dtype {dtype}, plan {plan.digest[:8]} expects float32; convert it"
    refused(plan, tensors, text)


def test_a_state_does_not_narrow_to_a_wider_plan(random_state, plan):
    with pytest.raises(UpdateError, match=r"trains .*, which a state of plan .* does not hold"):
        random_state(0, plan.narrow(1)).narrow(plan)
