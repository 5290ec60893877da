"""`fleet plan`: its JSON, its text, what it takes from the device, and what it refuses."""

import json
from types import SimpleNamespace

import psutil
import pytest
from click.testing import CliRunner

import fleet.planner as planner
from fleet.backbones import load_backbone
from fleet.cli import main
from fleet.measure import dry_run
from fleet.plan import make_plan

MIB = 2**20
SMALL = ("--backbone", "mobilenet_v3_small", "--image-size", "32", "--num-classes", "5")
CONTRACT = (
    *("method", "blocks", "stash", "batch_size", "peak_bytes"),
    *("flops_first_epoch", "flops_later_epochs", "payload_bytes", "why_not_larger"),
)


def invoke(*arguments):
    return CliRunner().invoke(main, ("plan", *SMALL, *arguments))


def plan(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def plan_values(*arguments):
    return json.loads(plan(*arguments, "--format", "json"))


@pytest.fixture(autouse=True, scope="module")
def each_dry_run_once():
    """Plans of this file are of one model: what a step takes is found once for all of them."""
    found = {}

    def dry_run_once(backbone, plan, *stash, **how):
        key = (plan.method, plan.blocks, *stash, *sorted(how.items()))
        if key not in found:
            found[key] = dry_run(backbone, plan, *stash, **how)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "dry_run", dry_run_once)
        yield


@pytest.fixture
def device_with(monkeypatch):
    """Function (MiB) → a device that has so much free, in no control group."""

    def build(free_mib):
        memory = SimpleNamespace(available=free_mib * MIB)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
        monkeypatch.setattr(planner, "_control_groups", lambda: [])

    return build


def test_json_begins_with_the_keys_of_the_contract():
    values = plan_values("--budget-mib", "5")
    assert tuple(values)[: len(CONTRACT)] == CONTRACT


def test_json_is_what_dry_runs_and_the_plan_tell():
    values = plan_values("--budget-mib", "5", "--num-examples", "320")
    backbone = load_backbone("mobilenet_v3_small", num_classes=5, image_size=32, weights="none")
    affordable = make_plan(backbone, method=values["method"], blocks=values["blocks"])
    first, later = (
        dry_run(
            backbone, affordable, values["stash"], batch_size=values["batch_size"], cached=cached
        )
        for cached in (False, True)
    )
    flops = [
        (cost.flops_prefix + cost.flops_forward + cost.flops_backward) * 320 // values["batch_size"]
        for cost in (first, later)
    ]
    assert values["method"] == "mobiletl" and 0 < values["blocks"] < 11
    assert values["peak_bytes"] == first.peak_bytes <= 5 * MIB == values["budget_bytes"]
    assert [values["flops_first_epoch"], values["flops_later_epochs"]] == flops
    assert values["payload_bytes"] == affordable.nbytes
    assert f"mobiletl of {values['blocks'] + 1} blocks" in values["why_not_larger"]


def test_nothing_is_larger_than_all_of_it():
    values = plan_values("--budget-mib", "1000")
    assert {key: values[key] for key in ("blocks", "stash", "batch_size", "why_not_larger")} == {
        "blocks": 11,
        "stash": "float32",
        "batch_size": 32,
        "why_not_larger": "",
    }


@pytest.mark.parametrize(
    ("method", "called", "blocks"),
    [("head", "head", 0), ("full", "full", 11), ("shifts", "shifts", 3), ("blocks", "blocks", 3)],
)
def test_every_method_can_be_planned(method, called, blocks):
    values = plan_values("--method", method, "--budget-mib", "1000", "--max-blocks", "3")
    assert (values["method"], values["blocks"], values["stash"]) == (called, blocks, "published")


def test_of_no_block_the_method_is_head():
    values = plan_values("--budget-mib", "1.5")
    assert (values["method"], values["blocks"]) == ("head", 0)
    assert values["payload_bytes"] == 4 * (1024 * 5 + 5)


def test_batch_sizes_and_blocks_are_bounded_by_options():
    values = plan_values(
        *("--budget-mib", "1000", "--max-blocks", "2"),
        *("--min-batch-size", "3", "--max-batch-size", "5"),
    )
    assert (values["blocks"], values["batch_size"]) == (2, 5)


