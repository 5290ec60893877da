"""The plan within a budget, against all plans there are; and what a device has free."""

import itertools
import re
from types import SimpleNamespace

import pytest
import torch
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

import fleet.planner as planner
from fleet.backbones import Preprocessing, load_backbone, read_backbone
from fleet.errors import ConfigError
from fleet.features import run_in_parts
from fleet.measure import allocator_peak, dry_run
from fleet.mobiletl import TransferModel, first_trained_step
from fleet.optim import SGD
from fleet.plan import make_plan
from fleet.planner import MIB, afford, available_bytes, batch_sizes_between
from fleet.train import take_step
from tests.many import many

BATCH_SIZES = (2, 4, 8)
WIDEST = 3  # blocks, of four: a plan for each number, stash and batch size is predicted
EXACT_FIRST = ("float32", "recompute", "bfloat16", "int8")
METHODS = ("mobiletl", "blocks", "shifts", "head", "full")
each_method = pytest.mark.parametrize("method", METHODS)


def stashes_of(method):
    return EXACT_FIRST if method == "mobiletl" else ("published",)


@pytest.fixture(scope="module")
def small():
    return load_backbone("mobilenet_v3_small", num_classes=5, image_size=32, weights="none")


@pytest.fixture(scope="module")
def few():
    """MobileNetV3 of four blocks, a quick one to predict; the third with a residual and a gate."""
    wide = InvertedResidualConfig
    settings = [
        wide(16, 3, 16, 16, False, "RE", 2, 1, 1.0),
        wide(16, 3, 64, 24, False, "RE", 2, 1, 1.0),
        wide(24, 5, 96, 24, True, "HS", 1, 1, 1.0),
        wide(24, 3, 144, 48, True, "HS", 2, 1, 1.0),
    ]
    model = MobileNetV3(settings, last_channel=64, num_classes=5)
    told = Preprocessing(32, (0.5,) * 3, (0.25,) * 3, "bilinear")
    return read_backbone("MobileNetV3", model, told, num_classes=5)


@pytest.fixture(scope="module")
def remembered():
    """`dry_run` that runs the same thing once."""
    known = {}

    def run(backbone, plan, stash="recompute", **settings):
        key = (id(backbone), plan.method, plan.blocks, stash, *sorted(settings.items(), key=str))
        if key not in known:
            known[key] = dry_run(backbone, plan, stash, **settings)
        return known[key]

    return run


@pytest.fixture
def peaks(remembered, few, monkeypatch):
    """Function (method) → (blocks, stash, batch size) → peak of all plans there are."""
    monkeypatch.setattr(planner, "dry_run", remembered)

    def of(method):
        widest = make_plan(few, method=method, blocks=WIDEST)
        narrowest = widest.blocks if method == "full" else 0
        every = itertools.product(
            range(narrowest, widest.blocks + 1), stashes_of(method), BATCH_SIZES
        )
        return widest, {
            (k, stash, n): remembered(
                few,
                widest.narrow(k),
                stash,
                batch_size=n,
                cached=False,
                momentum=0.9,
                momentum_dtype=torch.float32,
                proximal=False,
                cut=None,
            ).peak_bytes
            for k, stash, n in every
        }

    return of


def rank(choice):
    """Most blocks first, then the most exact stash, then the largest batch."""
    blocks, stash, batch_size = choice
    return blocks, -[*EXACT_FIRST, "published"].index(stash), batch_size


def chosen(found):
    return found.plan.blocks, found.stash, found.batch_size


@each_method
def test_choice_is_the_best_of_all_that_fit(method, peaks, few):
    """At every budget at which something more begins to fit, and a byte below it."""
    widest, peak_of = peaks(method)
    floor = min(peak_of.values())
    budgets = {budget for peak in peak_of.values() for budget in (peak, peak - 1)}
    for budget in budgets - {floor - 1}:
        found = afford(few, widest, budget, batch_sizes=BATCH_SIZES)
        best = max((c for c, peak in peak_of.items() if peak <= budget), key=rank)
        assert chosen(found) == best, budget
        assert found.first.peak_bytes == peak_of[best]
        assert found.first.peak_bytes == found.peak_bytes >= found.later.peak_bytes


