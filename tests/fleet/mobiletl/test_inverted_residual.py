"""One function for a whole block, against autograd on the block's own module."""

import copy
import itertools
import re
from functools import cache, partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.testing import assert_close
from torchvision.models.mobilenetv2 import InvertedResidual as MobileNetV2Block
from torchvision.models.mobilenetv3 import InvertedResidual as MobileNetV3Block
from torchvision.models.mobilenetv3 import InvertedResidualConfig

from fleet.backbones import load_backbone
from fleet.data import ImageBatches, load_data
from fleet.errors import ConfigError
from fleet.measure import allocator_peak, saved_for_backward
from fleet.mobiletl import TransferModel
from fleet.mobiletl.inverted_residual import (
    _backward_chunk,
    _convolutions,
    _internal,
    fits,
    inverted_residual,
)
from fleet.mobiletl.prefix import run_prefix
from fleet.mobiletl.stash import keep, restore
from fleet.optim import SGD
from fleet.plan import STASHES, make_plan
from fleet.structure import parts_of, trace

BACKBONES = [
    "efficientnet_lite0",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "mnasnet1_0",
    "timm:mobilenetv4_conv_small",
]
EXACT = ("float32", "recompute")
SMALL_SCALES = (0.0, 1e-5, -1e-5, 0.09, -0.099)  # too small to divide by


def norms_of(module):
    return [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]


def readied(block, seed=0):
    """The block in float64, ready to train, with scales of both signs and all sizes."""
    generator = torch.Generator().manual_seed(seed)
    block.module.double().eval().requires_grad_(True)
    for unit in block.units:
        norm = unit.norm
        norm.running_mean.normal_(0, 0.3, generator=generator)
        norm.running_var.uniform_(0.5, 1.5, generator=generator)
        norm.bias.data.normal_(0, 0.5, generator=generator)
        norm.weight.data.uniform_(0.2, 1.5, generator=generator)
        norm.weight.data *= torch.randn(norm.weight.shape, generator=generator).sign()
        norm.weight.requires_grad_(False)
    norm.weight.data[: len(SMALL_SCALES)] = torch.tensor(SMALL_SCALES)
    norm.weight.requires_grad_(True)
    if block.drop_path is not None:
        block.drop_path.p = 0.5
        block.drop_path.train()
    return block


def original(block):
    """The block's own module, its last norm on the batch's statistics."""
    module = copy.deepcopy(block.module)
    norms_of(module)[-1].train()
    return module


def random_map(block, number=5, size=(6, 5), seed=1):
    shape = (number, block.units[0].conv.in_channels, *size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last)


def cotangent(y):
    generator = torch.Generator().manual_seed(3)
    d = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    return d.contiguous(memory_format=torch.channels_last)


def step(forward, module, x, seed=2):
    """Output, gradients of input and parameters, and the norms' statistics after backward."""
    module.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = forward(x)
    y.backward(cotangent(y))
    found = {"output": y.detach(), "input": x.grad}
    found |= {name: parameter.grad for name, parameter in module.named_parameters()}
    found |= {n: b.clone() for n, b in module.named_buffers() if "running" in n}
    return found


def check_same(ours, theirs, where="", rtol=1e-6, atol=1e-9):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        if expected is None or ours[name] is None:
            assert ours[name] is expected is None, f"{where} {name}"
        else:
            assert_close(
                ours[name],
                expected,
                rtol=rtol,
                atol=atol,
                msg=lambda m, n=name: f"{where} {n}: {m}",
            )


def our_step(block, x, stash, chunk=None):
    """As `step`, on a copy of the statistics."""
    before = copy.deepcopy(block.module.state_dict())
    found = step(lambda x: inverted_residual(block, x, stash, chunk), block.module, x)
    block.module.load_state_dict(before)
    return found


def kind_of(block):
    """What its module says of itself, whatever the width: numbers of two digits and more."""
    return re.sub(r"\d\d+", "n", str(block.module)), block.residual