def test_text_tells_the_same_as_json():
    options = ("--budget-mib", "5", "--max-blocks", "4", "--num-examples", "320")
    values, text = plan_values(*options), plan(*options)
    lines = {line[:15].strip(): line[16:] for line in text.splitlines()}
    assert lines.pop("predicted peak").startswith(f"{values['peak_bytes'] / MIB:.1f} MiB, in ")
    assert lines == {
        "trains": f"mobiletl, {values['blocks']} of 11 blocks, stash {values['stash']}, "
        f"batch {values['batch_size']}",
        "budget": "5.0 MiB",
        "320 images": f"{values['flops_first_epoch'] / 1e9:.0f} GFLOP the first time, "
        f"{values['flops_later_epochs'] / 1e9:.0f} GFLOP from the cache",
        "a round sends": f"{values['payload_bytes'] / MIB:.2f} MiB in float32, either way",
        "not larger": values["why_not_larger"],
    }


def test_text_says_if_nothing_is_larger():
    last = plan("--budget-mib", "1000", "--max-blocks", "1").splitlines()[-1]
    assert last.split(maxsplit=2) == ["not", "larger", "there is nothing larger"]


def test_without_a_budget_it_is_what_the_device_has_free_less_the_reserve(device_with):
    device_with(300)
    few = ("--max-blocks", "1")
    assert plan_values(*few)["budget_bytes"] == (300 - 256) * MIB
    values = plan_values(*few, "--reserve-mib", "295")
    assert values == plan_values(*few, "--budget-mib", "5")


def test_a_budget_that_is_told_goes_before_what_is_free(device_with):
    device_with(0)
    assert plan_values("--budget-mib", "5", "--max-blocks", "1")["budget_bytes"] == 5 * MIB


def test_a_control_group_bounds_what_is_free(device_with, monkeypatch):
    device_with(10_000)
    monkeypatch.setattr(planner, "_control_groups", lambda: [(400 * MIB, 139 * MIB)])
    assert plan_values("--max-blocks", "1")["budget_bytes"] == (400 - 139 - 256) * MIB


def test_a_device_with_less_free_than_the_reserve_is_told_both(device_with):
    device_with(200)
    result = invoke()
    assert (
        result.exit_code == 1
        and "MiB of memory are free here and reserve-mib keeps 256.0 MiB of it" in result.stderr
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--budget-mib", "0"), "budget-mib must be above 0 and finite, got 0.0"),
        (("--budget-mib", "-3"), "budget-mib must be above 0 and finite, got -3.0"),
        (("--budget-mib", "nan"), "budget-mib must be above 0 and finite, got nan"),
        (("--budget-mib", "inf"), "budget-mib must be above 0 and finite, got inf"),
        (("--reserve-mib", "-1"), "reserve-mib must be at least 0 and finite, got -1.0"),
        (("--reserve-mib", "nan"), "reserve-mib must be at least 0 and finite, got nan"),
        (("--num-examples", "0"), "num-examples must be above 0 and finite, got 0"),
        (
            ("--budget-mib", "0.1"),
            "budget-mib 0.1 is below the floor of 0.3 MiB, which the head",
        ),
        (("--backbone", "mobilenet_v9"), "unknown backbone mobilenet_v9; examples"),
        (("--max-blocks", "12"), "blocks is 12, mobilenet_v3_small has 11; choose 0 to 11"),
        (("--max-blocks", "-1"), "blocks is -1, mobilenet_v3_small has 11; choose 0 to 11"),
        (("--method", "lora"), "unknown method lora; known: mobiletl"),
        (
            ("--min-batch-size", "16", "--max-batch-size", "8"),
            "batch sizes must be at least 1 and rise, got 16 to 8",
        ),
        (("--min-batch-size", "0"), "batch sizes must be at least 1 and rise, got 0 to 32"),
        (("--image-size", "16"), "image-size must be at least 32 pixels"),
        (("--num-classes", "0"), "a classifier needs at least 2 classes, got 0"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(arguments, text):
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"Error: {text}")


def test_help_names_every_option_and_its_default():
    text = " ".join(CliRunner().invoke(main, ("plan", "--help")).output.split())
    for words in ("--budget-mib", "less the reserve", "[default: 256.0]", "[default: mobiletl]"):
        assert words in text
