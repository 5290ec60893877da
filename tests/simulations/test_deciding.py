"""Code that decides a cell's result, held against what a cell really imports."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fleet.config import default_settings
from simulations.deciding import SHOWS, deciding_files, own_version
from tests.runs import SMALL

ROOT = Path(__file__).parents[2]

# What is imported where it is needed, as far as a run may need it.
EVERYTHING = {
    **SMALL,
    "backbone": "mobilenet_v3_small",
    "weights": "none",
    "learning-rate": 1e-6,  # a head on features of random weights makes gradients vast
    "clients": 2,
    "rounds": 1,
    "method": "mobiletl",
    "blocks": "0,1",
    "budget-mib": "64",
    "codec-up": "topk:0.1+int4",
    "codec-down": "int8",
    "rule": "clipped_mean",
    "strategy": "fedadam",
    "head-start": True,
    "round-timeout": 600.0,
}
CELL = """
import json, sys
from pathlib import Path
from simulations.cell_worker import _answer
task = json.loads(sys.argv[1])
Path(task["folder"]).mkdir()
_answer(task, sys.stderr)
print(json.dumps([m.__file__ for m in list(sys.modules.values()) if getattr(m, "__file__", None)]))
"""


def names(paths):
    return {Path(path).relative_to(ROOT).as_posix() for path in paths}


def test_all_that_a_cell_imports_decides_but_what_shows_results(tmp_path):
    task = {
        "key": "0" * 16,
        "folder": str(tmp_path / "runs"),
        "settings": {**default_settings(), **EVERYTHING, "seed": 0, "state-dir": ""},
        "engine": "local",
        "workers": 1,
        "adversity": {"attack": "sign_flip:10", "hostile": 0.5, "drop": 0.01},
        "keep_models": True,
    }
    ran = subprocess.run(
        [sys.executable, "-c", CELL, json.dumps(task)], capture_output=True, text=True, cwd=ROOT
    )
    assert '"event": "done"' in ran.stderr, ran.stderr
    files = json.loads(ran.stdout.splitlines()[-1])
    packages = tuple(f"{ROOT / p}/" for p in ("fleet", "clients", "strategies", "simulations"))
    imported = names(file for file in files if file.startswith(packages))
    assert len(imported) > 80
    assert {name for name in imported if not name.startswith(SHOWS)} <= names(deciding_files())


def test_what_no_cell_reaches_decides_nothing():
    deciding = names(deciding_files())
    for name in ("fleet/train.py", "strategies/gate.py", "clients/local_update.py"):
        assert name in deciding
    for start in SHOWS:
        assert list(ROOT.glob(f"{start}*")), start  # renamed or removed, it would count again
    others = ("fleet/deploy/", "fleet/cli/", "clients/doctor/", "simulations/benchmark_", *SHOWS)
    assert not [name for name in deciding if name.startswith(others)]


OWN = {  # of which `mine.rules` reaches all but the last
    "mine/__init__.py": "",
    "mine/rules.py": "from . import near\nfrom .deep.far import x\nimport scipy\n",
    "mine/near.py": "def f():\n    import beside\n",
    "mine/deep/far.py": "from ..other import y\nx = y\n",  # mine/deep has no __init__.py
    "mine/other.py": "y = 1\n",
    "beside.py": "raise RuntimeError('imported')\n",
    "mine/unused.py": "",
}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with modules of a user's own."""
    for name, text in OWN.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", list(OWN))
def test_a_change_in_what_a_module_of_ones_own_imports_is_another_version(own, name):
    imported = {*sys.modules}  # by other tests too
    before = own_version("mine.rules")
    (own / name).write_text(OWN[name] + "# changed\n")
    assert (own_version("mine.rules") != before) == (name != "mine/unused.py")
    assert not {"mine", "beside"} & (sys.modules.keys() - imported)


def test_own_modules_in_the_projects_folders_count_and_its_own_do_not_twice(own):
    mine = own / "uses_project.py"
    mine.write_text("from strategies.aggregation import combine_by_tensor\n")
    alone, counted = own_version("uses_project"), own_version("uses_project", deciding_files())
    assert alone != counted
    assert own_version("strategies.gate", deciding_files()) == ""
    assert own_version("strategies.gate") != ""


def test_what_is_installed_counts_alone_and_what_is_not_there_not_at_all():
    assert own_version("flwr.serverapp.strategy") != own_version("flwr.serverapp") != ""
    assert own_version("trimmed_mean") == own_version("sys") == own_version("nowhere.at_all") == ""