@pytest.mark.parametrize("widths", ["narrowest", pytest.param("every", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", BACKBONES)
def test_every_block_is_autograds_on_the_original(random_backbone, name, widths):
    found = random_backbone(name).blocks
    different = {str(block.module): block for block in found}
    if widths == "narrowest":  # of each kind
        different = {kind_of(block): block for block in reversed(found)}
    assert len(different) > (5 if widths == "every" else 3)
    for block in map(readied, different.values()):
        x, module = random_map(block), original(block)
        theirs = step(module, module, x)
        assert all(t.abs().max() > 0 for t in theirs.values() if t is not None), block.name
        for stash in EXACT:
            check_same(our_step(block, x, stash, chunk=3), theirs, f"{block.name}, {stash}:")


@pytest.fixture(scope="module")
def block_of():
    """Function (backbone, block) → a copy of that block, readied."""
    read = cache(partial(load_backbone, num_classes=5, image_size=64, weights="none"))

    def build(name, block_name):
        found = next(block for block in read(name).blocks if block.name == block_name)
        return readied(copy.deepcopy(found))

    return build


ONE_OF_EACH = {
    "ReLU6, 5×5, stride 2, TensorFlow's padding": ("efficientnet_lite0", "blocks.2.0"),
    "without expansion": ("mobilenet_v2", "features.1"),
    "hard-swish, squeeze-excite, residual": ("mobilenet_v3_small", "features.5"),
    "SiLU, stochastic depth": ("efficientnet_b0", "features.2.1"),
    "no first activation": ("timm:mobilenetv4_conv_small", "blocks.2.0"),
}


@pytest.fixture(params=ONE_OF_EACH.values(), ids=ONE_OF_EACH)
def block(request, block_of):
    return block_of(*request.param)


@pytest.mark.parametrize("size", [(7, 9), (8, 14), (1, 3)], ids=str)
def test_block_is_autograds_at_odd_and_tiny_sizes(block, size):
    x, module = random_map(block, size=size), original(block)
    theirs = step(module, module, x)
    for stash in EXACT:
        check_same(our_step(block, x, stash), theirs, stash)


@pytest.mark.parametrize("stash", EXACT)
def test_map_that_is_not_channels_last_gives_the_same(block, stash):
    x = random_map(block)
    theirs = our_step(block, x, stash)
    check_same(our_step(block, x.contiguous(), stash), theirs, rtol=1e-10, atol=1e-12)


def error(found, exact):
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("stash", EXACT)
def test_chunks_change_nothing_but_the_order_of_sums(block, stash):
    x = random_map(block)
    whole = our_step(block, x, stash, chunk=len(x))
    for chunk in (1, 2, 3, 4):
        for name, ours in our_step(block, x, stash, chunk).items():
            same = ours is whole[name] is None or error(ours, whole[name]) < 1e-10
            assert same, f"{name}, chunks of {chunk}"


def test_float32_is_as_exact_as_stock_autograd_s(block):
    x, module = random_map(block), original(block)
    exact = step(module, module, x)
    module, x = original(block).float(), x.float()
    stock = step(module, module, x)
    block.module.float()
    for stash, chunk in itertools.product(EXACT, (1, 2, 3, 5)):
        for name, ours in our_step(block, x, stash, chunk).items():
            if ours is not None:
                allowed = 1e-5 + 2 * error(stock[name], exact[name])
                assert error(ours, exact[name]) < allowed < 1e-3, f"{name}, {stash}, {chunk}"


@pytest.mark.parametrize("stash", ["bfloat16", "int8"])
def test_chunks_of_a_rounded_stash_agree(block, stash):
    block.module.float()
    x = random_map(block).float()
    whole, parts = (our_step(block, x, stash, chunk) for chunk in (5, 2))
    for name, ours in parts.items():
        if ours is not None:
            assert F.cosine_similarity(ours.flatten(), whole[name].flatten(), 0) > 0.9, name


@pytest.mark.parametrize("seed", range(3))
def test_dropped_branches_still_count_in_the_statistics(block_of, seed):
    """An image whose branch is dropped has moved the last norm's mean and variance."""
    block = block_of("efficientnet_b0", "features.2.1")
    torch.manual_seed(seed)
    kept = block.drop_path(torch.ones(8, 1, 1, 1)).flatten() > 0
    assert 0 < kept.sum() < 8
    x, module = random_map(block, number=8), original(block)
    theirs = step(module, module, x, seed)
    for stash in EXACT:
        forward = partial(inverted_residual, block, stash=stash, chunk=3)
        block.module.load_state_dict(
            original_statistics := copy.deepcopy(block.module.state_dict())
        )
        check_same(step(forward, block.module, x, seed), theirs, stash)
        block.module.load_state_dict(original_statistics)


def test_output_and_statistics_are_the_same_whatever_the_stash(block):
    block.module.float()
    x, module = random_map(block).float(), original(block)
    theirs = step(module, module, x)
    for stash in (name for name in STASHES if name != "published"):
        ours = our_step(block, x, stash, chunk=2)
        for name in theirs:
            if name == "output" or "running" in name:
                assert_close(
                    *(ours[name], theirs[name]),
                    rtol=1e-3,
                    atol=1e-4,
                    msg=lambda m, where=f"{stash}, {name}": f"{where}: {m}",
                )


FROZEN = {
    "first conv": ["units.0.conv.weight"],
    "depthwise conv": ["units.1.conv.weight"],
    "last conv": ["units.2.conv.weight"],
    "every conv": [f"units.{i}.conv.weight" for i in range(3)],
    "first shift": ["units.0.norm.bias"],
    "last shift": ["units.2.norm.bias"],
    "gate": ["units.1.squeeze_excite"],
}


def freeze(block, path):
    unit, _, rest = path.removeprefix("units.").partition(".")
    target = block.units[int(unit)]
    for name in rest.split("."):
        target = getattr(target, name)
    target.requires_grad_(False)


@pytest.mark.parametrize("paths", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("stash", EXACT)
def test_frozen_tensors_get_no_gradient_and_the_others_theirs(block_of, stash, paths):
    block = block_of("mobilenet_v3_small", "features.5")
    for path in paths:
        freeze(block, path)
    x, module = random_map(block), original(block)
    ours = our_step(block, x, stash, chunk=2)
    check_same(ours, step(module, module, x))
    frozen = [n for n, p in block.module.named_parameters() if not p.requires_grad]
    assert len(frozen) >= len(paths) + 2 and all(ours[name] is None for name in frozen)


@pytest.mark.parametrize("stash", EXACT)
def test_input_that_needs_no_gradient_gets_none(block, stash):
    x = random_map(block)
    whole = our_step(block, x, stash, chunk=2)
    block.module.zero_grad(set_to_none=True)
    torch.manual_seed(2)
    y = inverted_residual(block, x, stash, chunk=2)
    y.backward(cotangent(y))
    assert x.grad is None
    for name, parameter in block.module.named_parameters():
        if parameter.requires_grad:
            assert_close(parameter.grad, whole[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("stash", [name for name in STASHES if name != "published"])
def test_input_is_left_alone(block, stash):
    block.module.float()
    x = random_map(block).float()
    before = x.clone()
    our_step(block, x, stash)
    assert torch.equal(x, before)


def test_block_whose_last_norm_is_frozen_does_not_fit(block):
    assert fits(block)
    block.units[-1].norm.weight.requires_grad_(False)
    assert not fits(block)


def test_blocks_that_end_in_an_activation_do_not_fit(random_backbone):
    assert not any(fits(readied(block)) for block in random_backbone("timm:lcnet_100").blocks)


@pytest.mark.parametrize("stash", [name for name in STASHES if name != "published"])
def test_one_value_a_channel_is_refused_as_by_batch_norm(block_of, stash):
    block = block_of("mobilenet_v2", "features.3")
    block.module.float()
    x = random_map(block, number=1, size=(1, 1)).float()
    norm = block.units[-1].norm
    before = norm.running_var.clone()
    with pytest.raises(ValueError, match="one value a channel has no variance"):
        inverted_residual(block, x, stash)
    assert torch.equal(norm.running_var, before)


# Pretrained weights and images: how good a rounded gradient is.


@pytest.fixture(scope="module")
def pretrained():
    """EfficientNet-Lite0 on ImageNet's weights, and sixteen digits for it."""
    backbone = load_backbone("efficientnet_lite0", num_classes=10, image_size=64)
    data = load_data("digits", "train", limit=16)
    return backbone, next(iter(ImageBatches(data, backbone.preprocessing, 16, range(16))))


def features(backbone, images, name):
    at = next(i for i, step in enumerate(backbone.steps) if step.name == name)
    return run_prefix(tuple(parts_of(backbone.steps[:at])), images)


DIGITS_BLOCKS = ("blocks.2.1", "blocks.4.1", "blocks.5.0", "blocks.5.3", "blocks.6.0")


@pytest.fixture(scope="module")
def digits_features(pretrained):
    """Block → the features that digits give it."""
    backbone, (images, _) = pretrained
    return {name: features(backbone, images, name) for name in DIGITS_BLOCKS}


@pytest.fixture(params=DIGITS_BLOCKS)
def digits_block(request, pretrained, digits_features):
    """A pretrained block that trains, and the features that digits give it."""
    backbone, _ = pretrained
    block = next(block for block in backbone.blocks if block.name == request.param)
    block.module.requires_grad_(True)
    for unit in block.units[:-1]:
        unit.norm.weight.requires_grad_(False)
    yield block, digits_features[request.param].clone()
    block.module.requires_grad_(False).zero_grad(set_to_none=True)


@pytest.mark.parametrize(
    ("stash", "cosine"), [("recompute", 0.999999), ("bfloat16", 0.999), ("int8", 0.99)]
)
def test_rounding_hardly_turns_the_gradients_of_pretrained_blocks(digits_block, stash, cosine):
    block, x = digits_block
    exact, ours = our_step(block, x, "float32"), our_step(block, x, stash)
    for name, gradient in exact.items():
        if gradient is not None:
            assert F.cosine_similarity(ours[name].flatten(), gradient.flatten(), 0) > cosine, name


@pytest.mark.parametrize("stash", ["bfloat16", "int8"])
@torch.no_grad()
def test_relu6_s_shift_and_input_gradients_do_not_feel_the_rounding(digits_block, stash):
    """From the last norm downwards they depend on masks alone, which are exact."""
    block, x = digits_block
    convs, others = _convolutions(block), _convolutions(block)
    maps = _internal(block, convs, x)
    d_out = torch.randn_like(convs[-1].forward(maps[-1]))
    seen_by = [unit.activation for unit in block.units[:-1]]
    rounded = [restore(keep(m, by, stash), by) for m, by in zip(maps, seen_by, strict=True)]
    d_exact = _backward_chunk(block, convs, x, maps, d_out, {}, True)
    d_ours = _backward_chunk(block, others, x, rounded, d_out, {}, True)
    assert torch.equal(d_ours, d_exact)
    for exact, ours in zip(convs[:-1], others[:-1], strict=True):
        assert torch.equal(ours.gradients()[1], exact.gradients()[1])


# Bytes kept for backward.

CHANNELS, EXPANSION, CHAIN = 32, 6, 5


def v2_block():
    return MobileNetV2Block(CHANNELS, CHANNELS, stride=1, expand_ratio=EXPANSION)


def v3_block():
    config = InvertedResidualConfig(
        CHANNELS, 3, EXPANSION * CHANNELS, CHANNELS, True, "HS", 1, 1, 1.0
    )
    return MobileNetV3Block(config, partial(nn.BatchNorm2d, eps=0.001, momentum=0.01))


class Chain(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 1)
        self.blocks = nn.Sequential(*(block() for _ in range(CHAIN)))
        self.head = nn.Linear(CHANNELS, 2)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def maps_kept_a_block(block, stash):
    """Of N·C·H·W floats each; the chain's blocks share what lies between them."""
    model = Chain(block)
    chain = [step.block for step in trace(model) if step.block]
    x = torch.randn(8, CHANNELS, 14, 14).contiguous(memory_format=torch.channels_last)
    x = x.requires_grad_() * 1
    model.to(memory_format=torch.channels_last).train(stash == "stock")
    with saved_for_backward([*model.parameters(), *model.buffers()]) as saved:
        y = x
        for traced in chain:
            y = traced.module(y) if stash == "stock" else inverted_residual(traced, y, stash)
    return saved.total / x.nbytes / CHAIN


@pytest.mark.parametrize(("block", "stock"), [(v2_block, 38), (v3_block, 44)], ids=["V2", "V3"])
def test_stashes_keep_a_fraction_of_stock_autograd(block, stock):
    kept = {name: maps_kept_a_block(block, name) for name in ("stock", *STASHES)[:-1]}
    inner = 2 * EXPANSION + 2  # input, two internal maps, the last norm's input
    assert kept["stock"] == pytest.approx(stock, rel=0.01)
    # The float32 stash shares its input with nobody: the neighbour keeps another map.
    assert kept["float32"] == pytest.approx(inner, rel=0.01)
    assert kept["bfloat16"] == pytest.approx(inner / 2, rel=0.01)
    assert kept["int8"] == pytest.approx(inner / 4, rel=0.01)
    assert kept["int8"] <= kept["stock"] / 10
    assert kept["recompute"] == pytest.approx((CHAIN + 1) / CHAIN, rel=0.01)
    assert kept["recompute"] <= kept["stock"] / 30


# The whole model.


def reference(backbone, plan, blocks, train_tail=False):
    """The original model in eval mode, but for the last norm of each block that trains."""
    model = copy.deepcopy(backbone.model).eval()
    tops = [model.get_submodule(block.name) for block in backbone.blocks[-blocks:]]
    last = [norms_of(top)[-1] for top in tops]
    if train_tail:
        last += norms_of(model)[norms_of(model).index(last[-1]) + 1 :]
    for norm in last:
        norm.train()
    for top in tops:
        for part in top.modules():
            if type(part).__name__ in ("StochasticDepth", "DropPath"):
                part.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in plan.by_name)
    return model


def loss_of(model, x):
    torch.manual_seed(3)
    loss = F.cross_entropy(model(x), torch.arange(len(x)) % 5)
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize(
    ("name", "blocks", "train_tail"),
    [(name, 2, False) for name in ("efficientnet_b0", "timm:fbnetc_100")]
    + [("mnasnet1_0", 1, True), ("efficientnet_lite0", 16, False), ("mobilenet_v3_small", 11, True)]
    # Whose blocks are held against the original above.
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            *((name, 2, False) for name in BACKBONES if name != "efficientnet_b0"),
            ("mobilenet_v2", 1, True),
            ("timm:mobilenetv4_conv_small", 12, True),
        )
    ],
)
def test_model_s_step_is_autograds_on_the_original(
    random_backbone, images, name, blocks, train_tail
):
    backbone, x = random_backbone(name), images(4, 48).double()
    backbone.model.double()
    plan = make_plan(backbone, method="mobiletl", blocks=blocks, train_tail=train_tail)
    original_model = reference(backbone, plan, blocks, train_tail)
    expected, theirs = loss_of(original_model, x), dict(original_model.named_parameters())
    statistics = dict(original_model.named_buffers())
    before = copy.deepcopy(backbone.model.state_dict())
    for stash in EXACT:
        backbone.model.load_state_dict(before)
        backbone.model.zero_grad(set_to_none=True)
        assert_close(loss_of(TransferModel(backbone, plan, stash), x), expected)
        for n, parameter in backbone.model.named_parameters():
            if n not in plan.by_name:
                assert parameter.grad is None, n
                continue
            assert parameter.grad.abs().max() > 0, n
            close = partial(assert_close, rtol=1e-6, atol=1e-9, msg=lambda m, n=n: f"{n}: {m}")
            close(parameter.grad, theirs[n].grad)
        for n, buffer in backbone.model.named_buffers():
            if "running" in n:
                assert_close(buffer, statistics[n], msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize("method", ["shifts", "head", "blocks", "full"])
def test_other_methods_ignore_the_stash(random_backbone, images, method):
    backbone, x = random_backbone("mobilenet_v2"), images(2)
    plan, kept, grads = make_plan(backbone, method=method, blocks=2), set(), []
    before = copy.deepcopy(backbone.model.state_dict())
    for stash in STASHES:
        backbone.model.load_state_dict(before)
        model = TransferModel(backbone, plan, stash)
        backbone.model.zero_grad(set_to_none=True)
        with saved_for_backward() as saved:
            loss = loss_of(model, x)
        kept.add((saved.total, loss.item()))
        grads.append([parameter.grad.clone() for parameter in model.trainable_parameters()])
    assert len(kept) == 1
    for others in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], others, strict=True))


def test_recompute_is_the_default(random_backbone):
    backbone = random_backbone("mobilenet_v2")
    plan = make_plan(backbone, method="mobiletl", blocks=1)
    assert TransferModel(backbone, plan).stash == "recompute"


def test_model_refuses_an_unknown_stash(random_backbone):
    backbone = random_backbone("mobilenet_v2")
    plan = make_plan(backbone, method="mobiletl", blocks=1)
    with pytest.raises(ConfigError, match="unknown stash zip; known: recompute, int8, bfloat16,"):
        TransferModel(backbone, plan, "zip")


@pytest.fixture(scope="module")
def costs(pretrained):
    """Stash → (bytes kept, allocator's peak) of the top five blocks, on what is below them."""
    backbone, _ = pretrained
    below = TransferModel(backbone, make_plan(backbone, method="blocks", blocks=5))
    x = below.features(torch.randn(16, 3, 96, 96).contiguous(memory_format=torch.channels_last))
    found = {}

    def on_a_copy(x):  # so that what becomes of the features counts too
        return model.from_features(x.clone())

    for name in ("blocks", *STASHES):
        method, stash = ("blocks", "published") if name == "blocks" else ("mobiletl", name)
        model = TransferModel(backbone, make_plan(backbone, method=method, blocks=5), stash)
        loss_of(on_a_copy, x)  # the first run of a shape sets oneDNN's caches up
        model.zero_grad(set_to_none=True)
        with allocator_peak() as peak:
            loss_of(on_a_copy, x)
        model.zero_grad(set_to_none=True)
        with saved_for_backward([*model.model.parameters(), *model.model.buffers(), x]) as saved:
            on_a_copy(x)
        found[name] = (saved.total, peak.bytes)
    return found


def test_stashes_keep_and_peak_in_their_order(costs):
    kept, peak = ({name: cost[i] for name, cost in costs.items()} for i in (0, 1))
    for sizes in (kept, peak):
        order = ["recompute", "int8", "bfloat16", "float32", "published", "blocks"]
        assert sorted(sizes, key=sizes.get) == order, sizes
    assert kept["recompute"] <= kept["published"] / 4
    assert kept["int8"] <= kept["published"] / 3
    assert peak["recompute"] <= peak["published"] / 2


def test_training_goes_the_same_way_with_every_stash(pretrained):
    backbone, (images, labels) = pretrained
    plan = make_plan(backbone, method="mobiletl", blocks=3)
    before = copy.deepcopy(backbone.model.state_dict())
    losses = {}
    for stash in ("float32", "recompute", "bfloat16", "int8", "published"):
        backbone.model.load_state_dict(before)
        model = TransferModel(backbone, plan, stash)
        optimizer = SGD(model.trainable_parameters(), 0.005, momentum=0.9, weight_decay=0.0)
        x = model.features(images)
        for _ in range(8):
            loss = F.cross_entropy(model.from_features(x), labels)
            loss.backward()
            optimizer.step()
        losses[stash] = loss.item()
    backbone.model.load_state_dict(before)
    assert losses["float32"] < 1
    assert all(loss == pytest.approx(losses["float32"], rel=0.05) for loss in losses.values())
