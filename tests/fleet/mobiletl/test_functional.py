"""Each operation against PyTorch's own, forward and backward, and what it keeps."""

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.testing import assert_close

from fleet.errors import PlanError
from fleet.measure import saved_for_backward
from fleet.mobiletl.functional import (
    batch_norm,
    frozen_conv2d,
    gradients_from,
    pack_bits,
    shift_norm,
    sign_mask,
    unpack_bits,
)
from tests.many import many

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
LAYOUTS = pytest.mark.parametrize("layout", FORMATS)


def random_map(shape, layout="contiguous", seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=FORMATS[layout]).requires_grad_()


def random_norm(channels, seed=0):
    rng = torch.Generator().manual_seed(seed)
    norm = nn.BatchNorm2d(channels, eps=1e-3)
    norm.weight.data.normal_(1, 0.5, generator=rng)
    norm.bias.data.normal_(generator=rng)
    norm.running_mean.normal_(generator=rng)
    norm.running_var.uniform_(0.1, 2, generator=rng)
    norm.weight.requires_grad_(False)
    return norm


def gradients(y, inputs, seed=1):
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
    return torch.autograd.grad(y, inputs, cotangent)


@many("seed", range(20))
@LAYOUTS
def test_bits_come_back_in_shape_and_layout(seed, layout):
    rng = np.random.default_rng(seed)
    mask = random_map(tuple(rng.integers(1, 8, size=4).tolist()), layout, seed).detach() > 0
    bits = pack_bits(mask)
    in_memory = mask.as_strided((mask.numel(),), (1,)).numpy()
    assert_close(bits, torch.from_numpy(np.packbits(in_memory, bitorder="little")))
    back = unpack_bits(bits, mask)
    assert back.dtype == torch.bool and back.stride() == mask.stride()
    assert torch.equal(back, mask)


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 64, 65])
@pytest.mark.parametrize("value", [False, True])
def test_bits_of_any_length_and_of_one_value(numel, value):
    mask = torch.full((numel,), value)
    bits = pack_bits(mask)
    assert bits.dtype == torch.uint8 and len(bits) == -(-numel // 8)
    assert torch.equal(unpack_bits(bits, mask), mask)


def test_bits_of_every_byte():
    every = torch.arange(256, dtype=torch.uint8)
    mask = torch.from_numpy(np.unpackbits(every.numpy(), bitorder="little")).bool()
    assert torch.equal(pack_bits(mask), every)
    assert torch.equal(unpack_bits(every, mask), mask)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.Hardswish(), nn.SiLU()], ids=repr)
@LAYOUTS
def test_sign_mask_is_the_activation(activation, layout):
    x = random_map((2, 3, 5, 7), layout)
    y = sign_mask(4 * x, activation)
    assert torch.equal(y, activation(4 * x))
    assert y.stride() == x.stride()


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6()], ids=repr)
@LAYOUTS
def test_sign_mask_is_the_exact_derivative_of_relus(activation, layout):
    x = random_map((2, 3, 5, 7), layout)
    assert_close(
        gradients(sign_mask(4 * x, activation), x), gradients(activation(4 * x), x), rtol=0, atol=0
    )


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6()], ids=repr)
def test_sign_mask_agrees_with_autograd_at_the_corners(activation):
    corners = torch.tensor([0.0, -0.0, 6.0, 0.0, 6.0]).repeat(3)
    below, above = torch.full_like(corners, -torch.inf), torch.full_like(corners, torch.inf)
    x = torch.cat([corners, corners.nextafter(below), corners.nextafter(above)])
    x = x.view(1, 1, 5, 9).requires_grad_()
    assert torch.equal(*gradients(sign_mask(x, activation), x), *gradients(activation(x), x))


@pytest.mark.parametrize("activation", [nn.Hardswish(), nn.SiLU()], ids=repr)
def test_sign_mask_of_smooth_activations_is_one_above_zero(activation):
    x = random_map((2, 3, 5, 7))
    (ours,) = torch.autograd.grad(sign_mask(x, activation).square().sum(), x)
    assert_close(ours, 2 * activation(x) * (x > 0))


@pytest.mark.parametrize("inplace", [False, True])
def test_sign_mask_leaves_its_input_alone(inplace):
    x = random_map((2, 3, 4, 4)).detach()
    before = x.clone()
    sign_mask(x, nn.ReLU6(inplace=inplace))
    assert torch.equal(x, before)


def test_sign_mask_takes_a_map_with_gaps_in_memory():
    wide = random_map((2, 6, 4, 10))
    x = wide[:, 1:4, :, ::2]
    assert_close(gradients(sign_mask(x, nn.ReLU()), wide), gradients(F.relu(x), wide))