@each_method
def test_next_larger_plan_does_not_fit_with_any_stash(method, peaks, few):
    widest, peak_of = peaks(method)
    for budget in sorted(peak_of.values()):
        found = afford(few, widest, budget, batch_sizes=BATCH_SIZES)
        if found.plan.blocks == widest.blocks:
            check_next_stash_or_batch(found, method, peak_of, budget)
            continue
        larger = {s: peak_of[found.plan.blocks + 1, s, BATCH_SIZES[0]] for s in stashes_of(method)}
        assert min(larger.values()) > budget
        assert found.why_not_larger.startswith(f"{method} of {found.plan.blocks + 1} block")
        need, have = re.findall(r"([\d.]+) MiB", found.why_not_larger)
        assert need == f"{min(larger.values()) / MIB:.1f}" and have == f"{budget / MIB:.1f}"


def check_next_stash_or_batch(found, method, peak_of, budget):
    """All blocks train: larger is a more exact stash, and then a larger batch."""
    blocks, stash, batch_size = chosen(found)
    wanted = stashes_of(method)
    if stash != wanted[0]:
        larger = (blocks, wanted[wanted.index(stash) - 1], BATCH_SIZES[0])
    elif batch_size != BATCH_SIZES[-1]:
        larger = (blocks, stash, BATCH_SIZES[BATCH_SIZES.index(batch_size) + 1])
    else:
        assert found.why_not_larger == ""
        return
    assert peak_of[larger] > budget
    assert f"needs {peak_of[larger] / MIB:.1f} MiB at batch {larger[2]}" in found.why_not_larger


@each_method
def test_larger_budgets_never_afford_less(method, peaks, few):
    widest, peak_of = peaks(method)
    found = [afford(few, widest, b, batch_sizes=BATCH_SIZES) for b in sorted(peak_of.values())]
    ranks = [rank(chosen(one)) for one in found]
    assert ranks == sorted(ranks)
    assert ranks[-1] == rank((widest.blocks, stashes_of(method)[0], BATCH_SIZES[-1]))


@each_method
def test_budget_below_the_floor_is_refused_with_the_floor(method, peaks, few):
    widest, peak_of = peaks(method)
    (blocks, *_), floor = min(peak_of.items(), key=lambda item: item[1])
    assert afford(few, widest, floor, batch_sizes=BATCH_SIZES).peak_bytes == floor
    shifts = f"shifts of {blocks} block{'s'[: blocks > 1]}"
    words = {"full": "the whole model", "shifts": shifts}
    text = (
        f"is below the floor of {floor / MIB:.1f} MiB, which "
        f"{words.get(method, 'the head alone')} takes at batch {BATCH_SIZES[0]} and 32 px; "
    )
    with pytest.raises(ConfigError, match=re.escape(text)):
        afford(few, widest, floor - 1, batch_sizes=BATCH_SIZES)


