"""What a device has predicted once, it does not predict again."""

from dataclasses import replace

import pytest

from clients import forecasts as module
from clients.attempts import Experience
from clients.client import Client
from clients.forecasts import forecasts
from clients.memory import ClientMemory
from clients.share import share_of
from fleet import planner
from fleet.backbones import load_backbone
from fleet.config import default_settings, read_config
from fleet.errors import ConfigError
from fleet.measure import StepCost
from fleet.plan import make_plan

COST = StepCost(
    peak_bytes=1,
    peak_in="forward",
    saved_bytes=2,
    flops_prefix=3,
    flops_forward=4,
    flops_backward=5,
)
KEY = (1, "recompute", 8, False)


@pytest.fixture(scope="module")
def small():
    return load_backbone("mobilenet_v3_small", num_classes=3, image_size=32, weights="none")


@pytest.fixture
def memory(tmp_path):
    return ClientMemory(tmp_path, "ab12", "attic")


@pytest.fixture
def dry_runs(monkeypatch):
    """How many steps were predicted."""
    seen = []
    own = planner.dry_run
    monkeypatch.setattr(planner, "dry_run", lambda *a, **k: seen.append(a[2]) or own(*a, **k))
    return seen


def client(**settings):
    device = {"name": "attic", "data": "images"} | settings
    return Client("attic", device, read_config(default_settings()))


@pytest.mark.parametrize("budget", ["off", 64.0, 3.0])
def test_a_share_is_predicted_once_and_the_same_from_then_on(small, memory, dry_runs, budget):
    plan = make_plan(small, method="mobiletl", blocks=3)
    device = client(**{"budget-mib": budget})
    without = share_of(device, small, plan, Experience(), ClientMemory(memory._directory, "c", "x"))
    first = share_of(device, small, plan, Experience(), memory)
    count = len(dry_runs)
    assert count > 0
    again = share_of(device, small, plan, Experience(), memory)
    assert len(dry_runs) == count
    assert first == again == without
    assert first.peak_bytes > 0


def test_a_budget_below_the_floor_is_refused_each_time_and_predicted_once(small, memory, dry_runs):
    plan = make_plan(small, method="mobiletl", blocks=3)
    device = client(**{"budget-mib": 0.01})
    counts = []
    for _ in range(2):
        with pytest.raises(ConfigError, match="below the floor"):
            share_of(device, small, plan, Experience(), memory)
        counts.append(len(dry_runs))
    assert counts[0] == counts[1] > 0


def test_of_other_settings_nothing_is_known(small, memory):
    plan = make_plan(small, method="mobiletl", blocks=3)
    local = read_config(default_settings()).local
    same = {"proximal": False, "cut": 0}

    def known(plan=plan, local=local, **others):
        with forecasts(memory, small, plan, local, **same | others) as found:
            return dict(found)

    with forecasts(memory, small, plan, local, **same) as found:
        found[KEY] = COST
    assert known() == {KEY: COST}
    assert known(plan=plan.narrow(1)) == known(cut=1) == known(proximal=True) == {}
    assert known(local=replace(local, momentum=0.0)) == {}
    assert known() == {KEY: COST}


@pytest.mark.parametrize("costs", ["[", "[[1]]", '[[1, "x", 8, true, {"no": 1}]]', "7"])
def test_what_cannot_be_read_is_predicted_anew(small, memory, costs):
    plan = make_plan(small, method="mobiletl", blocks=3)
    local = read_config(default_settings()).local
    with forecasts(memory, small, plan, local, proximal=False, cut=0) as found:
        found[KEY] = COST
    facts = memory.read(module.PART).facts
    memory.write(module.PART, {}, facts | {"costs": costs})
    with forecasts(memory, small, plan, local, proximal=False, cut=0) as found:
        assert found == {}
