"""FLOPs against counts made by hand: from geometry, from modules, and published ones."""

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from fleet.measure import count_flops


def flops_of(function, *args):
    with count_flops() as count:
        function(*args)
    return count.total


@st.composite
def convs(draw):
    """A random conv and an input that fits."""
    groups = draw(st.integers(1, 4))
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 5)))
    dilation = draw(st.integers(1, 2))
    conv = nn.Conv2d(
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 3)),
        kernel,
        stride=draw(st.tuples(st.integers(1, 2), st.integers(1, 3))),
        padding=draw(st.integers(0, 2)),
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
    )
    sizes = (draw(st.integers(dilation * (k - 1) + 1, 11)) for k in kernel)
    return conv, torch.randn(draw(st.integers(1, 3)), conv.in_channels, *sizes)


def patches(conv, x):
    """How many patches of x, over the batch, the filters of a conv see."""
    columns = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    return columns.shape[0] * columns.shape[2]


@settings(max_examples=60, deadline=None)
@given(convs())
def test_conv_is_patches_times_weights(conv_and_input):
    """Forward each patch meets each weight once, and in either part of backward again."""
    conv, x = conv_and_input
    once = 2 * patches(conv, x) * conv.weight.numel()
    assert flops_of(conv, x) == once
    frozen_input = conv(x).sum()
    assert flops_of(frozen_input.backward) == once
    both = conv(x.requires_grad_()).sum()
    assert flops_of(both.backward) == 2 * once
    conv.weight.requires_grad_(False)
    frozen_weight = conv(x).sum()
    assert flops_of(frozen_weight.backward) == once


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_conv_is_the_backward_of_a_conv(groups):
    conv = nn.Conv2d(4, 6, 3, stride=2, groups=groups)
    x = torch.randn(2, 4, 9, 9)
    transposed = nn.ConvTranspose2d(6, 4, 3, stride=2, groups=groups)
    expected = 2 * patches(conv, x) * conv.weight.numel()
    assert flops_of(transposed, torch.randn(2, 6, 4, 4)) == expected
    y = transposed(torch.randn(2, 6, 4, 4)).sum()
    assert flops_of(y.backward) == expected


@settings(max_examples=30, deadline=None)
@given(*(st.integers(1, 6) for _ in range(4)))
def test_products_are_rows_times_columns_times_what_is_summed(b, m, k, n):
    left, right = torch.randn(b, m, k), torch.randn(b, k, n)
    one = 2 * m * k * n
    assert flops_of(torch.mm, left[0], right[0]) == one
    assert flops_of(torch.addmm, torch.randn(m, n), left[0], right[0]) == one
    assert flops_of(torch.bmm, left, right) == b * one
    assert flops_of(torch.baddbmm, torch.randn(b, m, n), left, right) == b * one
    assert flops_of(torch.matmul, left, right[0]) == b * one
    assert flops_of(torch.mv, left[0], right[0, :, 0]) == 2 * m * k
    assert flops_of(torch.dot, left[0, 0], right[0, :, 0]) == 2 * k
    assert flops_of(F.linear, left, right[0].T, torch.randn(n)) == b * one
    with torch.inference_mode():
        assert flops_of(F.linear, left, right[0].T, torch.randn(n)) == b * one


def test_same_under_inference_mode_and_without_memory():
    conv, x = nn.Conv2d(4, 8, 3, groups=2), torch.randn(2, 4, 9, 9)
    expected = flops_of(conv, x)
    with torch.inference_mode():
        assert flops_of(conv, x) == expected
    assert flops_of(conv.to("meta"), x.to("meta")) == expected > 0


def test_autograd_functions_count_both_ways():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x @ x

        @staticmethod
        def backward(ctx, d):
            (x,) = ctx.saved_tensors
            return d @ x.T + x.T @ d

    x = torch.randn(5, 5, requires_grad=True)
    with count_flops() as count:
        y = Square.apply(x).sum()
        assert count.total == 2 * 5**3
        y.backward()
    assert count.total == 3 * 2 * 5**3


def test_what_is_neither_conv_nor_product_counts_nothing():
    x = torch.randn(2, 4, 8, 8)
    layers = nn.Sequential(nn.BatchNorm2d(4), nn.Hardswish(), nn.AvgPool2d(2))
    assert flops_of(lambda: layers(x).exp().sum().backward()) == 0


def test_torch_forgets_groups_in_backward():
    """Why this module is there; if it fails, PyTorch has mended its own counter."""
    for groups, ratio in ((1, 1), (8, 4.5)):
        y = nn.Conv2d(8, 8, 3, groups=groups)(torch.randn(1, 8, 9, 9, requires_grad=True)).sum()
        with FlopCounterMode(display=False) as theirs:
            y.backward(retain_graph=True)
        assert theirs.get_total_flops() == ratio * flops_of(y.backward)


def published(weights):
    """Millions of multiply-adds, as torchvision tells them with its weights."""
    return 1e3 * weights.DEFAULT.meta["_ops"]


MODELS = {
    "mobilenet_v2": (models.mobilenet_v2, published(models.MobileNet_V2_Weights)),
    "mobilenet_v3_large": (
        models.mobilenet_v3_large,
        published(models.MobileNet_V3_Large_Weights),
    ),
    # EfficientNet-B0 without its gates, which are 0.6 of its 386.
    "tf_efficientnet_lite0": (
        lambda: timm.create_model("tf_efficientnet_lite0"),
        published(models.EfficientNet_B0_Weights) - 0.6,
    ),
}


def layer_by_layer(model, x):
    """(module, multiply-adds) of every conv and linear in the order in which they run."""
    found = []

    def hook(module, inputs, output):
        if isinstance(module, nn.Conv2d):
            high, wide = module.kernel_size
            per_output = module.in_channels // module.groups * high * wide
        else:
            per_output = module.in_features
        found.append((module, output.numel() * per_output))

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(hook) for layer in layers]
    with torch.no_grad():
        model(x)
    for handle in hooks:
        handle.remove()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_models_against_their_layers_and_against_what_is_published(name):
    build, millions = MODELS[name]
    model, x = build().eval(), torch.randn(1, 3, 224, 224)
    by_hand = [macs for _, macs in layer_by_layer(model, x)]
    with torch.no_grad():
        counted = flops_of(model, x)
    assert counted == 2 * sum(by_hand)
    assert counted / 2e6 == pytest.approx(millions, abs=1)


@pytest.mark.parametrize("name", MODELS)
def test_full_backward_is_twice_forward_but_for_the_image_s_gradient(name):
    model, x = MODELS[name][0]().train(), torch.randn(2, 3, 64, 64)
    (_, stem), *others = layer_by_layer(model, x)
    loss = model(x).sum()
    assert flops_of(loss.backward) == 2 * (stem + 2 * sum(macs for _, macs in others))
