"""Whole runs by a strategy that is not built in: Flower's, and one of the user's own."""

import importlib
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from fleet.config import default_settings
from fleet.errors import ConfigError
from simulations import simulate
from simulations.flower_engine import own_folders

pytestmark = pytest.mark.usefixtures("quick_runs")

SMALL = {
    "clients": 3,
    "rounds": 2,
    "train-examples": 90,
    "test-examples": 30,
    "image-size": 32,
    "local-epochs": 1,
    "blocks": "0",
    "codec-up": "int8",
    "codec-down": "int8",
}
FLOWERS = "flwr.serverapp.strategy:FedMedian"
STILL = """
from strategies.algorithm import Algorithm, Step

algorithm = Algorithm(lambda state: 0, lambda updates, state, memory: Step(state, memory, {}))


def rule(updates):
    raise RuntimeError("only imported here")
"""


def test_flowers_median_behind_codecs_ends_as_our_own_does(tmp_path):
    runs = {
        name: simulate(SMALL | settings | {"run-dir": str(tmp_path / name)})
        for name, settings in {
            "flowers": {"strategy": FLOWERS},
            "ours": {"rule": "median"},
            "mean": {},
        }.items()
    }
    flowers, ours, mean = (load_file(record.model_path) for record in runs.values())
    # Sums round differently, and a quantised step may come out as its neighbour.
    apart = max(np.abs(flowers[name] - ours[name]).max() for name in ours)
    assert apart < 1e-3 < 2e-3 < max(np.abs(mean[name] - ours[name]).max() for name in ours)
    rounds = list(runs["flowers"].rounds())
    assert [len(report.clients) for report in rounds] == [0, 3, 3]
    assert rounds[-1].loss < rounds[0].loss
    assert runs["flowers"].summary()["strategy"] == FLOWERS
    sizes = [runs[name].summary()["bytes_up"] for name in ("flowers", "ours")]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"blocks": "0,1"},
            "blocks is 0,1, which gives clients unequal plans, and strategy "
            f"{FLOWERS} needs equal ones; set blocks to one value and budget-mib to off",
        ),
        ({"budget-mib": "64"}, "budget-mib is 64, which gives clients unequal plans, and"),
    ],
)
def test_settings_of_unequal_plans_are_refused_before_anybody_trains(tmp_path, settings, text):
    with pytest.raises(ConfigError, match=text):
        simulate(SMALL | settings | {"strategy": FLOWERS, "run-dir": str(tmp_path / "run")})
    assert not (tmp_path / "run" / "rounds.jsonl").exists()


def test_what_is_installed_comes_before_the_working_directory(tmp_path, monkeypatch):
    from fleet.cli.simulate import find_modules_here

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    before = list(sys.path)
    find_modules_here()
    find_modules_here()
    assert sys.path == [*before, str(tmp_path)]


def test_flowers_processes_are_told_where_own_modules_lie(tmp_path, monkeypatch):
    folders = [tmp_path / name for name in ("alone", "packaged")]
    (folders[1] / "my_package").mkdir(parents=True)
    folders[0].mkdir()
    (folders[0] / "my_still.py").write_text(STILL)
    (folders[1] / "my_package" / "__init__.py").write_text("")
    (folders[1] / "my_package" / "rules.py").write_text(STILL)
    for folder in folders:
        monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()
    settings = default_settings()
    assert own_folders(settings) == []
    assert own_folders(settings | {"rule": "krum:2", "strategy": FLOWERS}) == []
    assert own_folders(settings | {"strategy": "no_such_module:make"}) == []
    own = {"strategy": "my_still:algorithm", "rule": "my_package.rules:rule+coverage:0.5"}
    assert own_folders(settings | own) == [str(folder) for folder in folders]
