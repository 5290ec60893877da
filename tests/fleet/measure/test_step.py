"""What `fleet measure` says of a step, against figures found in other ways."""

import time
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from fleet.baselines import CONTENDERS, contender
from fleet.errors import ConfigError, PlanError
from fleet.measure import allocator_peak, count_flops
from fleet.measure.comparison import COLUMNS, contenders, heading, rows
from fleet.measure.setup import Setup, Subject
from fleet.measure.step import Measurement, measure
from fleet.plan import STASHES, make_plan

SETUP = Setup(
    backbone="mobilenet_v3_small", method="mobiletl", blocks=3, batch_size=4, image_size=64
)


def measured(backbone, **changes):
    (one,) = measure([replace(SETUP, **changes)], backbone, repetitions=1, resident=False)
    return one


@pytest.fixture(scope="module")
def backbone():
    return SETUP.load()


@pytest.fixture(scope="module")
def comparison(backbone):
    setup = replace(SETUP, batch_size=8)
    return measure(list(contenders(setup, backbone)), backbone, repetitions=1, resident=False)


def test_saved_bytes_of_full_are_those_that_hooks_count(backbone):
    """Every storage once, by the address of its bytes, on the model without any of our parts."""
    model = backbone.model
    contender(backbone, "full", 0)
    known = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    images = torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy(model(images), torch.arange(4))
    assert measured(backbone, method="full").saved_bytes == sum(kept.values())
    loss.backward()
    model.zero_grad()


