"""Comparisons that really run: what is there is kept, what is damaged or failed is told.

Their workers are forks of this process and need import nothing, but where a command is ended.
"""

import csv
import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import time
import tomllib

import pandas
import psutil
import pytest
from click.testing import CliRunner

from fleet.cli import main
from fleet.config import default_settings, read_config
from fleet.errors import ConfigError
from fleet.records import ClientReport, RoundReport, RunRecord
from simulations import cell_worker, compare, frame
from simulations.cells import Keys
from simulations.compare import load_recipe, redraw
from simulations.comparison import COLUMNS
from simulations.device_flops import device_flops
from simulations.recipe import recipe_of
from tests.commands import FLEET
from tests.forked import Forked
from tests.runs import SMALL

RECIPE = {
    "title": "Two codecs",
    "seeds": 2,
    "settings": SMALL,
    "vary": {"codec": ["float32", "int8"]},
}


def start_fork(process):
    """In place of a worker's own `_start`."""
    process._process = Forked(cell_worker.main, process._said)


@pytest.fixture(scope="module")
def first(tmp_path_factory, quick_runs):
    """A comparison of two rows and two seeds, and the cells that it told of."""
    told = []
    head = ClientReport(name="any", blocks=0, num_examples=1, loss=1, peak_bytes=1, seconds=1)
    # Counted here, a step's operations are known to all that are forked.
    device_flops(
        read_config(default_settings() | SMALL),
        [RoundReport(server_round=1, accuracy=None, loss=None, clients=(head,))],
    )
    folder = tmp_path_factory.mktemp("comparison") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("simulations.cell_pool._Process._start", start_fork)
        return compare(RECIPE, folder, on_cell=lambda *facts: told.append(facts)), told


@pytest.fixture
def copy(first, tmp_path):
    """The same in a folder that a test may change."""
    return shutil.copytree(first[0].folder, tmp_path / "out")


@pytest.fixture
def quick_cells(first, quick_runs, monkeypatch):
    """Cells are run by forks, and there are no pictures of what they came to."""
    monkeypatch.setattr("simulations.cell_pool._Process._start", start_fork)
    monkeypatch.setattr("fleet.report.page.comparison_pictures", lambda *_: ([], []))


def again(folder, recipe=RECIPE, **more):
    ran, notes = [], []
    comparison = compare(
        recipe, folder, on_cell=lambda *facts: ran.append(facts), on_note=notes.append, **more
    )
    return comparison, ran, notes


def leaves_out(runs, folder):
    """What is told of a comparison of four runs before another takes the place of its tables."""
    return (
        f"{runs} of 4 runs of the comparison that is in {folder} are not asked for now; its "
        f"tables, pictures and recipe.toml are replaced, its runs stay"
    )


def test_every_cell_is_run_once_and_told(first):
    comparison, told = first
    assert [(seed, done, total, why) for _, seed, done, total, why in told] == [
        (0, 1, 4, ""),
        (1, 2, 4, ""),
        (0, 3, 4, ""),
        (1, 4, 4, ""),
    ]
    assert [row.variant.name for row in comparison.rows] == ["codec=float32", "codec=int8"]
    assert comparison.failed == 0


def test_what_is_written_says_what_the_records_say(first):
    comparison, _ = first
    folder = comparison.folder
    cells = [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]
    assert len(cells) == 4
    for cell in cells:
        summary = RunRecord(folder / cell["run"]).summary()
        assert cell["status"] == "done"
        for ours, theirs in (
            ("accuracy", "accuracy"),
            ("bytes-up", "bytes_up"),
            ("bytes-down", "bytes_down"),
            ("client-memory", "peak_client_bytes"),
            ("refused", "refused"),
        ):
            assert cell[ours] == pytest.approx(summary[theirs])
        assert cell["device-flops"] > 0
    rows = list(csv.DictReader((folder / "table.csv").open()))
    for row, name in zip(rows, ("codec=float32", "codec=int8"), strict=True):
        accuracy = [cell["accuracy"] for cell in cells if cell["row"] == name]
        assert row["row"] == name and row["seeds"] == "2"
        assert float(row["accuracy %, mean"]) == pytest.approx(100 * sum(accuracy) / 2)
        sent = [cell["bytes-up"] / 2**20 for cell in cells if cell["row"] == name]
        assert float(row["MiB up, mean"]) == pytest.approx(sum(sent) / 2)
    table = (folder / "table.md").read_text()
    assert "codec=int8" in table and "difference, points" in table
    page = (folder / "report.html").read_text()
    assert "Two codecs" in page and page.count("<svg") >= 2
    assert (folder / "accuracy-by-bytes.png").is_file()