@pytest.mark.parametrize(
    ("method", "cause"), [("mobiletl", "the frozen part"), ("full", "backward")]
)
def test_refusal_tells_what_sets_the_floor_and_the_way_out(method, cause, small):
    widest = make_plan(small, method=method, blocks=3)
    text = (
        rf"budget-mib 0\.25 is below .*; {cause} sets it: raise the budget, "
        rf"or lower batch-size or image-size"
    )
    with pytest.raises(ConfigError, match=text):
        afford(small, widest, MIB // 4)


def test_reason_names_method_blocks_stash_batch_and_what_needs_it(small):
    widest = make_plan(small, method="mobiletl", blocks=2)
    found = afford(small, widest, 2 * MIB, stashes=("float32", "recompute"))
    need = dry_run(
        small, make_plan(small, method="mobiletl", blocks=1), "recompute", batch_size=8
    ).peak_bytes
    assert found.why_not_larger == (
        f"mobiletl of 1 block with stash recompute needs {need / MIB:.1f} MiB at batch 8, the "
        f"budget is 2.0 MiB; backward needs the most"
    )


REAL = {
    (name, *case)
    for name in ("mobilenet_v3_small", "efficientnet_lite0")
    for case in (
        ("mobiletl", 6),
        ("mobiletl", 14),
        ("mobiletl", 30),
        ("blocks", 40),
        ("shifts", 12),
    )
}
QUICK = {  # every method once, and a second budget of mobiletl
    ("mobilenet_v3_small", "mobiletl", 6),
    ("efficientnet_lite0", "mobiletl", 14),
    ("mobilenet_v3_small", "blocks", 40),
    ("efficientnet_lite0", "shifts", 12),
}


@pytest.mark.parametrize(
    ("name", "method", "budget_mib"),
    [*sorted(QUICK), *(pytest.param(*c, marks=pytest.mark.slow) for c in sorted(REAL - QUICK))],
)
def test_real_training_stays_within_the_budget(name, method, budget_mib, random_backbone):
    backbone = random_backbone(name, image_size=64)
    widest = make_plan(backbone, method=method, blocks=8)
    found = afford(backbone, widest, budget_mib * MIB)
    for cached in (False, True):
        assert peak_of_training(backbone, found, cached) <= budget_mib * MIB


@pytest.mark.parametrize("method", ["head", "full"])
def test_real_training_of_methods_without_blocks_stays_within_the_budget(method, random_backbone):
    backbone = random_backbone("mobilenet_v3_small", image_size=64)
    found = afford(backbone, make_plan(backbone, method=method), 60 * MIB)
    peak = peak_of_training(backbone, found, cached=False)
    assert found.plan.method == method and 0.9 * found.peak_bytes < peak <= 60 * MIB


def peak_of_training(backbone, found, cached):
    """Allocator peak of two steps, the second with momentum's buffers there.

    Batches are made as devices make them.
    """
    model = TransferModel(backbone, found.plan, found.stash)
    model.train()
    optimizer = SGD(model.trainable_parameters(), 0.01, momentum=0.9)
    size, n = backbone.preprocessing.image_size, found.batch_size
    labels = torch.arange(n) % backbone.num_classes
    images = torch.randn(2, 3, size, size).to(memory_format=torch.channels_last)

    def decoded(part):
        return images[: part.stop - part.start].clone()

    features = run_in_parts(model.features, n, decoded)
    with allocator_peak() as peak:
        for _ in range(2):
            x = features.clone() if cached else run_in_parts(model.features, n, decoded)
            take_step(model, optimizer, x, labels)
            del x
    return peak.bytes


def test_stashes_and_batch_sizes_are_those_of_the_caller(small):
    widest = make_plan(small, method="mobiletl", blocks=2)
    found = afford(small, widest, 2**40, batch_sizes=(3, 5), stashes=("int8", "float32"))
    assert chosen(found) == (2, "int8", 5)


def test_frozen_weights_that_take_more_than_shifts_stop_no_search():
    """A norm is folded into a copy of its frozen conv: here 6 blocks take more than 10."""
    backbone = load_backbone("efficientnet_lite0", num_classes=5, image_size=224, weights="none")
    widest = make_plan(backbone, method="shifts", blocks=12)
    ten, six = (dry_run(backbone, widest.narrow(k), batch_size=8).peak_bytes for k in (10, 6))
    assert ten < six
    assert afford(backbone, widest, ten).plan.blocks == 10


@pytest.mark.parametrize("shared", [False, True])
def test_costs_are_those_of_dry_runs_with_the_same_cut(shared, small):
    widest = make_plan(small, method="mobiletl", blocks=9)
    cut = first_trained_step(small.steps, widest) if shared else None
    found = afford(small, widest, 5 * MIB, stashes=("recompute", "int8"), cut=cut)
    assert 0 < found.plan.blocks < 9
    for cost, cached in ((found.first, False), (found.later, True)):
        assert cost == dry_run(
            small, found.plan, found.stash, batch_size=found.batch_size, cached=cached, cut=cut
        )


def test_a_cut_below_what_trains_leaves_less_to_the_cache(small):
    widest = make_plan(small, method="mobiletl", blocks=9)
    cut = first_trained_step(small.steps, widest)
    one = dict(batch_sizes=(8,), stashes=("recompute",))
    deep, own = (afford(small, widest.narrow(2), 2**40, **one, cut=c) for c in (cut, None))
    assert deep.first.flops_prefix < own.first.flops_prefix
    assert deep.later.flops_forward > own.later.flops_forward
    assert deep.first.flops_backward == own.first.flops_backward


def test_optimizer_is_paid_for(small):
    widest = make_plan(small, method="mobiletl", blocks=4)
    settings = ({"momentum": 0.0}, {"momentum_dtype": torch.bfloat16}, {})
    one = dict(batch_sizes=(32,), stashes=("recompute",))
    none, half, full = (afford(small, widest, 2**40, **one, **s).peak_bytes for s in settings)
    floats = sum(spec.nbytes for spec in widest.specs if not spec.is_statistic)
    assert (full - none, half - none) == pytest.approx((floats, floats / 2), rel=0.02)


def test_flops_of_an_epoch_are_those_of_its_images(small):
    plan = make_plan(small, method="mobiletl", blocks=2)
    found = afford(small, plan, 2**40, stashes=("float32",))
    one, again = (
        dry_run(small, plan, "float32", batch_size=32, cached=cached) for cached in (False, True)
    )
    learning = one.flops_forward + one.flops_backward
    assert again.flops_prefix == 0
    for num_examples in (32, 1000):
        first, later = found.flops_an_epoch(num_examples)
        assert first == (one.flops_prefix + learning) * num_examples // 32
        assert later == (again.flops_forward + again.flops_backward) * num_examples // 32
        assert later < first


def test_of_full_training_nothing_comes_from_a_cache(small):
    found = afford(small, make_plan(small, method="full"), 2**40)
    first, later = found.flops_an_epoch(100)
    assert first == later and found.plan.blocks == len(small.blocks)


@pytest.mark.parametrize(
    ("smallest", "largest", "expected"),
    [
        (8, 32, (8, 16, 32)),
        (8, 8, (8,)),
        (8, 9, (8, 9)),
        (8, 15, (8, 15)),
        (8, 16, (8, 16)),
        (8, 17, (8, 16, 17)),
        (8, 4, (4,)),
        (1, 5, (1, 2, 4, 5)),
    ],
)
def test_batch_sizes_double_up_to_the_largest(smallest, largest, expected):
    assert batch_sizes_between(smallest, largest) == expected


@many("largest", range(1, 70))
@pytest.mark.parametrize("smallest", [1, 3, 8])
def test_batch_sizes_rise_and_end_with_the_largest(smallest, largest):
    sizes = batch_sizes_between(smallest, largest)
    assert list(sizes) == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (min(smallest, largest), largest)


@pytest.fixture
def device(monkeypatch, tmp_path):
    """Function (available, line of /proc/self/cgroup, folder → its files) → a made-up device."""
    own, root = tmp_path / "proc-self-cgroup", tmp_path / "sys" / "fs" / "cgroup"
    monkeypatch.setattr(planner, "_OWN_GROUP", own)
    monkeypatch.setattr(planner, "_GROUPS", root)

    def build(available, line=None, groups=None):
        memory = SimpleNamespace(available=available)
        monkeypatch.setattr(planner.psutil, "virtual_memory", lambda: memory)
        if line is not None:
            own.write_text(f"{line}\n")
        for name, files in (groups or {}).items():
            folder = root / name
            folder.mkdir(parents=True, exist_ok=True)
            for file, text in files.items():
                (folder / file).write_text(f"{text}\n")

    return build


def limited(limit, used, dropped=0):
    stat = f"anon {used}\nfile {dropped}\ninactive_file {dropped}\nactive_file 0"
    return {"memory.max": limit, "memory.current": used + dropped, "memory.stat": stat}


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({}, 1000),
        ({"": limited(700, 100)}, 600),
        ({"a/b": limited(700, 100)}, 600),
        ({"a/b": limited("max", 100)}, 1000),
        ({"a/b": limited("max", 100), "a": limited(500, 200)}, 300),
        ({"a/b": limited(700, 300), "a": limited(500, 200)}, 300),
        ({"a/b": limited(400, 300), "a": limited(500, 200)}, 100),
        ({"a/b": limited(5000, 300)}, 1000),
        ({"a/c": limited(100, 50)}, 1000),  # a neighbour's
        ({"a/b": limited(700, 100, dropped=590)}, 600),  # files that were read
        ({"a/b": {"memory.max": "no number"}, "a": limited(500, 200)}, 300),
        ({"a/b": {"memory.max": "400"}, "a": limited(500, 200)}, 300),
    ],
    ids=str,
)
def test_what_control_groups_allow_bounds_what_is_free(device, groups, expected):
    device(1000, "0::/a/b", groups)
    assert available_bytes(0) == expected