def test_saved_bytes_of_a_conv_network_are_its_maps(backbone):
    """At least every norm's input, in four bytes an element."""
    sizes = []
    hooks = [
        part.register_forward_pre_hook(lambda _, args: sizes.append(args[0].nbytes))
        for part in backbone.model.modules()
        if isinstance(part, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        backbone.model(torch.zeros(4, 3, 64, 64))
    for hook in hooks:
        hook.remove()
    saved = measured(backbone, method="full").saved_bytes
    assert sum(sizes) < saved < 4 * sum(sizes)


def test_accumulation_keeps_what_two_images_need(backbone):
    found = [
        measured(backbone, method="blocks+frozen-norms", batch_size=n, cached=True).saved_bytes
        for n in (2, 4, 8)
    ]
    batch = Subject(replace(SETUP, batch_size=2), backbone).batch()
    # Of more images the features are kept too: a slice keeps the whole alive.
    assert [kept - found[0] for kept in found[1:]] == pytest.approx(
        [batch.nbytes, 3 * batch.nbytes], rel=0.01
    )


@pytest.mark.parametrize("method", ["full", "blocks", "mobiletl"])
@pytest.mark.parametrize("cached", [False, True])
def test_peak_is_that_of_an_own_loop(backbone, method, cached):
    if method == "full" and cached:
        return
    found = measured(backbone, method=method, cached=cached)
    model = contender(backbone, method, 3)
    images = torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    features = model.features(images) if cached else None
    velocity = {}

    def update(parameter):
        if parameter in velocity:
            velocity[parameter].mul_(0.9).add_(parameter.grad)
        else:
            velocity[parameter] = parameter.grad.clone()
        parameter.grad = None

    parameters = model.trainable_parameters()
    handles = [p.register_post_accumulate_grad_hook(update) for p in parameters]
    with allocator_peak() as peak:
        for _ in range(2):
            if method == "full":
                x = images.clone()
            else:
                x = features.clone() if cached else model.features(images)
            F.cross_entropy(model.from_features(x), torch.arange(4)).backward()
            del x
    for handle in handles:
        handle.remove()
    assert found.peak_bytes == pytest.approx(peak.bytes, rel=0.05)


def test_momentum_is_in_the_peak(backbone):
    """A method whose peak is weights, gradients and momentum: all three are there at once."""
    found = measured(backbone, method="blocks+frozen-norms", blocks=11, batch_size=2, image_size=32)
    assert found.peak_bytes > 2 * found.trainable_bytes


def test_flops_are_those_of_the_parts(backbone):
    found = measured(backbone)
    assert found.flops == found.flops_prefix + found.flops_forward + found.flops_backward
    with count_flops() as whole, torch.no_grad():
        backbone.model.eval()(torch.zeros(4, 3, 64, 64))
    assert found.flops_prefix + found.flops_forward == whole.total


def test_a_cache_spares_the_frozen_half_and_nothing_else(backbone):
    without, cached = measured(backbone), measured(backbone, cached=True)
    assert (without.cached, cached.cached) == (False, True)
    assert without.flops_prefix > 0 and cached.flops_prefix == 0
    assert cached.flops == without.flops - without.flops_prefix
    assert cached.saved_bytes == without.saved_bytes


def test_methods_come_in_the_order_that_the_project_claims(comparison):
    by = {(m.method, m.stash): m for m in comparison}
    for field in ("saved_bytes", "peak_bytes"):
        sizes = [
            getattr(by[key], field)
            for key in (("mobiletl", "recompute"), ("blocks", None), ("full", None))
        ]
        assert sizes == sorted(sizes), field
    stashes = [by["mobiletl", stash].saved_bytes for stash in STASHES]
    assert stashes == sorted(stashes)
    for method in ("full", "blocks"):
        assert by[f"{method}+checkpoint", None].saved_bytes < by[method, None].saved_bytes / 3


def test_a_comparison_has_all_contenders(comparison):
    found = [(m.method, m.stash) for m in comparison]
    assert {method for method, _ in found} == set(CONTENDERS)
    assert [stash for _, stash in found if stash] == list(reversed(STASHES))
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("blocks", "from_images"),
    [
        (3, {"full", "full+checkpoint", "bias-only"}),
        (11, set(CONTENDERS) - {"head"}),
    ],
)
def test_in_a_comparison_what_cannot_be_cached_begins_with_images(backbone, blocks, from_images):
    setups = list(contenders(replace(SETUP, cached=True, blocks=blocks), backbone))
    assert {setup.method for setup in setups if not setup.cached} == from_images


def test_rows_have_ratios_to_full_and_to_blocks(comparison):
    table = [dict(zip(COLUMNS, row, strict=True)) for row in rows(comparison)]
    by = {(row["method"], row["stash"]): row for row in table}
    peaks = {(m.method, m.stash or "–"): m.peak_bytes for m in comparison}
    ours = ("mobiletl", "int8")
    for column, other in (("full ÷ peak", "full"), ("blocks ÷ peak", "blocks")):
        ratio = peaks[other, "–"] / peaks[ours]
        assert float(by[ours][column]) == pytest.approx(ratio, rel=0.01)
        assert by[other, "–"][column] == "1"
    assert by[ours]["resident, MiB"] == "–"
    assert by["head", "–"]["k"] == "–"


def test_rows_without_a_reference_have_no_ratio(backbone):
    (row,) = rows([measured(backbone)])
    assert dict(zip(COLUMNS, row, strict=True))["full ÷ peak"] == "–"


def test_heading_names_what_was_run():
    text = heading(replace(SETUP, threads=2))
    for part in ("64 px", "batch 4", "2 threads", f"torch {torch.__version__}"):
        assert part in text


def test_a_measurement_says_of_what(backbone):
    found = asdict(measured(backbone, method="blocks", batch_size=3, stash="int8"))
    assert list(found)[:6] == [
        "saved_bytes",
        "peak_bytes",
        "resident_bytes",
        "cpu_seconds",
        "flops",
        "trainable_bytes",
    ]
    words = asdict(SETUP) | {"method": "blocks", "batch_size": 3, "stash": None}
    assert {key: found[key] for key in words} == words
    assert found["trainable_bytes"] == make_plan(backbone, method="blocks", blocks=3).nbytes
    assert measured(backbone, method="full").blocks == 11


def test_subjects_take_turns_and_the_fastest_step_counts(backbone, monkeypatch):
    turns = []
    step = Subject.step

    def watched(self):
        turns.append(self.setup.method)
        step(self)

    monkeypatch.setattr(Subject, "step", watched)
    clock = iter([0.0, 5.0, 5.0, 6.0, 10.0, 12.0, 20.0, 29.0])
    monkeypatch.setattr(time, "process_time", lambda: next(clock))
    setups = [replace(SETUP, method=method) for method in ("head", "shifts")]
    found = measure(setups, backbone, repetitions=2, resident=False)
    assert turns[-4:] == ["head", "shifts", "head", "shifts"]
    assert [m.cpu_seconds for m in found] == [2.0, 1.0]


def test_measuring_leaves_threads_and_random_numbers_alone(backbone):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        measured(backbone, method="full", threads=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.rand(3), expected)


def test_a_batch_is_put_together_as_a_device_does(backbone):
    """An odd batch; and features of a cache have the shape and layout of those made."""
    made = Subject(replace(SETUP, batch_size=5), backbone).batch()
    cached = Subject(replace(SETUP, batch_size=5, cached=True), backbone).batch()
    assert made.shape == cached.shape and made.stride() == cached.stride()
    assert len(made) == 5 and isinstance(measured(backbone, batch_size=5), Measurement)
    images = Subject(replace(SETUP, batch_size=5, method="full"), backbone).batch()
    assert images.shape == (5, 3, 64, 64)
    assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"method": "lora"}, ConfigError, "unknown method lora; known: mobiletl"),
        ({"stash": "zip"}, ConfigError, "unknown stash zip; known: recompute"),
        ({"batch_size": 0}, ConfigError, "batch-size must be at least 1, got 0"),
        ({"threads": 0}, ConfigError, "threads must be at least 1, got 0"),
        ({"blocks": 12}, PlanError, "blocks is 12, mobilenet_v3_small has 11; choose 0 to 11"),
        (
            {"method": "full", "cached": True},
            ConfigError,
            "full on 11 blocks of mobilenet_v3_small leaves no block frozen",
        ),
        (
            {"method": "bias-only", "cached": True},
            ConfigError,
            "could be cached; measure it without --cached",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(backbone, changes, error, text):
    with pytest.raises(error, match=text):
        measured(backbone, **changes)


def test_a_batch_of_one_that_is_too_little_is_refused():
    setup = replace(SETUP, method="full", batch_size=1, image_size=32)
    text = "full cannot train on a batch of one image of 32 pixels: .*; raise batch-size or image-s"
    with pytest.raises(ConfigError, match=text):
        measure([setup], setup.load(), repetitions=1, resident=False)
