"""Gradients against autograd on the original modules, and bytes against the paper's count."""

import copy
from functools import partial

import pytest
import torch
import torch.nn as nn
from torch.testing import assert_close
from torchvision.models.mobilenetv2 import InvertedResidual as MobileNetV2Block
from torchvision.models.mobilenetv3 import InvertedResidual as MobileNetV3Block
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.ops import StochasticDepth

from fleet.measure import saved_for_backward
from fleet.mobiletl import TransferModel
from fleet.mobiletl.blocks import block_forward
from fleet.plan import STASHES, make_plan
from fleet.structure import trace

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
    "timm:lcnet_100",
]


class OneAboveZero(nn.Module):
    """An activation with the derivative 1[x > 0], by autograd's own means."""

    def __init__(self, activation):
        super().__init__()
        self.activation = type(activation)()

    def forward(self, x):
        ramp = torch.where(x > 0, x, 0)
        return ramp + (self.activation(x) - ramp).detach()


def with_published_derivatives(model):
    """Replace the smooth activations that follow a norm; those of gates stay."""
    for parent in list(model.modules()):
        previous = parent
        for name, child in list(parent.named_children()):
            after_norm = any(isinstance(part, nn.BatchNorm2d) for part in (parent, previous))
            if after_norm and isinstance(child, nn.Hardswish | nn.SiLU):
                setattr(parent, name, OneAboveZero(child))
            previous = child
    return model


def norms_of(module):
    return [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]


def reference(backbone, k, train_tail=False, exact=False):
    """The original model in eval mode, but for the last norm of each block that trains."""
    model = copy.deepcopy(backbone.model).eval()
    tops = [model.get_submodule(block.name) for block in backbone.blocks[-k:]]
    last_norms = [norms_of(top)[-1] for top in tops]
    if train_tail:
        everything = norms_of(model)
        last_norms += everything[everything.index(last_norms[-1]) + 1 :]
    for norm in last_norms:
        norm.train()
    for top in tops:
        for part in top.modules():
            if isinstance(part, StochasticDepth):
                part.train()
    return model if exact else with_published_derivatives(model)


def backward(model, x):
    torch.manual_seed(3)
    labels = torch.arange(len(x)) % 5
    loss = nn.functional.cross_entropy(model(x), labels)
    loss.backward()
    return loss.detach()