def test_int8_sends_less(first):
    full, small = first[0].values
    assert all(small["bytes-up"][seed] < 0.5 * full["bytes-up"][seed] for seed in (0, 1))


def test_the_frame_has_a_line_a_row_seed_and_round(first):
    frame = first[0].frame()
    assert list(frame.index.names) == ["row", "seed", "round"]
    assert len(frame) == 2 * 2 * 3
    assert frame.loc[("codec=int8", 1, 2), "accuracy"] == pytest.approx(
        first[0].values[1]["accuracy"][1]
    )


def test_a_folder_has_the_frame_of_what_lies_in_it(first, copy):
    comparison = first[0]
    run, _ = comparison.rows[1].runs[0]
    for of, same in ((comparison, comparison.frame()), (run, frame(run.path))):
        pandas.testing.assert_frame_equal(frame(of), same)
    pandas.testing.assert_frame_equal(frame(str(copy)), comparison.frame())
    pandas.testing.assert_frame_equal(frame(run.rounds()), frame(str(run.path)))
    assert len(frame(run.path)) == SMALL["rounds"] + 1
    for wrong, text in (
        (copy / "runs", "holds no run: there is no config.toml in it"),
        ("nowhere", "/nowhere holds no run"),
        ("a" * 300, "File name too long; name the folder of a run"),
        (3, "a frame is of a run's record, a comparison, the folder of either, or rounds; got 3"),
    ):
        with pytest.raises(ConfigError, match=text):
            frame(wrong)


def test_nothing_is_run_again_and_the_files_are_the_same(first, copy):
    before = {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()}
    _, ran, notes = again(copy)
    assert ran == [] and notes == ["4 of 4 runs are there already"]
    assert {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()} == before


@pytest.mark.usefixtures("quick_cells")
def test_runs_without_their_models_are_run_again_to_keep_them(first, copy):
    recipe = RECIPE | {"seeds": [1], "vary": {"codec": ["int8"]}}
    comparison, ran, notes = again(copy, recipe, keep_models=True)
    assert [seed for _, seed, *_ in ran] == [1]
    assert notes == [
        "0 of 1 runs are there already",
        "1 of 1 runs are there without their models; they are run again, as --keep-models asks "
        "for them",
        leaves_out(3, copy),
        "begins with codec=int8, seed 1",
    ]
    record, _ = comparison.rows[0].runs[1]
    assert record.model_path.is_file()
    before = RunRecord(first[0].folder / "runs" / record.path.name).rounds()
    assert [r.accuracy for r in record.rounds()] == [r.accuracy for r in before]
    _, ran, notes = again(copy, recipe, keep_models=True)
    assert ran == [] and notes == ["1 of 1 runs are there already"]
    model = record.model_path.read_bytes()
    record.model_path.write_bytes(model[:-1] + bytes([model[-1] ^ 1]))
    _, ran, notes = again(copy, recipe)  # whether models are asked for or not
    place = f"{record.path}.corrupt-1"
    assert len(ran) == 1 and notes[0] == (
        "the run of codec=int8, seed 1, is damaged (model.safetensors is not as it was written); "
        f"it is set aside as {place} and run again"
    )


@pytest.mark.usefixtures("quick_cells")
def test_a_kept_model_that_was_removed_to_make_room_is_no_damage(copy):
    recipe = RECIPE | {"seeds": [1], "vary": {"codec": ["int8"]}}
    comparison, _, _ = again(copy, recipe, keep_models=True)
    comparison.rows[0].runs[1][0].model_path.unlink()
    _, ran, notes = again(copy, recipe)
    assert ran == [] and notes == ["1 of 1 runs are there already"]
    _, ran, _ = again(copy, recipe, keep_models=True)
    assert len(ran) == 1


