"""The methods that MobileTL is held against: each must be what it claims to be."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.testing import assert_close

from fleet.baselines import BASELINES, CONTENDERS, Checkpointed, FrozenNorms, contender
from fleet.errors import ConfigError, PlanError
from fleet.measure import saved_for_backward
from fleet.mobiletl import TransferModel
from fleet.optim import SGD
from fleet.plan import make_plan

BACKBONES = ("mobilenet_v2", "mobilenet_v3_small")


def double(backbone):
    """In float64, where two orders of summation agree to twelve digits; without dropout."""
    for part in backbone.model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    backbone.model.double()
    return backbone


def after_a_step(model, x, labels):
    """Loss, gradients, and the state after an update, without counters that nothing reads."""
    loss = model.gradients(model.features(x), labels)
    gradients = {n: p.grad.clone() for n, p in model.model.named_parameters() if p.grad is not None}
    SGD(model.trainable_parameters(), 0.1).step()
    state = model.model.state_dict()
    return loss, gradients, {n: t for n, t in state.items() if not n.endswith("_tracked")}


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("method", ["full", "blocks"])
def test_checkpointing_changes_nothing_but_what_is_kept(random_backbone, images, name, method):
    backbone = double(random_backbone(name))
    x, labels = images(size=32).double(), torch.tensor([0, 1, 2, 3])
    stock = contender(copy.deepcopy(backbone), method, 3)
    ours = contender(copy.deepcopy(backbone), f"{method}+checkpoint", 3)
    assert isinstance(ours, Checkpointed)
    for theirs, mine in zip(
        after_a_step(stock, x, labels), after_a_step(ours, x, labels), strict=True
    ):
        assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["full", "blocks"])
def test_checkpointed_logits_are_those_of_stock_autograd(random_backbone, images, method):
    backbone, x = double(random_backbone("mobilenet_v2")), images(size=32).double()
    logits = [
        contender(copy.deepcopy(backbone), name, 3)(x) for name in (method, f"{method}+checkpoint")
    ]
    assert logits[0].abs().max() > 1e-3
    assert_close(logits[1], logits[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("method", ["full", "blocks"])
def test_checkpointing_keeps_less(random_backbone, images, name, method):
    backbone, x = random_backbone(name), images()
    assert 5 * kept(contender(backbone, f"{method}+checkpoint", 3), x) < kept(
        contender(backbone, method, 3), x
    )


def kept(model, x):
    features = model.features(x)
    tensors = [*model.model.parameters(), *model.model.buffers()]
    with saved_for_backward(exclude=tensors) as saved:
        model.from_features(features)
    return saved.total


@pytest.mark.parametrize("number", [1, 4, 5])
@pytest.mark.parametrize("name", BACKBONES)
def test_accumulated_gradients_are_the_whole_batch_s(random_backbone, images, name, number):
    backbone = double(random_backbone(name))
    x, labels = images(number, 32).double(), torch.arange(number) % 5
    ours = contender(copy.deepcopy(backbone), "blocks+frozen-norms", 2)
    assert isinstance(ours, FrozenNorms)
    loss = ours.gradients(ours.features(x), labels)

    theirs = backbone.model.eval().requires_grad_()
    expected = F.cross_entropy(theirs(x), labels)
    expected.backward()
    assert loss == pytest.approx(expected.item())
    gradients = {n: p.grad for n, p in theirs.named_parameters()}
    trained = {n: p.grad for n, p in ours.model.named_parameters() if p.grad is not None}
    convs_and_shifts = {n for n, s in ours.plan.by_name.items() if s.role in ("weight", "bias")}
    assert trained.keys() == convs_and_shifts
    assert_close(trained, {n: gradients[n] for n in trained}, rtol=1e-8, atol=1e-12)


def test_frozen_norms_stay_as_they_were(random_backbone, images):
    model = contender(random_backbone("mobilenet_v2"), "blocks+frozen-norms", 2)
    before = copy.deepcopy(model.model.state_dict())
    _, gradients, after = after_a_step(model, images(), torch.tensor([0, 1, 2, 3]))
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == gradients.keys()


@pytest.mark.parametrize("name", ["efficientnet_lite0", *BACKBONES])
def test_bias_only_trains_the_shifts_above_the_stem_and_the_head(random_backbone, name):
    backbone = random_backbone(name)
    model = contender(backbone, "bias-only", 1)
    above = False
    expected = {f"{backbone.steps[-1].name}.{key}" for key in ("weight", "bias")}
    for step in backbone.steps:
        above |= step.block is not None
        if above and step.module is not None:
            expected |= {
                f"{step.name}.{part}.bias".replace("..", ".")
                for part, module in step.module.named_modules()
                if isinstance(module, nn.BatchNorm2d)
            }
    assert model.plan.by_name.keys() == expected
    assert {n for n, p in model.model.named_parameters() if p.requires_grad} == expected


def test_bias_only_keeps_no_conv_s_input(random_backbone, images):
    """A bit for each element that an activation sees, a float for each norm's channel."""
    backbone, x = random_backbone("mobilenet_v2"), images()
    model = contender(backbone, "bias-only", 1)
    seen = {nn.BatchNorm2d: [], nn.ReLU6: [], nn.Linear: []}
    for step in backbone.steps[len(model.frozen_steps) :]:
        for part in step.module.modules() if step.module else ():
            if type(part) in seen:
                part.register_forward_pre_hook(lambda m, args: seen[type(m)].append(args[0]))
    model.eval()
    model(x)
    model.train()
    expected = (
        sum(t.numel() // 8 for t in seen[nn.ReLU6])
        + sum(t.shape[1] * 4 for t in seen[nn.BatchNorm2d])
        + sum(t.nbytes for t in seen[nn.Linear])
    )
    assert len(seen[nn.ReLU6]) > 30
    assert kept(model, x) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("method", CONTENDERS)
def test_every_contender_learns(random_backbone, images, method):
    model = contender(random_backbone("mobilenet_v3_small"), method, 2)
    x, labels = model.features(images()), torch.tensor([0, 1, 2, 3])
    optimizer = SGD(model.trainable_parameters(), 0.02)
    first = model.gradients(x, labels)
    for _ in range(3):
        optimizer.step()
        last = model.gradients(x, labels)
    assert last < first


def test_methods_of_plans_are_those_of_plans(random_backbone):
    backbone = random_backbone("mobilenet_v3_small")
    for method in set(CONTENDERS) - BASELINES.keys():
        blocks = 0 if method in ("full", "head") else 2
        model = contender(backbone, method, 2)
        assert type(model) is TransferModel
        assert model.plan == make_plan(backbone, method=method, blocks=blocks)


def test_unknown_contender_is_refused(random_backbone):
    text = "unknown method lora; known: mobiletl, .*, full, full\\+checkpoint, .*, bias-only"
    with pytest.raises(ConfigError, match=text):
        contender(random_backbone("mobilenet_v3_small"), "lora", 1)


@pytest.mark.parametrize("method", ["mobiletl", "shifts", "blocks+checkpoint"])
def test_more_blocks_than_there_are_is_refused(random_backbone, method):
    with pytest.raises(PlanError, match="blocks is 12, mobilenet_v3_small has 11; choose 0 to 11"):
        contender(random_backbone("mobilenet_v3_small"), method, 12)