def check_same_step(backbone, plan, model, x, stash="published"):
    ours = TransferModel(backbone, plan, stash)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in plan.by_name)
    assert_close(backward(ours, x), backward(model, x))
    theirs = dict(model.named_parameters())
    for name, parameter in backbone.model.named_parameters():
        if name in plan.by_name:
            assert parameter.grad.abs().max() > 0, name
            assert_close(parameter.grad, theirs[name].grad, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert parameter.grad is None, name
    buffers = dict(model.named_buffers())
    for name, buffer in backbone.model.named_buffers():
        if not name.endswith("num_batches_tracked"):
            assert_close(buffer, buffers[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def exact_backbone(random_backbone):
    """Function (name) → a backbone in float64, so that rounding hides nothing."""

    def build(name):
        backbone = random_backbone(name)
        backbone.model.double()
        return backbone

    return build


SLOW = {
    # Of a kind that another here is of.
    *("mobilenet_v3_large", "timm:mobilenetv2_100"),
    # Whose step is held against the original with the tail, or with every block, below.
    *("mnasnet1_0", "timm:mobilenetv3_large_100", "efficientnet_lite0"),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in BACKBONES],
)
def test_step_is_autograds_on_the_original(exact_backbone, images, name):
    backbone, x = exact_backbone(name), images(4, 48).double()
    plan = make_plan(backbone, method="mobiletl", blocks=2)
    check_same_step(backbone, plan, reference(backbone, k=2), x)


@pytest.mark.parametrize(
    "name", ["mobilenet_v2", "mobilenet_v3_small", "mnasnet1_0", "timm:mobilenetv3_large_100"]
)
def test_step_with_the_tail_is_autograds_on_the_original(exact_backbone, images, name):
    backbone, x = exact_backbone(name), images(4, 48).double()
    plan = make_plan(backbone, method="mobiletl", blocks=1, train_tail=True)
    check_same_step(backbone, plan, reference(backbone, k=1, train_tail=True), x)


def test_step_of_every_block_is_autograds_on_the_original(exact_backbone, images):
    """All strides and widths, and TensorFlow's padding, at once."""
    backbone, x = exact_backbone("efficientnet_lite0"), images(4, 48).double()
    plan = make_plan(backbone, method="mobiletl", blocks=16)
    check_same_step(backbone, plan, reference(backbone, k=16), x)


@pytest.mark.parametrize("stash", STASHES)
def test_blocks_that_end_in_an_activation_train_exactly_unless_as_published(
    exact_backbone, images, stash
):
    backbone, x = exact_backbone("timm:lcnet_100"), images(4, 48).double()
    plan = make_plan(backbone, method="mobiletl", blocks=2)
    model = reference(backbone, k=2, exact=stash != "published")
    check_same_step(backbone, plan, model, x, stash)


@pytest.mark.parametrize(
    "name", ["efficientnet_lite0", "mnasnet1_0", "timm:mobilenetv4_conv_small"]
)
def test_shifts_step_is_autograds_on_the_model_in_eval_mode(exact_backbone, images, name):
    backbone, x = exact_backbone(name), images(4, 48).double()
    plan = make_plan(backbone, method="shifts", blocks=len(backbone.blocks))
    model = copy.deepcopy(backbone.model).eval()
    check_same_step(backbone, plan, model, x)


def test_stock_blocks_step_is_autograds_with_their_norms_in_training_mode(exact_backbone, images):
    backbone, x = exact_backbone("mobilenet_v2"), images(4, 48).double()
    plan = make_plan(backbone, method="blocks", blocks=2)
    model = copy.deepcopy(backbone.model).eval()
    for block in backbone.blocks[-2:]:
        model.get_submodule(block.name).train()
    check_same_step(backbone, plan, model, x)


def test_full_step_is_autograds_in_training_mode(exact_backbone, images):
    backbone, x = exact_backbone("mobilenet_v2"), images(4, 48).double()
    model = copy.deepcopy(backbone.model).train()
    check_same_step(backbone, make_plan(backbone, method="full"), model, x)


def test_drop_path_drops_the_branches_of_residuals_while_training(exact_backbone):
    backbone = exact_backbone("efficientnet_b0")
    model = TransferModel(backbone, make_plan(backbone, method="mobiletl", blocks=2))
    residual, plain = backbone.blocks[-2:]
    assert residual.residual and not plain.residual
    residual.drop_path.p = plain.drop_path.p = 1.0
    x = torch.randn(2, residual.units[0].conv.in_channels, 4, 4, dtype=torch.float64)
    assert torch.equal(block_forward(residual, x), x)
    assert block_forward(plain, x).abs().max() > 0
    model.eval()
    assert not torch.equal(residual.module(x), x)


# Bytes kept for backward, in maps as wide as the block's input (C channels).
CHANNELS, EXPANSION = 32, 6


class OneBlock(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 1)
        self.block = block
        self.head = nn.Linear(CHANNELS, 2)

    def forward(self, x):
        return self.head(self.block(self.stem(x)).mean((2, 3)))


def v2_block():
    return MobileNetV2Block(CHANNELS, CHANNELS, stride=1, expand_ratio=EXPANSION)


def v3_block():
    config = InvertedResidualConfig(
        CHANNELS, 3, EXPANSION * CHANNELS, CHANNELS, True, "HS", 1, 1, 1.0
    )
    return MobileNetV3Block(config, partial(nn.BatchNorm2d, eps=0.001, momentum=0.01))


def maps_kept(block, method):
    """Sizes of what a block keeps, largest first; one map is N·C·H·W floats."""
    traced = next(step.block for step in trace(OneBlock(block)) if step.block)
    x = torch.randn(4, CHANNELS, 28, 28).requires_grad_() * 1
    if method == "stock":
        block.train()
    else:
        for unit in traced.units[:-1]:
            unit.norm.weight.requires_grad_(False)
    with saved_for_backward([*block.parameters(), *block.buffers()]) as saved:
        block(x) if method == "stock" else block_forward(traced, x)
    return sorted((size / x.nbytes for size in saved.storages.values()), reverse=True)


@pytest.mark.parametrize(
    ("block", "stock", "ours", "saving"),
    [(v2_block, 38, 14.4, 0.62), (v3_block, 44, 20.4, 0.54)],
    ids=["MobileNetV2", "MobileNetV3 with squeeze-excite"],
)
def test_block_keeps_what_the_accounting_says(block, stock, ours, saving):
    """What PyTorch really keeps; its in-place ReLU6 saves a hidden copy of its input."""
    theirs, mine = sum(maps_kept(block(), "stock")), sum(maps_kept(block(), "mobiletl"))
    assert theirs == pytest.approx(stock, rel=0.01)
    assert mine == pytest.approx(ours, rel=0.01)
    assert 1 - mine / theirs == pytest.approx(saving, abs=0.005)


def test_paper_s_own_count_of_the_mobilenet_v2_block():
    """The paper counts the block's input and four expanded maps, taking ReLU6 to be free in place.

    Both hidden copies of ReLU6's input and the last norm's input (one map, on
    either side) are left out. So counted, the same block saves 46.5 %; the
    paper gives 46.3 %.
    """
    theirs, mine = maps_kept(v2_block(), "stock"), maps_kept(v2_block(), "mobiletl")
    wide_theirs = [size for size in theirs if size == EXPANSION]
    wide_mine = [size for size in mine if size == EXPANSION]
    masks = [size for size in mine if size == EXPANSION / 32]
    assert (len(wide_theirs), len(wide_mine), len(masks)) == (6, 2, 2)
    counted_theirs = 1 + sum(wide_theirs[:4])
    counted_mine = 1 + sum(wide_mine) + sum(masks)
    assert 1 - counted_mine / counted_theirs == pytest.approx(0.463, abs=0.005)


def test_paper_s_own_count_of_the_mobilenet_v3_block():
    """Hard-swish keeps its input in stock PyTorch and in the paper alike: −53.3 % there."""
    theirs, mine = sum(maps_kept(v3_block(), "stock")), sum(maps_kept(v3_block(), "mobiletl"))
    assert 1 - mine / theirs == pytest.approx(0.533, abs=0.005)


def test_block_whose_convs_are_frozen_keeps_bits_and_vectors():
    block = v2_block()
    traced = next(step.block for step in trace(OneBlock(block)) if step.block)
    for part in block.modules():
        if isinstance(part, nn.Conv2d | nn.BatchNorm2d):
            part.weight.requires_grad_(False)
    x = torch.randn(4, CHANNELS, 28, 28).requires_grad_() * 1
    with saved_for_backward([*block.parameters(), *block.buffers()]) as saved:
        block_forward(traced, x)
    assert saved.total == 2 * EXPANSION * x.nbytes / 32 + (2 * EXPANSION + 1) * CHANNELS * 4
