"""A backbone trained as its plan says: what changes, what never does, and what is kept."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.testing import assert_close

from fleet.backbones import load_backbone
from fleet.errors import PlanError
from fleet.measure import saved_for_backward
from fleet.mobiletl import TransferModel
from fleet.mobiletl.model import first_trained_step
from fleet.optim import SGD
from fleet.plan import METHODS, make_plan

BACKBONES = [
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "mnasnet1_0",
    "efficientnet_b0",
    "efficientnet_lite0",
    "timm:mobilenetv2_100",
    "timm:mobilenetv3_large_100",
    "timm:fbnetc_100",
    "timm:mobilenetv4_conv_small",
]
CASES = [(method, tail) for method in METHODS for tail in (False, True)]


def train(model, x, steps=3):
    model.train()
    optimizer = SGD(model.trainable_parameters(), 0.05, momentum=0.9, weight_decay=1e-2)
    for _ in range(steps):
        F.cross_entropy(model(x), torch.arange(len(x)) % 5).backward()
        optimizer.step()


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", BACKBONES)
def test_eval_mode_is_the_original_model(random_backbone, images, name):
    backbone, x = random_backbone(name), images(2, 32)
    original = copy.deepcopy(backbone.model).eval()
    model = TransferModel(backbone, make_plan(backbone, method="mobiletl", blocks=2)).eval()
    with torch.inference_mode():
        assert torch.equal(model(x), original(x))


@pytest.mark.parametrize("name", BACKBONES)
def test_frozen_norms_in_training_mode_are_the_original_model(random_backbone, images, name):
    backbone, x = random_backbone(name), images(2, 32).double()
    backbone.model.double()
    for block in backbone.blocks:
        if block.drop_path is not None:
            block.drop_path.p = 0.0
    model = TransferModel(
        backbone, make_plan(backbone, method="shifts", blocks=len(backbone.blocks))
    )
    assert_close(model(x), backbone.model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("method", "train_tail"), CASES)
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "efficientnet_lite0"])
def test_training_changes_the_plan_s_tensors_and_no_other(
    random_backbone, images, name, method, train_tail
):
    backbone = random_backbone(name)
    plan = make_plan(backbone, method=method, blocks=2, train_tail=train_tail)
    before = snapshot(backbone.model)
    train(TransferModel(backbone, plan), images(4, 48))
    after = backbone.model.state_dict()
    assert after.keys() == before.keys()
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    changed = {n for n in changed if not n.endswith("num_batches_tracked")}
    assert changed <= plan.by_name.keys()
    still = plan.by_name.keys() - changed
    # A shift below a conv and a norm in training mode has no gradient: the norm takes it out.
    assert all(method in ("full", "blocks") and plan.by_name[n].role == "shift" for n in still)


@pytest.mark.parametrize("method", METHODS)
def test_evaluating_between_steps_changes_nothing(random_backbone, images, method):
    backbone = random_backbone("mobilenet_v2")
    model = TransferModel(backbone, make_plan(backbone, method=method, blocks=2)).eval()
    before = snapshot(backbone.model)
    with torch.inference_mode():
        model(images(2, 32))
    assert all(torch.equal(t, before[n]) for n, t in backbone.model.state_dict().items())


def test_only_the_plan_s_parameters_require_grad_and_get_it(random_backbone, images):
    backbone = random_backbone("mobilenet_v2")
    plan = make_plan(backbone, method="mobiletl", blocks=2)
    model = TransferModel(backbone, plan)
    model(images(2, 32)).sum().backward()
    for name, parameter in backbone.model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None) == (name in plan.by_name)


def test_trainable_parameters_are_the_plan_s_in_its_order(random_backbone):
    backbone = random_backbone("mobilenet_v2")
    plan = make_plan(backbone, method="mobiletl", blocks=2)
    own = dict(backbone.model.named_parameters())
    expected = [own[spec.name] for spec in plan.specs if not spec.is_statistic]
    found = TransferModel(backbone, plan).trainable_parameters()
    assert [id(parameter) for parameter in found] == [id(parameter) for parameter in expected]


def test_of_two_models_on_a_backbone_the_last_readied_trains(random_backbone, images):
    backbone = random_backbone("mobilenet_v2")
    narrow = TransferModel(backbone, make_plan(backbone, method="mobiletl", blocks=1))
    TransferModel(backbone, make_plan(backbone, method="full"))
    before = snapshot(backbone.model)
    train(narrow, images(4, 32))
    after = backbone.model.state_dict()
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    assert changed == narrow.plan.by_name.keys()


@pytest.mark.parametrize(
    ("method", "train_tail", "first"),
    [
        ("head", False, "classifier"),
        ("shifts", False, "blocks.5.3"),
        ("mobiletl", False, "blocks.5.3"),
        ("blocks", True, "blocks.5.3"),
        ("full", False, "conv_stem"),
    ],
)
def test_everything_below_the_first_trained_step_is_prefix(
    random_backbone, method, train_tail, first
):
    backbone = random_backbone("efficientnet_lite0")
    plan = make_plan(backbone, method=method, blocks=2, train_tail=train_tail)
    assert backbone.steps[first_trained_step(backbone.steps, plan)].name == first


def test_tail_alone_is_the_first_step_of_no_blocks(random_backbone):
    backbone = random_backbone("efficientnet_lite0")
    plan = make_plan(backbone, method="mobiletl", blocks=0, train_tail=True)
    assert backbone.steps[first_trained_step(backbone.steps, plan)].name == "conv_head"


@pytest.fixture(scope="module")
def kept_bytes():
    """Method, as published → bytes kept at k = 5 of EfficientNet-Lite0, batch 4 at 64 pixels."""
    backbone = load_backbone("efficientnet_lite0", num_classes=10, image_size=64, weights="none")
    x = torch.randn(4, 3, 64, 64)
    kept = {}
    for method in METHODS:
        model = TransferModel(backbone, make_plan(backbone, method=method, blocks=5), "published")
        with saved_for_backward([*model.model.parameters(), *model.model.buffers(), x]) as saved:
            model(x)
        kept[method] = saved.total
    return kept


def test_methods_keep_a_fraction_of_stock_autograd(kept_bytes):
    assert kept_bytes["blocks"] < 0.15 * kept_bytes["full"]
    assert kept_bytes["mobiletl"] < 0.45 * kept_bytes["blocks"]
    assert kept_bytes["shifts"] < kept_bytes["mobiletl"] / 5


def test_head_keeps_its_input_alone(kept_bytes):
    assert kept_bytes["head"] == 4 * 1280 * 4


@pytest.mark.parametrize("method", ["mobiletl", "shifts", "blocks", "head"])
def test_halves_that_meet_lower_make_the_same_step(random_backbone, images, method):
    """As a device's do whose plan is narrower than its fleet's."""
    logits, gradients = [], []
    for at in (None, 0, 1, 9):
        backbone = random_backbone("efficientnet_lite0")
        backbone.model.double()
        model = TransferModel(backbone, make_plan(backbone, method=method, blocks=2), cut=at)
        x = model(images(4, 32).double())
        x.square().sum().backward()
        logits.append(x)
        gradients.append([p.grad for p in model.trainable_parameters()])
    for at in (1, 2, 3):
        assert_close(logits[at], logits[0], rtol=1e-9, atol=1e-9)
        assert_close(gradients[at], gradients[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", ["mobiletl", "full", "head"])
def test_halves_together_are_the_whole(random_backbone, images, method, training):
    backbone = random_backbone("mobilenet_v3_small")
    model = TransferModel(backbone, make_plan(backbone, method=method, blocks=2)).train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x = images(4, 48)
    assert_close(model.from_features(model.features(x)), model(x), rtol=1e-4, atol=1e-4)


def test_features_follow_the_weights(random_backbone, images):
    """Norms are folded at every call, not once."""
    backbone = random_backbone("mobilenet_v2")
    model = TransferModel(backbone, make_plan(backbone, method="mobiletl", blocks=2))
    before = model.features(images(2, 32))
    backbone.steps[1].module.bias.data += 1  # the stem's norm
    assert not torch.allclose(model.features(images(2, 32)), before)


def test_cut_above_the_first_trained_step_is_refused(random_backbone):
    backbone = random_backbone("efficientnet_lite0")
    plan = make_plan(backbone, method="mobiletl", blocks=2)
    first = first_trained_step(backbone.steps, plan)
    with pytest.raises(
        PlanError, match=f"cut at step {first + 1}, as step {first} is the first that trains"
    ):
        TransferModel(backbone, plan, cut=first + 1)


@pytest.mark.parametrize("stash", ["recompute", "int8"])
def test_unknown_blocks_train_by_stock_autograd(random_backbone, images, stash):
    """All of mixnet's blocks but the first mix kernel sizes; the top ones train as `blocks`."""
    results = []
    for method in ("mobiletl", "blocks"):
        backbone = random_backbone("timm:mixnet_s")
        backbone.model.double()
        plan = make_plan(backbone, method=method, blocks=3)
        model = TransferModel(backbone, plan, stash)
        logits = model(images(4, 32).double())
        logits.square().sum().backward()
        gradients = {n: p.grad for n, p in backbone.model.named_parameters() if p.requires_grad}
        results.append((logits, gradients, snapshot(backbone.model), plan.by_name.keys()))
    assert_close(*[result[:3] for result in results])
    assert results[0][3] == results[1][3]


@pytest.mark.parametrize("name", ["timm:mobilenetv3_large_100", "mobilenet_v3_small"])
def test_tail_that_trains_is_exact(random_backbone, images, name):
    """Its hard-swish has its own derivative, unless the published method is asked for."""
    gradients = {}
    for stash in ("recompute", "published", "stock"):
        backbone = random_backbone(name)
        backbone.model.double()
        method = "blocks" if stash == "stock" else "mobiletl"
        plan = make_plan(backbone, method=method, blocks=0, train_tail=True)
        model = TransferModel(backbone, plan, "recompute" if stash == "stock" else stash)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model(images(4, 48).double()).square().sum().backward()
        gradients[stash] = {
            n: p.grad for n, p in backbone.model.named_parameters() if p.grad is not None
        }
    weight = next(iter(gradients["stock"]))
    assert_close(gradients["recompute"][weight], gradients["stock"][weight])
    assert not torch.allclose(gradients["published"][weight], gradients["stock"][weight])
