"""What a dry run says, against the step itself."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

from fleet.errors import ConfigError
from fleet.features import run_in_parts
from fleet.measure import (
    FlopCount,
    allocator_peak,
    count_flops,
    dry_run,
    saved_for_backward,
    weightless,
)
from fleet.measure.shapes import shape_only
from fleet.mobiletl import TransferModel
from fleet.optim import SGD
from fleet.plan import STASHES, make_plan
from fleet.train import take_step

CASES = [  # backbone, method, k, stash, batch, pixels, cached
    ("efficientnet_lite0", "mobiletl", 5, "recompute", 8, 64, False),
    ("efficientnet_lite0", "mobiletl", 1, "int8", 2, 96, True),
    ("efficientnet_lite0", "mobiletl", 16, "float32", 2, 64, False),
    ("efficientnet_lite0", "full", 0, "published", 2, 64, False),
    ("mobilenet_v2", "mobiletl", 3, "bfloat16", 16, 64, True),
    ("mobilenet_v2", "shifts", 5, "published", 8, 96, True),
    ("mobilenet_v3_large", "mobiletl", 3, "recompute", 12, 64, True),
    ("mobilenet_v3_large", "mobiletl", 5, "published", 3, 64, False),
    ("mobilenet_v3_large", "blocks", 2, "published", 8, 64, False),
    ("efficientnet_b0", "mobiletl", 2, "int8", 8, 64, False),
    ("mnasnet1_0", "head", 0, "published", 8, 64, True),
    ("mobilenetv4_conv_small", "mobiletl", 5, "int8", 8, 64, False),
    ("fbnetc_100", "mobiletl", 3, "recompute", 2, 64, False),
]
MORE = [  # of a backbone and of a method that others here are of
    ("mobilenet_v2", "mobiletl", 3, "published", 12, 64, False),
    ("efficientnet_b0", "blocks", 1, "published", 8, 64, True),
]
each_case = pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)],
    ids=lambda case: "-".join(map(str, case)),
)


@pytest.fixture
def build(random_backbone):
    """Function (case) → backbone and plan."""

    def make(case):
        name, method, k, _, _, size, _ = case
        backbone = random_backbone(name, image_size=size)
        return backbone, make_plan(backbone, method=method, blocks=k)

    return make


@pytest.fixture(scope="module")
def known():
    return {}


@pytest.fixture
def costs(known, build):
    """Function (case) → its dry run, made once."""

    def of(case):
        if case not in known:
            (backbone, plan), (_, _, _, stash, batch_size, _, cached) = build(case), case
            known[case] = dry_run(backbone, plan, stash, batch_size=batch_size, cached=cached)
        return known[case]

    return of


def real_step(backbone, plan, stash, batch_size, cached, measuring):
    """The step that a dry run is of; yields after its prefix, forward, and the whole."""
    model = TransferModel(backbone, plan, stash)
    optimizer = SGD(model.trainable_parameters(), 0.01, momentum=0.9)
    size = backbone.preprocessing.image_size
    batch = torch.randn(batch_size, 3, size, size).to(memory_format=torch.channels_last)
    labels = torch.arange(batch_size) % backbone.num_classes
    batch = model.features(batch) if cached else batch
    there = [batch, labels, *backbone.model.parameters(), *backbone.model.buffers()]
    with measuring(there) as measured:
        features = batch if cached else model.features(batch)
        yield measured
        loss = F.cross_entropy(model.from_features(features), labels)
        yield measured
        loss.backward()
        optimizer.step()
    yield measured


def peak_of_training(backbone, plan, stash, batch_size, cached, **term):
    """Allocator peak of two steps whose batches are made as devices make them.

    The first makes momentum's buffers, which are there from the second on.

    `term`: what the optimiser takes of a proximal term, whose targets were made before.
    """
    model = TransferModel(backbone, plan, stash)
    optimizer = SGD(model.trainable_parameters(), 0.01, momentum=0.9, **term)
    size = backbone.preprocessing.image_size
    labels = torch.arange(batch_size) % backbone.num_classes
    pixels = torch.randn(batch_size, 3, size, size).to(memory_format=torch.channels_last)
    features = model.features(pixels)
    with allocator_peak() as peak:
        for _ in range(2):
            if cached and model.freezes_blocks:
                x = features.clone()
            else:
                x = run_in_parts(model.features, batch_size, lambda part: pixels[part].clone())
            take_step(model, optimizer, x, labels)
            del x
    return peak.bytes


@each_case
def test_peak_is_that_of_the_step(case, build, costs):
    """15 % is promised; the comparison over a wide grid is simulations.benchmark_planner."""
    (backbone, plan), (_, _, _, stash, batch_size, _, cached) = build(case), case
    cost = costs(case)
    peak = peak_of_training(backbone, plan, stash, batch_size, cached)
    assert cost.peak_bytes == pytest.approx(peak, rel=0.05)


@each_case
def test_flops_are_exactly_those_of_the_step(case, build, costs):
    (backbone, plan), (_, _, _, stash, batch_size, _, cached) = build(case), case
    cost = costs(case)
    step = real_step(backbone, plan, stash, batch_size, cached, lambda there: count_flops())
    totals = [count.total for count in step]
    assert totals[0] == cost.flops_prefix
    assert totals[1] - totals[0] == cost.flops_forward > 0
    assert totals[2] - totals[1] == cost.flops_backward > 0


@each_case
def test_saved_bytes_are_those_of_the_step(case, build, costs):
    (backbone, plan), (_, _, _, stash, batch_size, _, _) = build(case), case
    cost = costs(case)
    model = TransferModel(backbone, plan, stash)
    size = backbone.preprocessing.image_size
    x = model.features(torch.randn(batch_size, 3, size, size))
    with saved_for_backward([x, *model.model.parameters(), *model.model.buffers()]) as saved:
        F.cross_entropy(model.from_features(x), torch.arange(batch_size) % 5)
    labels = batch_size * 8
    assert cost.saved_bytes == saved.total - labels


@each_case
def test_every_operation_gives_the_shape_and_layout_of_the_real_one(case, build):
    backbone, plan = build(case)

    class Both(FlopCount):
        def run(self, func, args, kwargs):
            imagined = None
            changes = func._schema.name[-1] == "_" or func.is_view
            if not changes and torch.Tag.data_dependent_output not in func.tags:
                args_without, kwargs_without = tree_map_only(
                    torch.Tensor, without_memory, (args, kwargs)
                )
                imagined = shape_only(func, args_without, kwargs_without)
            out = func(*args, **kwargs)
            if imagined is not None:
                tree_map_only(torch.Tensor, lambda t: seen.append(t), out)
                assert shapes(imagined) == shapes(out), func
            return out

    seen = []
    step = real_step(backbone, plan, case[3], case[4], case[6], lambda there: Both())
    *_, _ = step
    assert len(seen) > 10


def without_memory(tensor):
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def shapes(out):
    """Shape, type and storage of every tensor; strides too, where no size of 1 blurs them."""
    tensors = [out] if isinstance(out, torch.Tensor) else [t for t in out if t is not None]
    return [
        (t.shape, t.dtype, None if 1 in t.shape or 0 in t.shape else t.stride()) for t in tensors
    ]


@pytest.fixture
def lite0(random_backbone):
    return random_backbone("efficientnet_lite0")


def test_backbone_stays_as_it_was(lite0):
    lite0.head.weight.requires_grad_(True)
    facts = {
        name: (tensor, tensor.clone(), tensor.stride(), tensor.requires_grad, tensor.device)
        for name, tensor in lite0.model.state_dict(keep_vars=True).items()
    }
    digest, steps = lite0.weights_digest, lite0.steps
    dry_run(lite0, make_plan(lite0, method="mobiletl", blocks=3), batch_size=4)
    now = lite0.model.state_dict(keep_vars=True)
    assert now.keys() == facts.keys() and lite0.weights_digest == digest and lite0.steps is steps
    for name, (tensor, value, *facts_of) in facts.items():
        assert now[name] is tensor and torch.equal(tensor, value)
        assert [tensor.stride(), tensor.requires_grad, tensor.device] == facts_of
        assert tensor.grad is None


def test_twin_is_the_same_but_for_its_memory(lite0):
    lite0.head.weight.requires_grad_(True)
    with allocator_peak() as peak:
        twin = weightless(lite0)
    assert peak.bytes < 1024
    theirs = twin.model.state_dict(keep_vars=True)
    for name, tensor in lite0.model.state_dict(keep_vars=True).items():
        assert theirs[name].is_meta and type(theirs[name]) is type(tensor)
        assert (theirs[name].shape, theirs[name].stride(), theirs[name].requires_grad) == (
            tensor.shape, tensor.stride(), tensor.requires_grad
        )  # fmt: skip
    assert twin.weights_digest == lite0.weights_digest
    inside = set(twin.model.modules())
    assert all(step.module is None or step.module in inside for step in twin.steps)
    assert all(step.forward in inside for step in twin.steps if step.module is not None)
    assert twin.head is not lite0.head and twin.num_classes == lite0.num_classes


def test_dry_run_itself_allocates_nothing(random_backbone):
    backbone = random_backbone("mobilenet_v2", image_size=224)
    plan = make_plan(backbone, method="full")
    with allocator_peak() as peak:
        cost = dry_run(backbone, plan, batch_size=64)
    assert cost.peak_bytes > 4 * 2**30 and peak.bytes < 2**16


@pytest.mark.parametrize("stash", STASHES)
def test_larger_batches_cost_more(lite0, stash):
    plan = make_plan(lite0, method="mobiletl", blocks=3)
    costs = [dry_run(lite0, plan, stash, batch_size=n) for n in (2, 8, 32)]
    for field in ("peak_bytes", "saved_bytes", "flops_prefix", "flops_forward", "flops_backward"):
        values = [getattr(cost, field) for cost in costs]
        assert values == sorted(values) and values[0] < values[-1], field


def test_cached_features_spare_the_prefix_and_its_output(lite0):
    plan = make_plan(lite0, method="mobiletl", blocks=1)
    fresh, cached = (dry_run(lite0, plan, batch_size=8, cached=c) for c in (False, True))
    assert cached.flops_prefix == 0 < fresh.flops_prefix
    assert (cached.flops_forward, cached.flops_backward) == (
        fresh.flops_forward, fresh.flops_backward
    )  # fmt: skip
    assert fresh.saved_bytes == cached.saved_bytes
    plan = make_plan(lite0, method="head")
    fresh, cached = (dry_run(lite0, plan, batch_size=8, cached=c) for c in (False, True))
    assert cached.peak_bytes < fresh.peak_bytes / 4


def test_momentum_takes_a_buffer_for_every_parameter(lite0):
    plan = make_plan(lite0, method="mobiletl", blocks=3)
    floats = sum(spec.nbytes for spec in plan.specs if not spec.is_statistic)
    none, full, half = (
        dry_run(lite0, plan, batch_size=32, **settings).peak_bytes
        for settings in ({"momentum": 0.0}, {}, {"momentum_dtype": torch.bfloat16})
    )
    assert (full - none, half - none) == pytest.approx((floats, floats / 2), rel=0.02)


@pytest.mark.parametrize(
    ("case", "local_norms"),
    [
        *((CASES[n], False) for n in (3, 6, 10)),
        *((CASES[n], True) for n in (0, 9)),
        pytest.param(CASES[0], False, marks=pytest.mark.slow),
    ],
)
def test_peak_with_a_proximal_term_is_that_of_the_step(case, local_norms, random_backbone):
    name, method, k, stash, batch_size, size, cached = case
    backbone = random_backbone(name, image_size=size)
    plan = make_plan(backbone, method=method, blocks=k, local_norms=local_norms)
    plain, cost = (
        dry_run(backbone, plan, stash, batch_size=batch_size, cached=cached, proximal=proximal)
        for proximal in (False, True)
    )
    targets = [
        torch.zeros_like(p) if n in plan.by_name else None
        for n, p in TransferModel(backbone, plan, stash).trainable_by_name().items()
    ]
    there = sum(t.nbytes for t in targets if t is not None)
    peak = there + peak_of_training(
        backbone, plan, stash, batch_size, cached, proximal=0.1, targets=targets
    )
    assert cost.peak_bytes == pytest.approx(peak, rel=0.02)
    assert cost.peak_bytes >= plain.peak_bytes + there


def test_local_norms_have_no_targets(lite0):
    there = {}
    for local_norms in (False, True):
        plan = make_plan(lite0, method="shifts", blocks=16, local_norms=local_norms)
        plain, pulled = (
            dry_run(lite0, plan, batch_size=2, proximal=proximal).peak_bytes
            for proximal in (False, True)
        )
        there[local_norms] = pulled - plain
    head = lite0.head.weight.nbytes + lite0.head.bias.nbytes
    assert head <= there[True] < there[False]


def test_unknown_stash_is_refused(lite0):
    with pytest.raises(ConfigError, match="unknown stash zip"):
        dry_run(lite0, make_plan(lite0, method="mobiletl", blocks=1), "zip", batch_size=2)