@LAYOUTS
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 8, 4, 4), (3, 5, 1, 1)])
def test_sign_mask_keeps_one_bit_an_element(shape, layout):
    x = random_map(shape, layout)
    with saved_for_backward() as saved:
        sign_mask(x, nn.ReLU6())
    assert saved.total == -(-x.numel() // 8)


@many("seed", range(5))
@LAYOUTS
def test_shift_norm_is_batch_norm_in_eval_mode_and_its_gradients(seed, layout):
    x, norm = random_map((4, 6, 5, 3), layout, seed), random_norm(6, seed)
    y, expected = shift_norm(x, norm), norm.eval()(x)
    assert torch.equal(y, expected)
    assert_close(gradients(y, (x, norm.bias)), gradients(expected, (x, norm.bias)))


def test_shift_norm_keeps_one_float_a_channel():
    x, norm = random_map((4, 6, 5, 3)), random_norm(6)
    with saved_for_backward() as saved:
        shift_norm(x, norm)
    assert saved.total == 6 * 4


def test_shift_norm_gives_only_the_gradients_that_are_wanted():
    x, norm = random_map((4, 6, 5, 3)), random_norm(6)
    shift_norm(x.detach(), norm).sum().backward()
    assert x.grad is None and norm.bias.grad is not None
    norm.bias.requires_grad_(False).grad = None
    shift_norm(x, norm).sum().backward()
    assert x.grad is not None and norm.bias.grad is None


def test_shift_norm_leaves_the_statistics_alone():
    norm = random_norm(6)
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    shift_norm(random_map((4, 6, 5, 3)), norm).sum().backward()
    assert all(torch.equal(norm.state_dict()[name], before[name]) for name in before)


def test_shift_norm_refuses_a_scale_that_trains():
    norm = random_norm(6)
    norm.weight.requires_grad_()
    with pytest.raises(PlanError, match="cannot train a norm's scale; freeze it or use batch_norm"):
        shift_norm(random_map((4, 6, 5, 3)), norm)


def test_batch_norm_is_the_module_in_training_mode():
    x, ours, theirs = random_map((4, 6, 5, 3)), random_norm(6), random_norm(6).train()
    ours.weight.requires_grad_(), theirs.weight.requires_grad_()
    y, expected = batch_norm(x, ours.eval()), theirs(x)
    assert torch.equal(y, expected)
    assert_close(
        gradients(y, (x, ours.weight, ours.bias)),
        gradients(expected, (x, theirs.weight, theirs.bias)),
    )
    assert torch.equal(ours.running_mean, theirs.running_mean)
    assert torch.equal(ours.running_var, theirs.running_var)
    assert ours.num_batches_tracked == 0


CONVS = {
    "pointwise": dict(kernel_size=1),
    "3×3": dict(kernel_size=3, padding=1),
    "strided": dict(kernel_size=3, stride=2, padding=1),
    "strided without padding": dict(kernel_size=3, stride=2),
    "depthwise 5×5": dict(kernel_size=5, stride=2, padding=2, groups=8),
    "grouped": dict(kernel_size=3, groups=4),
    "dilated": dict(kernel_size=3, dilation=2, padding=(2, 1), groups=8),
}


def frozen_conv(options):
    torch.manual_seed(0)
    return nn.Conv2d(8, 8, bias=False, **options).requires_grad_(False)


@pytest.mark.parametrize("options", CONVS.values(), ids=CONVS)
@pytest.mark.parametrize("size", [8, 9])
@LAYOUTS
def test_frozen_conv_is_the_conv_and_its_input_gradient(options, size, layout):
    x, conv = random_map((2, 8, size, size), layout), frozen_conv(options)
    y, expected = frozen_conv2d(x, conv), conv(x)
    assert torch.equal(y, expected)
    assert_close(gradients(y, x), gradients(expected, x))


@pytest.mark.parametrize("options", CONVS.values(), ids=CONVS)
def test_frozen_conv_keeps_nothing_but_its_weight(options):
    x, conv = random_map((2, 8, 9, 9)), frozen_conv(options)
    with saved_for_backward() as with_weight:
        frozen_conv2d(x, conv)
    with saved_for_backward([conv.weight]) as beyond:
        frozen_conv2d(x, conv)
    assert with_weight.total == conv.weight.nbytes
    assert beyond.total == 0


@pytest.mark.parametrize("bias", [False, True])
def test_frozen_conv_refuses_one_that_trains_or_has_a_bias(bias):
    conv = nn.Conv2d(8, 8, 1, bias=bias)
    if bias:
        conv.requires_grad_(False)
    with pytest.raises(PlanError, match="takes a conv that is frozen and has no bias"):
        frozen_conv2d(random_map((2, 8, 4, 4)), conv)


def test_gradients_from_a_gradient_are_autograds():
    x, w = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(3, 1, 1, requires_grad=True)
    y = (x * w).sigmoid()
    d = torch.randn_like(y)
    theirs = torch.autograd.grad(y, [x, w], d, retain_graph=True)
    with torch.no_grad():
        ours = gradients_from(y, d, [x, w])
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
