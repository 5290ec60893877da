"""A frozen tail against its own parts run on the whole batch by stock autograd."""

import pytest
import torch
import torch.nn as nn
from torch.testing import assert_close

from fleet.measure import allocator_peak, saved_for_backward
from fleet.mobiletl.frozen import frozen_tail
from fleet.structure import Step, Unit, eval_forward, parts_of

TAILS = ["efficientnet_lite0", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"]
TAILS += ["mnasnet1_0", "timm:mobilenetv4_conv_small", "timm:lcnet_100"]


@pytest.fixture
def tail(random_backbone):
    """Function (name) → the parts between the top block and the head, in float64, and C."""

    def build(name):
        backbone = random_backbone(name)
        backbone.model.double().eval().requires_grad_(False)
        *parts, _ = parts_of(backbone.steps)
        top = max(i for i, part in enumerate(parts) if hasattr(part, "units"))
        return parts[top + 1 :], parts[top].units[-1].conv.out_channels

    return build


def on_the_whole(parts, x):
    x = x.clone()
    for part in parts:
        x = eval_forward(part, x) if isinstance(part, Unit) else part.forward(x)
    return x


def gradient(y, x):
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return torch.autograd.grad(y, x, cotangent)[0]


def random_map(*shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (2 * x).requires_grad_()


@pytest.mark.parametrize("size", [(2, 3), (14, 14), (25, 16)], ids=str)
@pytest.mark.parametrize("name", TAILS)
def test_tail_and_its_gradient_are_stock_autograds(tail, name, size):
    """In chunks of 65, two and one image."""
    parts, channels = tail(name)
    x = random_map(5, channels, *size)
    y, expected = frozen_tail(parts, x), on_the_whole(parts, x)
    assert_close(y, expected, rtol=1e-9, atol=1e-12)
    assert_close(gradient(y, x), gradient(expected, x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", TAILS)
def test_tail_keeps_its_input_and_nothing_else(tail, name):
    parts, channels = tail(name)
    x = random_map(5, channels, 14, 14)
    with saved_for_backward() as saved:
        frozen_tail(parts, x)
    with saved_for_backward(exclude=[x]) as besides:
        frozen_tail(parts, x)
    assert (saved.total, besides.total) == (x.nbytes, 0)


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.Hardswish(inplace=True)])
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 14, 14)])
def test_activation_in_place_leaves_the_input_alone(activation, shape):
    parts, x = [Step("activation", activation, activation)], random_map(*shape)
    before = x.detach().clone()
    y, expected = frozen_tail(parts, x), on_the_whole(parts, x)
    assert_close(y, expected)
    assert_close(gradient(y, x), gradient(expected, x))
    assert torch.equal(x, before)


def test_input_without_gradient_gives_a_result_without(tail):
    parts, channels = tail("mobilenet_v2")
    assert not frozen_tail(parts, random_map(2, channels, 2, 2).detach()).requires_grad


def test_peak_is_that_of_a_chunk(tail):
    parts, channels = tail("efficientnet_lite0")
    x = random_map(16, channels, 14, 14)

    def peak(forward):
        with allocator_peak() as found:
            gradient(forward(parts, x), x)
        return found.bytes - x.nbytes  # the gradient itself

    peak(frozen_tail)  # the first run of a shape sets oneDNN's caches up
    assert peak(frozen_tail) < 0.3 * peak(on_the_whole)