@pytest.mark.usefixtures("quick_cells")
def test_a_run_by_workers_is_the_same_run(copy):
    recipe = RECIPE | {"seeds": [0, 2], "vary": {"codec": ["int8"]}}
    with_workers = recipe | {"settings": SMALL | {"workers": 2}}
    comparison, ran, notes = again(copy, with_workers)
    assert [seed for _, seed, *_ in ran] == [2] and comparison.failed == 0
    assert notes == [
        "1 of 2 runs are there already",
        leaves_out(3, copy),
        "begins with codec=int8, seed 2",
    ]
    _, ran, notes = again(copy, recipe)
    assert ran == [] and notes == ["2 of 2 runs are there already"]


def test_a_runs_own_configuration_is_a_recipe_of_that_run(first, copy):
    before = first[0].rows[1].runs[1][0]
    asked = load_recipe(before.config_path)
    (variant,) = asked.variants()
    assert asked.seeds == (1,) and variant == first[0].rows[1].variant.__class__(
        **vars(first[0].rows[1].variant) | {"name": "as set"}
    )
    there = sorted((copy / "runs").iterdir())
    _, ran, notes = again(copy, before.config_path)
    assert ran == [] and notes == ["1 of 1 runs are there already", leaves_out(3, copy)]
    assert sorted((copy / "runs").iterdir()) == there


def test_a_runs_own_folder_is_not_written_over(copy):
    (run, *_) = (path for path in (copy / "runs").iterdir() if path.is_dir())
    with pytest.raises(ConfigError, match=r"is the folder of a run, .* name another folder"):
        again(run)


@pytest.mark.parametrize("name", ["recipe.toml", "table.csv", "cells.jsonl", "report.html"])
def test_a_folder_with_files_of_the_users_own_is_refused_and_stays_as_it_was(tmp_path, name):
    (tmp_path / "runs").mkdir()  # as of `fleet simulate`, beside which a comparison may be
    if name == "cells.jsonl":
        (tmp_path / "runs").rmdir()
    (tmp_path / name).write_text("# mine")
    with pytest.raises(
        ConfigError, match=rf"has a file {name} that no comparison wrote, .* with --out"
    ):
        compare({"settings": {"rounds": 1}}, tmp_path)
    assert (tmp_path / name).read_text() == "# mine"
    assert {path.name for path in tmp_path.iterdir()} <= {name, "runs"}


def without_measurements(cell):
    return json.dumps(json.loads(cell) | {"measured": {}})


DAMAGE = {  # run → its file, what becomes of that, and what is said of it
    ("codec=float32", 0): ("rounds.jsonl", lambda whole: "{", "damaged ("),
    ("codec=float32", 1): ("summary.json", lambda whole: "{", "damaged ("),
    ("codec=int8", 0): ("cell.json", lambda whole: "{", "damaged ("),
    ("codec=int8", 1): ("cell.json", without_measurements, "cell.json is damaged: 'device_flops'"),
}


@pytest.mark.usefixtures("quick_cells")
def test_damaged_runs_are_set_aside_named_and_run_again_and_a_further_seed_runs_too(first, copy):
    rows = {row.variant.name: row for row in first[0].rows}
    keys = [rows[name].runs[seed][0].path.name for name, seed in DAMAGE]
    before = [accuracies(copy / "runs" / key) for key in keys]
    damaged = {}
    for key, (file, damage, _) in zip(keys, DAMAGE.values(), strict=True):
        path = copy / "runs" / key / file
        path.write_text(damage(path.read_text()))
        damaged[key] = path.read_text()
    comparison, ran, notes = again(copy, RECIPE | {"seeds": 3}, jobs=2)
    assert notes[-1].startswith("begins with ") and notes[-1].endswith(", and 1 more at once")
    further = [("codec=float32", 2), ("codec=int8", 2)]
    assert sorted((row, seed) for row, seed, *_ in ran) == sorted([*DAMAGE, *further])
    assert all(sorted(row.runs) == [0, 1, 2] for row in comparison.rows)
    for key, ((name, seed), (file, _, said)), note in zip(
        keys, DAMAGE.items(), notes, strict=False
    ):
        place = copy / "runs" / f"{key}.corrupt-1"
        assert (place / file).read_text() == damaged[key]
        assert note.startswith(f"the run of {name}, seed {seed}, is damaged (") and said in note
        assert f"it is set aside as {place} and run again" in note
    assert [accuracies(copy / "runs" / key) for key in keys] == before


