"""A conv with its norm folded in against the two of them, in float64."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch.testing import assert_close

from fleet.measure import allocator_peak
from fleet.mobiletl.convolution import Convolution
from tests.many import many

CONVS = {  # name → conv
    "pointwise": lambda: nn.Conv2d(6, 10, 1, bias=False),
    "pointwise-stride-2": lambda: nn.Conv2d(6, 10, 1, stride=2, bias=False),
    "depthwise-3": lambda: depthwise(3),
    "depthwise-3-stride-2": lambda: depthwise(3, stride=2),
    "depthwise-3-dilation-2": lambda: depthwise(3, dilation=2),
    "depthwise-5": lambda: depthwise(5),
    "depthwise-5-stride-2": lambda: depthwise(5, stride=2),
    "depthwise-5-dilation-2": lambda: depthwise(5, dilation=2),
    "depthwise-5-stride-2-dilation-2": lambda: depthwise(5, stride=2, dilation=2),
    "depthwise-3×5": lambda: nn.Conv2d(6, 6, (3, 5), padding=(1, 2), groups=6, bias=False),
    "depthwise-3-doubled": lambda: nn.Conv2d(6, 12, 3, padding=1, groups=6, bias=False),
    "depthwise-5-doubled": lambda: nn.Conv2d(6, 12, 5, padding=2, groups=6, bias=False),
    "dense-5-of-one-channel": lambda: nn.Conv2d(1, 6, 5, padding=2, bias=False),
    "dense-3": lambda: nn.Conv2d(6, 10, 3, padding=1, bias=False),
    "same-3-stride-2": lambda: Conv2dSame(6, 6, 3, stride=2, groups=6, bias=False),
    "same-5": lambda: Conv2dSame(6, 6, 5, groups=6, bias=False),
    "same-5-stride-2": lambda: Conv2dSame(6, 6, 5, stride=2, groups=6, bias=False),
    "same-pointwise-stride-2": lambda: Conv2dSame(6, 10, 1, stride=2, bias=False),
}
SIZES = [(1, 1), (2, 2), (2, 7), (8, 8), (9, 6)]
each_conv = pytest.mark.parametrize("name", CONVS)
each_size = many("size", SIZES)
with_and_without_norm = many("with_norm", [True, False])


def depthwise(kernel, stride=1, dilation=1):
    return nn.Conv2d(6, 6, kernel, stride, dilation * (kernel // 2), dilation, groups=6, bias=False)


def random_norm(channels):
    norm = nn.BatchNorm2d(channels, eps=1e-3).double().eval()
    for tensor in (norm.weight.data, norm.running_var):
        tensor.uniform_(0.5, 1.5)
    for tensor in (norm.bias.data, norm.running_mean):
        tensor.normal_()
    return norm


def make(name, with_norm=True):
    """A conv and perhaps a norm, in float64."""
    torch.manual_seed(0)
    conv = CONVS[name]().double()
    return conv, random_norm(conv.out_channels) if with_norm else None


def batches(conv, norm, size, number=3):
    """Inputs of different lengths, and gradients at what becomes of them."""
    for n in range(1, number + 1):
        x = torch.randn(n, conv.in_channels, *size, dtype=torch.float64)
        x = x.contiguous(memory_format=torch.channels_last)
        yield x, torch.randn_like(stock(conv, norm, x))


def stock(conv, norm, x):
    y = conv(x)
    if norm is None:
        return y
    mean, var = norm.running_mean, norm.running_var
    return F.batch_norm(y, mean, var, norm.weight, norm.bias, training=False, eps=norm.eps)


@each_conv
@each_size
@with_and_without_norm
def test_folded_is_the_conv_and_then_the_norm(name, size, with_norm):
    conv, norm = make(name, with_norm)
    with torch.no_grad():
        folded = Convolution(conv, norm)
        for x, _ in batches(conv, norm, size):
            assert_close(folded.forward(x), stock(conv, norm, x))


@each_conv
@each_size
@with_and_without_norm
def test_gradients_of_several_chunks_are_autograds_of_all(name, size, with_norm):
    conv, norm = make(name, with_norm)
    pairs = list(batches(conv, norm, size))
    with torch.no_grad():
        folded = Convolution(conv, norm)
        d_inputs = [folded.backward(d, x, wants_input=True) for x, d in pairs]
        d_weight, d_shift = folded.gradients()
    for (x, d), d_input in zip(pairs, d_inputs, strict=True):
        leaf = x.clone().requires_grad_()
        stock(conv, norm, leaf).backward(d)
        assert_close(d_input, leaf.grad)
    assert_close(d_weight, conv.weight.grad)
    if norm is None:
        assert d_shift is None
    else:
        assert_close(d_shift, norm.bias.grad)


@each_conv
def test_a_frozen_weight_gets_no_gradient_and_the_others_stay(name):
    conv, norm = make(name)
    ((x, d),) = batches(conv, norm, (5, 5), number=1)
    with torch.no_grad():
        learning = Convolution(conv, norm)
        expected = learning.backward(d, x, wants_input=True), learning.gradients()[1]
        conv.weight.requires_grad_(False)
        frozen = Convolution(conv, norm)
        d_input = frozen.backward(d, x, wants_input=True)
    d_weight, d_shift = frozen.gradients()
    assert d_weight is None
    assert_close((d_input, d_shift), expected)


@each_conv
def test_an_input_that_nobody_wants_costs_no_gradient(name):
    conv, norm = make(name)
    ((x, d),) = batches(conv, norm, (5, 5), number=1)
    with torch.no_grad():
        both, weight_alone = Convolution(conv, norm), Convolution(conv, norm)
        both.backward(d, x, wants_input=True)
        assert weight_alone.backward(d, x, wants_input=False) is None
    assert_close(weight_alone.gradients(), both.gradients())


@pytest.mark.parametrize("name", ["pointwise", "pointwise-stride-2", "depthwise-3", "same-5"])
def test_nothing_that_it_is_given_changes(name):
    conv, norm = make(name)
    ((x, d),) = batches(conv, norm, (5, 5), number=1)
    given = [x, d, conv.weight, *norm.state_dict(keep_vars=True).values()]
    before = [tensor.clone() for tensor in given]
    with torch.no_grad():
        folded = Convolution(conv, norm)
        folded.forward(x)
        folded.backward(d, x, wants_input=True)
        folded.gradients()
    assert all(torch.equal(now, old) for now, old in zip(given, before, strict=True))
    assert conv.weight.grad is None and norm.bias.grad is None


def test_it_follows_the_weights_of_the_moment():
    conv, norm = make("depthwise-3")
    with torch.no_grad():
        ((x, _),) = batches(conv, norm, (5, 5), number=1)
        conv.weight.mul_(2)
        norm.running_mean.add_(1)
        assert_close(Convolution(conv, norm).forward(x), stock(conv, norm, x))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("images", [1, 2, 15, 16, 17])
def test_dilation_changes_no_pointwise_conv(images, stride):
    """The detour is taken in float32, by the kernels that training takes."""
    torch.manual_seed(images)
    conv = nn.Conv2d(24, 40, 1, stride=stride, bias=False)
    x = torch.randn(images, 24, 7, 7).contiguous(memory_format=torch.channels_last)
    leaf = x.clone().requires_grad_()
    y = F.conv2d(leaf, conv.weight, stride=stride)
    d = torch.randn_like(y)
    y.backward(d)
    with torch.no_grad():
        detour = Convolution(conv)
        assert_close(detour.forward(x), y)
        assert_close(detour.backward(d, x, wants_input=True), leaf.grad)
    expected = torch.autograd.grad(F.conv2d(x, conv.weight, stride=stride), conv.weight, d)[0]
    assert_close(detour.gradients()[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kernel", "side"), [(3, 1), (3, 2), (5, 1), (5, 2), (5, 7)])
def test_gradient_of_a_depthwise_weight_takes_little_room(kernel, side):
    """oneDNN's own takes 258 times the weight's for all of these maps but those of one pixel."""
    conv = nn.Conv2d(576, 576, kernel, padding=kernel // 2, groups=576, bias=False)
    x = torch.randn(2, 576, side, side).contiguous(memory_format=torch.channels_last)
    d = torch.randn_like(x)
    with torch.no_grad():
        folded = Convolution(conv)
        with allocator_peak() as peak:
            folded.backward(d, x, wants_input=True)
    assert peak.bytes < 10 * (conv.weight.nbytes + x.nbytes), peak.bytes / conv.weight.nbytes
    assert side > 1 or peak.bytes < 10 * conv.weight.nbytes


def test_one_pixel_out_of_a_depthwise_conv_is_no_loop_over_groups():
    """PyTorch would run one group after the other: 30,000 operations, not 30."""
    conv = nn.Conv2d(480, 480, 5, padding=2, groups=480, bias=False)
    x, d = torch.randn(8, 480, 1, 1), torch.randn(8, 480, 1, 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        Convolution(conv).backward(d, x, False)
    assert len(profile.events()) < 300
