"""The chain of steps and its blocks, held against what each library says of its own models."""

import logging
from functools import partial

import pytest
import timm
import torch
import torch.nn as nn
from torch.testing import assert_close
from torchvision import models
from torchvision.models.mobilenetv2 import InvertedResidual as MobileNetV2Block

from fleet import structure
from fleet.errors import ConfigError
from fleet.structure import (
    InvertedResidual,
    Step,
    Unit,
    UnknownBlock,
    eval_forward,
    parts_of,
    trace,
)

BLOCKS = {  # how many the papers' tables have; for V4 those above the stem's plain convolutions
    "mobilenet_v2": 17,
    "mobilenet_v3_small": 11,
    "mobilenet_v3_large": 15,
    "mnasnet1_0": 16,
    "efficientnet_b0": 16,
    "timm:tf_efficientnet_lite0": 16,
    "timm:mobilenetv2_100": 17,
    "timm:mobilenetv3_large_100": 15,
    "timm:fbnetc_100": 21,
    "timm:mobilenetv4_conv_small": 12,
}
KINDS = {
    "InvertedResidual",
    "_InvertedResidual",
    "MBConv",
    "DepthwiseSeparableConv",
    "UniversalInvertedResidual",
}
SHORTCUT_FLAGS = ("use_res_connect", "apply_residual", "has_skip")


def build(name):
    torch.manual_seed(0)
    if name.startswith("timm:"):
        return timm.create_model(name.removeprefix("timm:"), num_classes=5)
    return models.get_model(name, weights=None, num_classes=5)


@pytest.fixture(scope="module", params=BLOCKS)
def traced(request):
    """Name, model and steps of each backbone that the project names."""
    model = build(request.param)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.3)
            part.weight.data.uniform_(0.5, 1.5)
    return request.param, model, trace(model)


class Chain(nn.Module):
    """A stem, blocks and a head, in a forward pass that a test replaces."""

    def __init__(self, *blocks, head=None):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.blocks = nn.ModuleList(blocks or [MobileNetV2Block(8, 8, 1, 2) for _ in range(2)])
        self.head = head or nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def test_blocks_are_the_model_s_own_in_order(traced):
    name, model, steps = traced
    found = [step.block.name for step in steps if step.block]
    assert found == [n for n, part in model.named_modules() if type(part).__name__ in KINDS]
    assert len(found) == BLOCKS[name]


def test_residual_is_what_the_block_says_of_itself(traced):
    _, _, steps = traced
    for block in (step.block for step in steps if step.block):
        (flag,) = [f for f in SHORTCUT_FLAGS if hasattr(block.module, f)]
        assert block.residual == bool(getattr(block.module, flag)), block.name


def test_chain_of_steps_is_the_model(traced):
    _, model, steps = traced
    x = torch.randn(2, 3, 96, 64)
    with torch.inference_mode():
        y = x
        for step in steps:
            y = step.forward(y)
        assert torch.equal(y, model(x))


def test_units_of_a_block_are_the_block(traced):
    _, _, steps = traced
    for block in (step.block for step in steps if step.block):
        x = torch.randn(2, block.units[0].conv.in_channels, 10, 10)
        with torch.inference_mode():
            y = x
            for unit in block.units:
                y = eval_forward(unit, y)
            assert_close(y + x if block.residual else y, block.module(x.clone()))


def test_every_tensor_belongs_to_one_step(traced):
    _, model, steps = traced
    tensors = [f"{s.name}.{n}" for s in steps if s.module for n in s.module.state_dict()]
    assert sorted(tensors) == sorted(model.state_dict())


def test_parts_group_what_is_around_the_blocks_into_units(traced):
    _, model, steps = traced
    parts = list(parts_of(steps))
    blocks = [part for part in parts if isinstance(part, InvertedResidual)]
    units = [part for part in parts if isinstance(part, Unit)]
    inside = {part for block in blocks for part in block.module.modules()}
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m not in inside]
    assert [unit.norm for unit in units] == norms
    assert isinstance(parts[-1], Step) and isinstance(parts[-1].module, nn.Linear)
    with torch.inference_mode():
        y = x = torch.randn(2, 3, 64, 64)
        for part in parts:
            if isinstance(part, InvertedResidual):
                y = part.module(y)
            else:
                y = eval_forward(part, y) if isinstance(part, Unit) else part.forward(y)
        assert_close(y, model(x))


def test_model_without_inverted_residuals_is_refused():
    with pytest.raises(ConfigError, match=r"ResNet has no inverted-residual blocks.*mobilenet_v2"):
        trace(models.resnet18())


def test_unknown_blocks_above_the_first_known_one_count_as_blocks(caplog):
    structure._warn.cache_clear()  # other tests may have read the model before
    with caplog.at_level(logging.WARNING):
        steps = trace(timm.create_model("mixnet_s"))
        trace(timm.create_model("mixnet_s"))
    blocks = [step.block for step in steps if step.block]
    assert len(blocks) == 16 and sum(isinstance(b, UnknownBlock) for b in blocks) == 15
    (record,) = caplog.records  # of two models: it is said once
    assert (
        "EfficientNet has 15 blocks that are no inverted residuals (blocks.1.0, blocks.1.1, "
        "blocks.2.0, …): stock autograd trains these, and keeps more"
    ) in record.getMessage()


def test_model_that_is_no_chain_is_refused():
    class Branching(Chain):
        def forward(self, x):
            x = self.stem(x)
            return self.head((self.blocks[1](self.blocks[0](x)) + x).mean((2, 3)))

    with pytest.raises(ConfigError, match="Branching is no plain chain of blocks: add takes"):
        trace(Branching())


def test_model_whose_forward_depends_on_the_image_is_refused():
    class Fickle(Chain):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else super().forward(-x)

    with pytest.raises(ConfigError, match="Fickle cannot be traced"):
        trace(Fickle())


@pytest.mark.parametrize("factor", [2.0, -1.0])
def test_block_that_does_something_else_is_no_inverted_residual(factor):
    class Scaled(MobileNetV2Block):
        def forward(self, x):
            return x + factor * self.conv(x)

    with pytest.raises(ConfigError, match="Chain has no inverted-residual blocks"):
        trace(Chain(Scaled(8, 8, 1, 2)))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("zero_norm", [False, True])
def test_shortcut_is_found_by_running_the_block(stride, zero_norm):
    block = MobileNetV2Block(8, 8, stride, 2)
    if zero_norm:  # a usual start, at which the branch gives nothing
        nn.init.zeros_(block.conv[-1].weight)
    steps = trace(Chain(block))
    assert [step.block.residual for step in steps if step.block] == [stride == 1]


def test_drop_path_and_squeeze_excite_are_found():
    blocks = [step.block for step in trace(build("efficientnet_b0")) if step.block]
    assert all(block.drop_path is block.module.stochastic_depth for block in blocks)
    assert all(
        [unit.squeeze_excite is not None for unit in block.units]
        == [False] * (n - 2) + [True, False]
        for block in blocks
        for n in [len(block.units)]
    )


def test_tracing_leaves_weights_and_statistics_alone():
    model = build("mobilenet_v3_small").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trace(model)
    assert not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_norm_without_running_statistics_makes_no_unit():
    norm = partial(nn.BatchNorm2d, track_running_stats=False)
    with pytest.raises(ConfigError, match="no inverted-residual blocks"):
        trace(Chain(MobileNetV2Block(8, 8, 1, 2, norm_layer=norm)))