def accuracies(run):
    return [report.accuracy for report in RunRecord(run).rounds()]


@pytest.mark.usefixtures("quick_cells")
def test_a_failed_cell_is_told_and_the_rest_goes_on(tmp_path, monkeypatch):
    (tmp_path / "bad_rule.py").write_text("def rule(updates):\n    raise RuntimeError('no luck')\n")
    (tmp_path / "killer.py").write_text("import os\n\ndef rule(updates):\n    os._exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    recipe = {
        "settings": SMALL | {"rounds": 1},
        "vary": {"rule": ["bad_rule:rule", "killer:rule", "mean"]},
    }
    comparison, ran, _ = again(tmp_path / "out", recipe)
    bad, killed, well = comparison.rows
    reason, details = bad.failed[0]
    assert "the strategy failed in round 1" in reason and "no luck" in reason
    assert "Traceback" in details
    assert killed.failed[0][0] == "its process ended with code 3"
    cells = [json.loads(line) for line in (tmp_path / "out" / "cells.jsonl").open()]
    assert [cell["status"] for cell in cells] == ["failed", "failed", "done"]
    assert cells[0]["reason"] == reason and cells[0]["details"] == details
    assert list(well.runs) == [0] and comparison.failed == 2
    assert len(ran) == 3
    page = (tmp_path / "out" / "report.html").read_text()
    assert "2 more failed" in page and "no luck" in page
    assert "0 of 1" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.usefixtures("quick_cells")
