import dataclasses
import json
from itertools import pairwise

import pytest
import torch

from fleet.backbones import load_backbone, read_backbone
from fleet.errors import PlanError
from fleet.plan import METHODS, make_plan


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("mobilenet_v3_small", num_classes=4, image_size=32, weights="none")


@pytest.fixture(scope="module")
def plan(backbone):
    return make_plan(backbone, method="mobiletl", blocks=5)


def test_the_digest_changes_with_every_field(plan):
    spec = plan.specs[0]
    other_specs = [
        dataclasses.replace(spec, **change)
        for change in (
            {"name": "elsewhere"},
            {"shape": (1,)},
            {"role": "var"},
            {"depth": 9},
            {"dtype": "float16"},
        )
    ]
    changes = [
        {"backbone": "another"},
        {"preprocessing": dict(plan.preprocessing) | {"image_size": 64}},
        {"step_digests": dict(plan.step_digests) | {"features.0": "0"}},
        {"weights_digest": "0"},
        {"method": "blocks"},
        {"blocks": 4},
        {"train_tail": True},
        {"specs": plan.specs[::-1]},
        {"local_norms": True},
        {"local_specs": plan.specs[:1]},
        *({"specs": (changed, *plan.specs[1:])} for changed in other_specs),
    ]
    assert {key for change in changes for key in change} == {
        field.name for field in dataclasses.fields(plan)
    }
    digests = {dataclasses.replace(plan, **change).digest for change in changes}
    assert len(digests | {plan.digest}) == len(changes) + 1


def test_the_digest_is_the_same_for_the_same_model(plan):
    again = load_backbone("mobilenet_v3_small", num_classes=4, image_size=32, weights="none")
    assert make_plan(again, method="mobiletl", blocks=5).digest == plan.digest


@pytest.mark.parametrize("method", METHODS)
def test_specs_are_tensors_of_the_model_in_its_order(backbone, method):
    plan = make_plan(backbone, method=method, blocks=2)
    own = backbone.model.state_dict()
    names = [spec.name for spec in plan.specs]
    assert names == [name for name in own if name in plan.by_name]
    assert all(spec.shape == tuple(own[spec.name].shape) for spec in plan.specs)
    assert plan.nbytes == sum(own[name].numel() * 4 for name in names)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("blocks", [0, 2])
def test_the_head_is_the_models_classifier(backbone, method, blocks):
    plan = make_plan(backbone, method=method, blocks=blocks or 1)
    plan = plan if method == "full" else plan.narrow(blocks and plan.blocks)
    weight, bias = (backbone.model.get_parameter(name) for name in plan.head)
    assert weight is backbone.head.weight and bias is backbone.head.bias


def test_a_head_without_a_bias_is_none(plan):
    assert dataclasses.replace(plan, specs=plan.specs[:-1]).head is None
    assert dataclasses.replace(plan, specs=()).head is None


@pytest.mark.parametrize("method", ["mobiletl", "blocks", "shifts"])
def test_a_cut_plan_is_the_plan_of_fewer_blocks(backbone, method):
    widest = make_plan(backbone, method=method, blocks=5)
    for k in range(6):
        narrow = widest.narrow(k)
        assert narrow == make_plan(backbone, method=method, blocks=k)
        assert narrow.digest == make_plan(backbone, method=method, blocks=k).digest


def test_sub_plans_nest_and_keep_the_order(plan):
    plans = [plan.narrow(k) for k in range(6)]
    for smaller, larger in pairwise(plans):
        assert set(smaller.specs) < set(larger.specs)
        kept = [spec for spec in larger.specs if spec in smaller.specs]
        assert kept == list(smaller.specs)
    assert plan.narrow(3).narrow(1) == plan.narrow(1)
    assert plan.narrow(5) is plan


@pytest.mark.parametrize("blocks", [-1, 6])
def test_a_plan_is_not_cut_beyond_its_ends(plan, blocks):
    with pytest.raises(PlanError, match=rf"a sub-plan of {blocks} blocks is outside .* 0 to 5;"):
        plan.narrow(blocks)


def test_a_full_plan_is_not_cut(backbone):
    full = make_plan(backbone, method="full")
    with pytest.raises(PlanError, match="method full trains the whole model and has no narrower"):
        full.narrow(1)
    assert full.sub_plans == {full.digest: full}


def test_sub_plans_are_found_by_digest(plan):
    assert [sub.blocks for sub in plan.sub_plans.values()] == [0, 1, 2, 3, 4, 5]
    assert all(digest == sub.digest for digest, sub in plan.sub_plans.items())


