from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn as nn
from numpy.testing import assert_array_equal

from fleet.backbones import load_backbone
from fleet.closed_form import moments_of, step_exponent, total
from fleet.closed_form.moments import MAX_CODE
from fleet.config import default_settings, read_config
from fleet.data import load_data, to_tensor
from fleet.errors import ConfigError, UpdateError
from fleet.mobiletl import TransferModel
from fleet.plan import make_plan


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", "train", limit=30, seed=0)


@pytest.fixture
def small(random_backbone):
    return random_backbone("mobilenet_v3_small", num_classes=10, image_size=32)


def transfer(backbone, method="mobiletl", blocks=2, **options):
    return TransferModel(backbone, make_plan(backbone, method=method, blocks=blocks), **options)


def moments(backbone, data, exponent=-6, features=None, **options):
    return moments_of(
        transfer(backbone, **options), data, backbone.preprocessing, exponent, features
    )


def head_inputs(backbone, data):
    """(N, D): what a hook on the head sees as the model itself runs on single images."""
    seen = []
    hook = backbone.head.register_forward_pre_hook(lambda head, args: seen.append(args[0][0]))
    with torch.inference_mode():
        for i in range(len(data)):
            backbone.model.eval()(to_tensor(data.read(i), backbone.preprocessing)[None])
    hook.remove()
    return torch.stack(seen).double().numpy()


def assert_same(a, b):
    for name in ("gram", "class_sums", "counts", "exponent"):
        assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize(
    "name",
    [
        "efficientnet_lite0",
        "mobilenet_v2",
        "mobilenet_v3_small",
        "efficientnet_b0",
        "timm:mobilenetv3_small_100",
        "mobilenetv4_conv_small",
    ],
)
def test_moments_are_those_of_the_head_s_inputs(name, digits, random_backbone):
    backbone = random_backbone(name, num_classes=10, image_size=32)
    some = digits.subset(range(6))
    inputs = head_inputs(backbone, some)
    exponent = int(np.ceil(np.log2(np.abs(inputs).max()))) - 9
    found = moments(backbone, some, exponent)
    step, targets = 2.0**exponent, np.eye(10)[some.labels]
    assert found.gram.shape == (backbone.head.in_features,) * 2
    assert_array_equal(found.counts, targets.sum(axis=0))
    # Each feature is half a step off at most, a step where the prefix's folded norms round.
    assert np.abs(found.class_sums * step - targets.T @ inputs).max() <= 6 * step
    error = np.abs(found.gram * step**2 - inputs.T @ inputs)
    assert (error <= 12 * step * (np.abs(inputs).max() + step)).all()
    assert np.abs(found.gram).max() > 1000


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_any_partition_in_any_order_adds_up_to_the_same_bits(seed, digits, small):
    rng = np.random.default_rng(seed)
    model = transfer(small)
    everything = moments_of(model, digits, small.preprocessing, -6)
    owners = rng.integers(0, 5, len(digits))
    shuffled = rng.permutation(len(digits))
    parts = [shuffled[owners[shuffled] == owner] for owner in rng.permutation(5)]
    assert_same(
        total(
            moments_of(model, digits.subset(part), small.preprocessing, -6)
            for part in parts
            if len(part)
        ),
        everything,
    )
    # Of floats as they are this does not hold, nor would a test that could not fail.
    floats = head_inputs(small, digits).astype(np.float32)
    sums = sum((floats[part].sum(axis=0) for part in parts), np.float32(0))
    assert (sums != floats.sum(axis=0)).any()


def test_neither_cut_nor_method_nor_cache_matters_beyond_rounding(digits, small, tmp_path):
    some = digits.subset(range(10))
    settings = default_settings() | {"cache-dir": str(tmp_path)}
    cached = read_config(settings).features
    reference = moments(small, some)
    for options in ({"blocks": 4}, {"method": "head"}, {"method": "full"}, {"cut": 3}):
        other = moments(small, some, **options)
        assert np.abs(other.class_sums - reference.class_sums).max() <= 2
    first, again = (moments(small, some, features=cached) for _ in range(2))
    assert any(tmp_path.iterdir())
    assert_same(first, again)
    assert np.abs(first.class_sums - reference.class_sums).max() <= 10


def test_training_mode_changes_nothing(digits, small):
    some = digits.subset(range(5))
    reference = moments(small, some)
    model = transfer(small, method="full")
    model.train()
    before = small.model.state_dict()["features.0.1.running_mean"].clone()
    assert (
        np.abs(
            moments_of(model, some, small.preprocessing, -6).class_sums - reference.class_sums
        ).max()
        <= 2
    )
    assert_array_equal(small.model.state_dict()["features.0.1.running_mean"], before)


def test_features_far_out_are_clipped(digits, small):
    found = moments(small, digits.subset(range(3)), exponent=-30)
    assert found.gram.max() == 3 * MAX_CODE**2


def test_faults_are_named(digits, small):
    with pytest.raises(ConfigError, match="digits has no images for this client; give it some"):
        moments(small, digits.subset([]))
    with pytest.raises(ConfigError, match="exponent of the features' step is 70, expected -64 to"):
        moments(small, digits, exponent=70)
    with torch.no_grad():
        small.blocks[-1].units[-1].norm.bias.fill_(float("nan"))
    with pytest.raises(UpdateError, match="image 0 of digits has features that are NaN"):
        moments(small, digits)


def test_moments_that_do_not_fit_do_not_add(digits, small):
    some = digits.subset(range(2))
    with pytest.raises(UpdateError, match="there are no moments to add up; wait for clients"):
        total([])
    with pytest.raises(UpdateError, match=r"steps of 2\^-5 do not add to .* steps of 2\^-6"):
        total([moments(small, some), moments(small, some, exponent=-5)])


def test_a_step_scales_with_the_features(random_backbone):
    backbone = random_backbone("mobilenet_v3_small", image_size=32)
    exponent = step_exponent(backbone)
    assert exponent == step_exponent(backbone)
    hidden = backbone.steps[-4].module
    assert isinstance(hidden, nn.Linear)
    with torch.no_grad():
        hidden.weight.mul_(2**10)  # far out, hard-swish is the identity or zero
        hidden.bias.mul_(2**10)
        first = step_exponent(backbone)
        hidden.weight.mul_(16)
        hidden.bias.mul_(16)
        assert step_exponent(backbone) == first + 4
        hidden.weight.zero_()
        assert step_exponent(backbone) == 0


def test_the_default_step_is_about_the_deviation_of_real_features():
    backbone = load_backbone("efficientnet_lite0", num_classes=10, image_size=64)
    some = load_data("digits", "train", limit=60, seed=0)
    exponent = step_exponent(backbone)
    found = moments(backbone, some, exponent, method="head")
    mean = found.class_sums.sum(axis=0) / 60
    deviation = np.sqrt(np.mean(np.diag(found.gram) / 60 - mean**2))  # in steps
    assert 0.3 < deviation < 3
    assert Counter(some.labels.tolist()) == dict(enumerate(found.counts))
