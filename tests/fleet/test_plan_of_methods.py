"""Which tensors of a real backbone each method trains, name by name."""

import pytest

from fleet.errors import PlanError
from fleet.plan import make_plan

# The last block of torchvision's MobileNetV2: conv.0 and conv.1 are conv, norm and
# activation each; conv.2 and conv.3 are the last conv and norm.
BLOCK = "features.17.conv."
CONVS = [f"{BLOCK}{conv}.weight" for conv in ("0.0", "1.0", "2")]
SHIFTS = [f"{BLOCK}{norm}.bias" for norm in ("0.1", "1.1", "3")]
SCALES = [f"{BLOCK}{norm}.weight" for norm in ("0.1", "1.1", "3")]
STATISTICS = [
    f"{BLOCK}{norm}.running_{which}" for norm in ("0.1", "1.1", "3") for which in ("mean", "var")
]
HEAD = ["classifier.1.weight", "classifier.1.bias"]
TAIL_CONV, TAIL_SHIFT = "features.18.0.weight", "features.18.1.bias"
TAIL_REST = [f"features.18.1.{key}" for key in ("weight", "running_mean", "running_var")]

TRAINED = {
    ("head", False): HEAD,
    ("head", True): HEAD,
    ("shifts", False): [*SHIFTS, *HEAD],
    ("shifts", True): [*SHIFTS, TAIL_SHIFT, *HEAD],
    ("mobiletl", False): [*CONVS, *SHIFTS, SCALES[-1], *STATISTICS[-2:], *HEAD],
    ("mobiletl", True): [
        *CONVS,
        *SHIFTS,
        SCALES[-1],
        *STATISTICS[-2:],
        TAIL_CONV,
        TAIL_SHIFT,
        *TAIL_REST,
        *HEAD,
    ],
    ("blocks", False): [*CONVS, *SHIFTS, *SCALES, *STATISTICS, *HEAD],
    ("blocks", True): [
        *CONVS,
        *SHIFTS,
        *SCALES,
        *STATISTICS,
        TAIL_CONV,
        TAIL_SHIFT,
        *TAIL_REST,
        *HEAD,
    ],
}


@pytest.mark.parametrize(("method", "train_tail"), TRAINED)
def test_method_trains_these_tensors(random_backbone, method, train_tail):
    backbone = random_backbone("mobilenet_v2")
    plan = make_plan(backbone, method=method, blocks=1, train_tail=train_tail)
    names = [spec.name for spec in plan.specs]
    assert sorted(names) == sorted(TRAINED[method, train_tail])
    assert names == [name for name in backbone.model.state_dict() if name in plan.by_name]


def test_full_trains_all_but_the_counters(random_backbone):
    backbone = random_backbone("mobilenet_v2")
    plan = make_plan(backbone, method="full")
    counters = {name for name in backbone.model.state_dict() if name.endswith("_tracked")}
    assert plan.by_name.keys() == backbone.model.state_dict().keys() - counters
    assert plan.blocks == 17 and plan.train_tail


def test_roles_and_depths_of_two_blocks(random_backbone):
    plan = make_plan(random_backbone("mobilenet_v2"), method="mobiletl", blocks=2)
    found = {spec.name: (spec.role, spec.depth) for spec in plan.specs}
    assert found["features.17.conv.0.0.weight"] == ("weight", 1)
    assert found["features.17.conv.0.1.bias"] == ("shift", 1)
    assert found["features.17.conv.3.weight"] == ("scale", 1)
    assert found["features.16.conv.3.running_mean"] == ("mean", 2)
    assert found["features.16.conv.3.running_var"] == ("var", 2)
    assert found["classifier.1.weight"] == ("weight", 0)
    assert found["classifier.1.bias"] == ("bias", 0)


def test_squeeze_excite_trains_with_its_biases(random_backbone):
    plan = make_plan(random_backbone("mobilenet_v3_small"), method="mobiletl", blocks=1)
    gate = {name: spec.role for name, spec in plan.by_name.items() if ".fc" in name}
    assert gate == {
        "features.11.block.2.fc1.weight": "weight",
        "features.11.block.2.fc1.bias": "bias",
        "features.11.block.2.fc2.weight": "weight",
        "features.11.block.2.fc2.bias": "bias",
    }


@pytest.mark.parametrize("blocks", [-1, 18])
def test_more_blocks_than_there_are_is_refused(random_backbone, blocks):
    with pytest.raises(PlanError, match=f"blocks is {blocks}, mobilenet_v2 has 17; choose 0 to 17"):
        make_plan(random_backbone("mobilenet_v2"), method="mobiletl", blocks=blocks)


def test_unknown_method_is_refused(random_backbone):
    with pytest.raises(PlanError, match="unknown method lora; known: mobiletl, head, shifts, bloc"):
        make_plan(random_backbone("mobilenet_v2"), method="lora", blocks=1)