def test_a_cell_on_a_full_disk_fails_at_once_with_a_comparisons_way_out(tmp_path, monkeypatch):
    def write(handle, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fleet.durable._write", write)  # of checkpoints, by workers too
    began = time.monotonic()
    comparison, _, _ = again(tmp_path / "out", RECIPE | {"seeds": 1})
    assert time.monotonic() - began < 60  # a run waits for two minutes
    for row in comparison.rows:
        reason, _ = row.failed[0]
        assert "cannot write checkpoint" in reason
        assert reason.endswith(
            ": No space left on device; free space there, then run the same command again"
        )
    assert not [*(tmp_path / "out" / "runs").iterdir()]


PATIENT = """
import time
from pathlib import Path

from strategies.aggregation import weighted_mean

HERE = Path(__file__).parent


def rule(updates):
    ended = HERE.glob("out/runs/*/cell.json")
    while len([*ended]) >= int((HERE / "may").read_text()):
        time.sleep(0.02)
        ended = HERE.glob("out/runs/*/cell.json")
    return weighted_mean(updates)
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Function that starts a command of three cells; every call starts the same one.

    Its rule waits where as many cells have ended as `may` says.
    """
    (tmp_path / "patient.py").write_text(PATIENT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    command = ["compare", "--out", str(tmp_path / "out"), "--seeds", "3"]
    settings = SMALL | {"rounds": 1, "rule": "patient:rule"}
    command += [f"--set={key}={value}" for key, value in settings.items()]
    started = []

    def start(as_fork):
        # Either has workers that are processes of their own.
        if not as_fork:
            process = subprocess.Popen([*FLEET, *command], stderr=subprocess.PIPE, text=True)
            started.append((process, process.stderr))
            return started[-1]
        read, write = os.pipe()
        with open(write, "w") as errors:
            process = Forked(lambda: main(command), errors)
        started.append((process, os.fdopen(read)))
        return started[-1]

    yield start
    for process, errors in started:
        process.kill()
        process.wait()
        errors.close()


@pytest.mark.parametrize(
    ("as_fork", "number"),
    [
        (True, signal.SIGINT),
        # The command as the process that it is; and what ends a run as Ctrl-C does, which
        # tests of stopping hold.
        pytest.param(False, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(True, signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_sweep_that_is_killed_goes_on_where_it_stopped_and_a_signal_ends_it(
    sweep, tmp_path, as_fork, number
):
    (tmp_path / "may").write_text("1")
    (process, errors), runs = sweep(as_fork), tmp_path / "out" / "runs"
    assert errors.readline() == "0 of 3 runs are there already\n"
    assert errors.readline() == "begins with as set, seed 0\n"
    assert "1 of 3: as set, seed 0" in errors.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 300
    while list(runs.glob("*.part-*")) and time.monotonic() < deadline:
        time.sleep(0.1)  # its worker notices, and clears up
    assert len(list(runs.iterdir())) == 1

    (tmp_path / "may").write_text("2")
    process, errors = sweep(as_fork)
    assert "1 of 3 runs are there already" in errors.readline()
    assert "begins with as set, seed 1" in errors.readline()
    assert "2 of 3: as set, seed 1" in errors.readline()
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    os.kill(process.pid, number)
    assert process.wait(timeout=300) == 128 + number
    assert not [worker for worker in workers if lives(worker)]
    said = errors.read()
    assert f"stopped; the same command goes on with what is in {tmp_path / 'out'}" in said
    assert "Traceback" not in said
    assert len(list(runs.iterdir())) == 2
    assert "| as set | 2 of 3 |" in (tmp_path / "out" / "table.md").read_text()
    *_, last = (tmp_path / "out" / "cells.jsonl").read_text().splitlines()
    assert json.loads(last)["reason"] == "not run yet: the comparison was stopped"
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.usefixtures("quick_cells")
def test_a_worker_of_a_background_job_ends_with_its_input_and_leaves_no_part(tmp_path):
    """A shell has SIGINT ignored there, by all that it starts."""

    def work():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        cell_worker.main()

    task = {
        "key": "any",
        "folder": str(tmp_path / "runs"),
        "settings": default_settings() | SMALL | {"rounds": 10_000, "run-dir": ""},
        "engine": "local",
        "workers": 1,
        "adversity": {},
        "keep_models": False,
    }
    with (tmp_path / "said").open("w") as errors:
        worker = Forked(work, errors)
    try:
        worker.stdin.write(json.dumps(task) + "\n")
        worker.stdin.flush()
        assert json.loads(worker.stdout.readline())["event"] == "round"
        assert len([*(tmp_path / "runs").iterdir()]) == 1
        worker.stdin.close()
        assert worker.wait(timeout=300) == 130, (tmp_path / "said").read_text()
        assert not [*(tmp_path / "runs").iterdir()]
    finally:
        worker.kill()


def lives(process):
    """Whether it runs; one that has ended is listed until its parent, or init, takes notice."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("partition", "dirichlet:x", "'dirichlet:x' needs alpha, a number above 0, got 'x'; known"),
        ("partition", "foo", "partition 'foo' is unknown; known: iid"),
        ("data", "nope", "data 'nope' is neither a known name nor a path here; known: digits"),
        ("data", "~nobody-here/x", "data ~nobody-here/x begins with a home, and there is no user"),
        ("weights", "~nobody-here/x", "weights ~nobody-here/x begins with a home, and there is"),
        ("weights", "nope.pth", "no weights file nope.pth; name a .safetensors or .pth file"),
        ("backbone", "nope", "unknown backbone nope; examples: efficientnet_lite0"),
        ("method", "foo", "unknown method foo; known: mobiletl"),
        ("blocks", "99", "blocks is 99, efficientnet_lite0 has 16; choose 0 to 16"),
        ("sampled", 7, "sampled is 7, and the fleet has 2 clients"),
    ],
)
def test_a_typo_is_found_before_any_cell_runs(tmp_path, key, value, why):
    recipe = {
        "settings": SMALL | {"method": "mobiletl"},
        "rows": [{"name": "good"}, {"name": "bad", key: value}],
    }
    with pytest.raises(ConfigError, match=re.escape(why)) as error:
        again(tmp_path / "out", recipe)
    assert str(error.value).startswith("row bad: ") and "\n" not in str(error.value)
    assert not [*(tmp_path / "out").glob("runs/*")]


def test_two_comparisons_in_one_folder_are_refused(tmp_path):
    from simulations.compare import _alone_in

    with _alone_in(tmp_path / "out"), pytest.raises(ConfigError, match="another comparison is run"):
        compare(RECIPE, tmp_path / "out")


def test_a_key_is_of_all_that_decides_the_result(tmp_path, monkeypatch):
    def key(seed=0, **settings):
        (variant,) = load_recipe({"settings": SMALL | settings}).variants()
        return Keys().of(variant, seed)

    assert key() == key() == key(**{"cache-mib": 7.0})
    others = [key(seed=1), key(rounds=3), key(drop=0.1), key(engine="flower")]
    (tmp_path / "mine.py").write_text("def rule(updates):\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    others.append(key(rule="mine:rule"))
    (tmp_path / "mine.py").write_text("def rule(updates):\n    return 2\n")
    others.append(key(rule="mine:rule"))
    monkeypatch.setattr("simulations.cells.code_version", lambda files: "other")
    others.append(key())
    assert len({key(), *others}) == len(others)
    assert key() == others[-1]


@pytest.mark.usefixtures("quick_cells")
def test_a_rule_whose_helper_is_edited_in_between_is_run_again(tmp_path, monkeypatch):
    (tmp_path / "edited_rule.py").write_text(
        "def rule(updates):\n"
        "    from edited_helper import REASON\n\n"
        "    raise RuntimeError(REASON)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    recipe = {"settings": SMALL | {"rounds": 1, "rule": "edited_rule:rule"}}
    keys = set()
    for reason in ("at first", "edited since"):
        (tmp_path / "edited_helper.py").write_text(f"REASON = {reason!r}\n")
        comparison, ran, _ = again(tmp_path / "out", recipe)
        assert len(ran) == 1
        assert reason in comparison.rows[0].failed[0][0]
        keys.add(Keys().of(comparison.rows[0].variant, 0))
    assert len(keys) == 2


def test_data_and_code_are_looked_at_anew_by_every_comparison(tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    (variant,) = load_recipe({"settings": SMALL | {"data": str(data)}}).variants()
    before = Keys().of(variant, 0)
    (data / "new.png").write_bytes(b"new")
    after = Keys().of(variant, 0)
    package = tmp_path / "strategies"
    package.mkdir()
    (package / "server_app.py").write_text("app = 1\n")
    monkeypatch.setattr("simulations.deciding._ROOT", tmp_path)
    keys = [Keys().of(variant, 0)]
    (package / "server_app.py").write_text("app = 2\n")
    keys.append(Keys().of(variant, 0))
    assert len({before, after, *keys}) == 4


def test_more_than_ten_thousand_runs_are_asked_about(tmp_path):
    options = ["compare", "--out", str(tmp_path / "out"), "--seeds", "10001"]
    result = CliRunner().invoke(main, options)
    assert result.exit_code == 1
    assert (
        "this is 10,001 runs, more than 10,000; with --yes they are run, all of them"
        in result.output
    )
    assert not (tmp_path / "out").exists()


def test_the_command_prints_table_and_failures(copy, tmp_path):
    options = ["compare", "--out", str(copy), "--seeds", "2", "--vary", "codec=float32,int8"]
    options += [f"--set={key}={value}" for key, value in SMALL.items()]
    options += ["--columns", "accuracy,bytes-up"]
    result = CliRunner().invoke(main, options)
    assert result.exit_code == 0, result.output
    assert "codec=int8" in result.output and "MiB up" in result.output
    as_json = CliRunner().invoke(main, [*options, "--format", "json"])
    assert len(json.loads(as_json.stdout)) == 4


def test_a_table_that_goes_to_no_terminal_has_every_column_in_a_line(copy):
    options = ["compare", "--out", str(copy), "--seeds", "2", "--vary", "codec=float32,int8"]
    options += [f"--set={key}={value}" for key, value in SMALL.items()]
    said = CliRunner().invoke(main, options).stdout
    (head,) = [line for line in said.splitlines() if line.split()[:2] == ["row", "seeds"]]
    assert all(column.heading in head for column in COLUMNS.values())
    (small,) = [line for line in said.splitlines() if line.startswith(" codec=int8 ")]
    assert "…" not in small and "more columns" not in said


def test_columns_that_name_none_are_refused(tmp_path):
    result = CliRunner().invoke(main, ["compare", "--out", str(tmp_path / "out"), "--columns", ""])
    assert result.exit_code == 1
    assert "--columns names none, got ''; name some, as accuracy,bytes-up, or" in result.output


def test_a_comparisons_folder_is_drawn_again(copy):
    before = {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()}
    for name in ("report.html", "table.md", "table.csv", "accuracy-by-row.svg"):
        (copy / name).unlink()
    result = CliRunner().invoke(main, ["report", str(copy)])
    assert result.exit_code == 0, result.output
    assert "codec=int8" in result.output and f"report {copy}/report.html" in result.output
    assert {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()} == before
    as_csv = CliRunner().invoke(main, ["report", str(copy), "--format", "csv"])
    assert as_csv.stdout == (copy / "table.csv").read_text()
    refused = CliRunner().invoke(main, ["report", str(copy), "--files", "elsewhere"])
    assert f"{copy} is the folder of a comparison, and --files is for a run's" in refused.output


def test_of_a_comparison_that_is_drawn_again_a_damaged_run_is_told(first, copy):
    run = copy / "runs" / first[0].rows[1].runs[0][0].path.name
    (run / "rounds.jsonl").write_text("{")
    result = CliRunner().invoke(main, ["report", str(copy)])
    assert result.exit_code == 0
    told = f"its run runs/{run.name} is damaged: rounds.jsonl is not as it was written"
    assert f"failed: codec=int8, seed 0: {told}" in result.output
    assert "codec=float32" in result.output
    shutil.rmtree(copy / "runs")
    result = CliRunner().invoke(main, ["report", str(copy)])
    assert result.exit_code == 1  # there is nothing left to report
    assert result.output.count("failed: codec=") == 4 and " is missing" in result.output
    (copy / "cells.jsonl").write_text("[]\n")
    with pytest.raises(ConfigError, match=r"cells\.jsonl is damaged: .*; run the comparison again"):
        redraw(copy)
    (copy / "recipe.toml").unlink()
    with pytest.raises(ConfigError, match=r"holds no comparison: there is no recipe\.toml"):
        redraw(copy)


def test_of_a_comparison_that_has_no_tables_yet_that_is_said(tmp_path):
    from simulations.compare import _alone_in

    folder = tmp_path / "out"
    with _alone_in(folder):
        result = CliRunner().invoke(main, ["report", str(folder)])
    assert result.exit_code == 1
    assert (
        f"{folder} is the folder of a comparison that has no tables yet: none of its runs has "
        f"ended, or it goes on; they are there once fleet compare ends or is stopped"
    ) in result.output


def test_the_recipe_in_the_folder_is_the_one_that_was_asked_for(first):
    asked = first[0].recipe
    assert load_recipe(first[0].folder / "recipe.toml") == asked
    whole = load_recipe(
        {
            "title": "All",
            "seeds": [3, 1],
            "target": 0.5,
            "columns": ["accuracy"],
            "within": ["partition"],
            "settings": SMALL | {"hostile": 0.5, "attack": "nan"},
            "vary": {"partition": ["iid"], "head-start": [True, False]},
            "rows": [{"name": 'a "b"', "codec": "int8"}],
        }
    )
    assert recipe_of(tomllib.loads(whole.as_toml()), tuple(COLUMNS)) == whole


def test_a_row_named_like_a_formula_is_text_to_a_spreadsheet(first, tmp_path):
    rows = [
        dataclasses.replace(row, variant=dataclasses.replace(row.variant, name=name))
        for row, name in zip(first[0].rows, ('=HYPERLINK("x")', "@SUM(1)"), strict=True)
    ]
    comparison = dataclasses.replace(first[0], folder=tmp_path, rows=rows)
    names, changes = [], []
    for line in csv.DictReader(comparison._csv().splitlines()):
        names.append(line["row"])
        changes.append(float(line["accuracy %, difference"]))
    assert names == ['\'=HYPERLINK("x")', "'@SUM(1)"] and changes[0] == 0