def test_an_unknown_method_and_too_many_blocks_are_refused(backbone):
    with pytest.raises(PlanError, match="unknown method lora; known: mobiletl, head"):
        make_plan(backbone, method="lora")
    count = len(backbone.blocks)
    text = f"blocks is 99, mobilenet_v3_small has {count}; choose 0 to {count}"
    with pytest.raises(PlanError, match=text):
        make_plan(backbone, method="mobiletl", blocks=99)


def test_a_summary_survives_json(plan):
    summary = plan.summary()
    assert json.loads(json.dumps(summary)) == summary
    assert "specs" not in summary
    assert summary["digest"] == plan.digest
    plan.check_same(json.loads(json.dumps(summary)))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"backbone": "x"}, "backbone is mobilenet_v3_small here, x in the plan"),
        ({"method": "full"}, "method is mobiletl here, full in the plan"),
        ({"blocks": 3}, "blocks is 5 here, 3 in the plan"),
        ({"train_tail": True}, "train_tail is False here, True in the plan"),
        ({"digest": "0"}, "the tensors it derives differ; run the same version on both sides"),
    ],
)
def test_a_difference_is_named_with_both_values(plan, change, text):
    with pytest.raises(PlanError, match=text):
        plan.check_same(plan.summary() | change)


def test_every_difference_is_named(plan):
    other = plan.summary() | {"backbone": "x", "method": "full", "blocks": 3}
    with pytest.raises(PlanError, match=r"backbone is .*; method is .*; blocks is"):
        plan.check_same(other)


def test_another_image_size_is_named(plan):
    larger = load_backbone("mobilenet_v3_small", num_classes=4, image_size=64, weights="none")
    theirs = make_plan(larger, method="mobiletl", blocks=5).summary()
    with pytest.raises(PlanError, match=r"match the server's plan: image_size is 32 here, 64 in"):
        plan.check_same(theirs)


def test_the_part_whose_weights_differ_is_named_alone(plan):
    other = load_backbone("mobilenet_v3_small", num_classes=4, image_size=32, weights="none")
    block = other.blocks[2]
    with torch.no_grad():
        block.units[0].conv.weight[0, 0, 0, 0] += 1
    other = read_backbone(other.name, other.model, other.preprocessing, num_classes=4)
    theirs = make_plan(other, method="mobiletl", blocks=5)
    with pytest.raises(PlanError) as error:
        plan.check_same(theirs.summary())
    mine, changed = plan.step_digests[block.name], theirs.step_digests[block.name]
    assert f"weights of {block.name} is {mine} here, {changed} in the plan" in str(error.value)
    assert str(error.value).count("weights of") == 1


def test_a_long_list_of_differences_is_cut(plan):
    theirs = plan.summary() | {"step_digests": {}}
    more = len(plan.step_digests) - 6
    with pytest.raises(PlanError, match=f"absent in the plan; and {more} more$"):
        plan.check_same(theirs)


@pytest.mark.parametrize("method", METHODS)
def test_local_norms_train_and_do_not_travel(random_backbone, method):
    backbone = random_backbone("mobilenet_v3_small")
    plain = make_plan(backbone, method=method, blocks=3)
    plan = make_plan(backbone, method=method, blocks=3, local_norms=True)
    norms = {
        f"{name}.{key}"
        for name, part in backbone.model.named_modules()
        if isinstance(part, torch.nn.BatchNorm2d)
        for key in part.state_dict()
    }
    assert not plan.by_name.keys() & norms
    assert {spec.name for spec in plan.local_specs} <= norms
    # What trains is the same, tensor by tensor.
    assert plan.trained == plain.by_name == plain.trained
    assert len(plan.specs) + len(plan.local_specs) == len(plain.specs)
    assert plain.local_specs == () and plan.digest != plain.digest


def test_sub_plans_with_local_norms_are_those_made_narrower(random_backbone):
    backbone = random_backbone("mobilenet_v3_small")
    widest = make_plan(backbone, method="mobiletl", blocks=4, local_norms=True)
    for k in range(5):
        assert widest.narrow(k) == make_plan(
            backbone, method="mobiletl", blocks=k, local_norms=True
        )
    assert len(widest.narrow(2).local_specs) < len(widest.local_specs)


def test_local_norms_on_one_side_alone_are_named(random_backbone):
    backbone = random_backbone("mobilenet_v3_small")
    local = make_plan(backbone, method="mobiletl", blocks=2, local_norms=True)
    assert "local_specs" not in local.summary()
    with pytest.raises(PlanError, match="local_norms is False here, True in the plan"):
        make_plan(backbone, method="mobiletl", blocks=2).check_same(local.summary())
    local.check_same(json.loads(json.dumps(local.summary())))