def test_group_at_the_root_is_a_containers_own(device):
    device(1000, "0::/", {"": limited(700, 100), "a": limited(300, 0)})
    assert available_bytes(0) == 600


def test_group_that_is_not_mounted_here_falls_back_to_the_containers_root(device):
    device(1000, "0::/system.slice/docker-1.scope", {"": limited(700, 100)})
    assert available_bytes(0) == 600


def test_other_controllers_groups_are_not_looked_up(device):
    device(1000, "4:pids:/a\n10:cpu:/a\n0::/b", {"a": limited(1, 0), "b": limited(700, 100)})
    assert available_bytes(0) == 600


UNLIMITED = 0x7FFFFFFFFFFFF000  # what the first version says where there is no limit


def limited_in_the_first_version(limit, used, dropped=0):
    stat = f"inactive_file 1\ntotal_inactive_file {dropped}"
    return {
        "memory.limit_in_bytes": limit,
        "memory.usage_in_bytes": used + dropped,
        "memory.stat": stat,
    }


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({}, 1000),
        ({"memory": (UNLIMITED, 900)}, 1000),
        ({"memory/a": (700, 100), "memory/a/b": (UNLIMITED, 100)}, 600),
        ({"memory/a/b": (700, 100, 50)}, 600),
        ({"memory": (500, 100)}, 400),  # a container's own, at whose root it is mounted
    ],
    ids=str,
)
@pytest.mark.parametrize("controllers", ["memory", "cpu,memory"])
def test_groups_of_the_first_version_bound_what_is_free(device, groups, expected, controllers):
    files = {name: limited_in_the_first_version(*group) for name, group in groups.items()}
    device(1000, f"4:{controllers}:/a/b\n1:name=systemd:/a\n0::/", files)
    assert available_bytes(0) == expected


def test_a_file_that_may_not_be_read_does_not_hide_the_groups_around_it(device, tmp_path):
    device(1000, "0::/a/b", {"a": limited(500, 200)})
    (tmp_path / "sys/fs/cgroup/a/b/memory.max").mkdir(parents=True)  # permissions do not stop root
    assert available_bytes(0) == 300


def test_without_linux_the_system_alone_tells(device):
    device(1000)
    assert available_bytes(0) == 1000


@pytest.mark.parametrize(("reserve", "expected"), [(0, 600), (250, 350), (599, 1)])
def test_reserve_is_left_to_the_rest(device, reserve, expected):
    device(1000, "0::/a", {"a": limited(700, 100)})
    assert available_bytes(reserve) == expected


@pytest.mark.parametrize("reserve", [600, 10_000])
def test_nothing_beyond_the_reserve_is_refused(device, reserve):
    device(1000, "0::/a", {"a": limited(700, 100)})
    with pytest.raises(
        ConfigError, match=r"MiB of memory are free here and reserve-mib keeps .* lo"
    ):
        available_bytes(reserve)


def test_this_device_has_something_free_and_no_more_than_there_is():
    assert 0 < available_bytes(0) <= planner.psutil.virtual_memory().total
