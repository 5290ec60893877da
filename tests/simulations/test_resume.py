"""Simulated runs that are ended by force and go on, from the command line and from Python."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from fleet.checkpoint import Checkpoints
from fleet.cli import main
from fleet.errors import CheckpointError, ConfigError
from fleet.records import RunRecord
from simulations import simulate
from simulations.launch import resumed

pytestmark = pytest.mark.usefixtures("quick_runs")

SMALL = {
    "backbone": "mobilenet_v3_small",
    "weights": "none",
    "clients": 3,
    "rounds": 3,
    "train-examples": 90,
    "test-examples": 30,
    "image-size": 32,
    "local-epochs": 1,
    "blocks": "0,1",
}
REMEMBERING = {
    "strategy": "fedadam",
    "server-learning-rate": 0.01,
    "codec-up": "int4+feedback",
    "codec-down": "int4+feedback",
    "rule": "clipped_mean",
}


class Ended(Exception):
    """What a run is ended by in these tests."""


def end_after(server_round, settings, **options):
    """A run that fails once it has done a round."""

    def end(report):
        if report.server_round == server_round:
            raise Ended

    with pytest.raises(Ended):
        simulate(settings, on_round=end, **options)


def go_on(folder, rounds=None, **options):
    settings, adversity = resumed(folder)
    settings |= {} if rounds is None else {"rounds": rounds}
    return simulate(settings, **adversity, **options)


def assert_same(record, other):
    """Bit for bit the same model, and the same rounds but for what was measured in them."""
    ours, theirs = (load_file(r.model_path) for r in (record, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert rounds_of(record) == rounds_of(other)
    assert [r.server_round for r in record.rounds()] == list(range(len(rounds_of(record))))


def rounds_of(record):
    measured = {"seconds", "clients", "peak_client_bytes", "bytes_up", "bytes_by_role"}
    measured |= {"bytes_by_client"}  # a header grows with the digits of a client's measurements
    return [{k: v for k, v in vars(r).items() if k not in measured} for r in record.rounds()]


def kill(report):
    if report.server_round == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_that_was_killed_goes_on_from_the_command_line_bit_for_bit(tmp_path):
    folder = tmp_path / "my run"
    settings = SMALL | REMEMBERING | {"run-dir": str(folder)}
    arguments = {"settings": settings, "on_round": kill, "drop": 0.2}
    killed = get_context("fork").Process(target=simulate, kwargs=arguments)
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert len(list(RunRecord(folder).rounds())) == 2
    moved = folder.rename(tmp_path / "elsewhere")  # a run is where its folder is
    result = CliRunner().invoke(main, ["simulate", "--resume", str(moved), "--format", "json"])
    assert result.exit_code == 0, result.output
    assert "round 2/3" in result.stderr and "round 1/3" not in result.stderr
    assert json.loads(result.stdout)["rounds"] == 3
    whole = simulate(SMALL | REMEMBERING | {"run-dir": str(tmp_path / "whole")}, drop=0.2)
    assert_same(RunRecord(moved), whole)
    config = tomllib.loads((moved / "config.toml").read_text())
    assert config["simulation"] == {"drop": 0.2}


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "flwr.serverapp.strategy:FedAdam", "blocks": "1", "codec-down": "int8"},
        pytest.param(
            {"evaluation": "clients", "validation-fraction": 0.2, "local-norms": True},
            marks=pytest.mark.slow,
        ),
        {"head-start": True, "objective": "feddyn", "strategy": "feddyn", "rule": "mean"},
    ],
    ids=["Flower's own", "clients evaluate, local norms", "head start, feddyn"],
)
def test_what_a_strategy_and_its_clients_remember_is_there_again(tmp_path, settings):
    settings = SMALL | settings
    folder = tmp_path / "ended"
    end_after(1, settings | {"run-dir": str(folder)})
    # Another number of processes comes to the same end.
    record = go_on(folder, workers=2)
    assert_same(record, simulate(settings | {"run-dir": str(tmp_path / "whole")}))


def test_a_run_ended_before_its_first_checkpoint_begins_anew_in_its_folder(tmp_path):
    folder = tmp_path / "ended"
    RunRecord.create(str(folder), SMALL)
    record = simulate(SMALL | {"run-dir": str(folder), "resume": True})
    assert_same(record, simulate(SMALL | {"run-dir": str(tmp_path / "whole")}))


def test_a_run_that_has_ended_goes_on_with_more_rounds(tmp_path):
    folder = tmp_path / "short"
    simulate(SMALL | {"rounds": 2, "run-dir": str(folder)})
    record = go_on(folder, rounds=3)
    assert_same(record, simulate(SMALL | {"run-dir": str(tmp_path / "whole")}))
    assert record.summary()["rounds"] == 3
    before = rounds_of(record)
    assert rounds_of(go_on(folder)) == before  # there is nothing left to do


def test_a_run_whose_newest_checkpoint_is_damaged_repeats_a_round(tmp_path, caplog):
    settings = SMALL | REMEMBERING
    folder = tmp_path / "ended"
    end_after(2, settings | {"run-dir": str(folder)})
    newest = folder / "checkpoints" / "000002.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    record = go_on(folder)
    assert f"checkpoint {newest} is damaged" in caplog.text
    assert_same(record, simulate(settings | {"run-dir": str(tmp_path / "whole")}))


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A run that was ended after round 1; for tests that only look."""
    folder = tmp_path_factory.mktemp("runs") / "ended"
    end_after(1, SMALL | REMEMBERING | {"run-dir": str(folder)})
    return folder


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"strategy": "fedyogi"}, "strategy is fedyogi, and was fedadam as the run in .* began; "),
        ({"codec-up": "int8"}, "codec-up is int8, and was int4\\+feedback as the run in"),
        ({"seed": 7}, "seed is 7, and was 0 as the run in .*; leave it so, or begin anew in ano"),
        ({"blocks": "0"}, "blocks is 0, and was 0,1 as"),
        ({"clients": 4}, "clients is 4, and was 3 as the run"),
        ({"rounds": 1, "min-clients": 1}, None),
    ],
)
def test_another_setting_is_refused_with_both_values(ended, changes, text, tmp_path):
    settings, _ = resumed(ended)
    copy = shutil.copytree(ended, tmp_path / "copy")
    settings |= changes | {"run-dir": str(copy)}
    if text is None:  # these may be others
        assert simulate(settings).summary()["rounds"] == 1
        return
    with pytest.raises(ConfigError, match=text):
        simulate(settings)


def test_fewer_rounds_than_are_done_are_refused(tmp_path):
    end_after(2, SMALL | {"run-dir": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match=r"rounds is 1, and the run in .* has done 2; raise it"):
        go_on(tmp_path / "run", rounds=1)


def test_the_command_refuses_a_round_that_is_done(ended):
    for rounds in ("0", "1"):
        arguments = ["simulate", "--resume", str(ended), "--rounds", rounds]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 1
        assert f"rounds is {rounds}, and the run in {ended} has done 1; name a later round" in (
            result.output
        )


def test_another_network_is_refused(ended):
    settings, _ = resumed(ended)
    with pytest.raises(ConfigError, match=r"drop is 0\.5, and was not set as the run in"):
        simulate(settings, drop=0.5)


def test_other_weights_are_refused(ended, tmp_path, monkeypatch):
    copy = shutil.copytree(ended, tmp_path / "copy")
    checkpoints = Checkpoints(copy / "checkpoints")
    number, tree = checkpoints.load()
    checkpoints.save(number, tree | {"plan_digest": "0" * 64})
    with pytest.raises(ConfigError, match=r"the plan is [0-9a-f]{8}, and was 00000000 as the run"):
        go_on(copy)


def test_rounds_without_a_checkpoint_are_not_thrown_away(ended, tmp_path):
    copy = shutil.copytree(ended, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints")
    before = (copy / "rounds.jsonl").read_bytes()
    text = "has rounds on record and no checkpoint, so it cannot go on; begin it anew in another"
    with pytest.raises(CheckpointError, match=text):
        go_on(copy)
    assert (copy / "rounds.jsonl").read_bytes() == before


def test_what_clients_remembered_of_a_run_that_has_ended_is_missed_in_words(tmp_path):
    folder = tmp_path / "run"
    simulate(SMALL | REMEMBERING | {"rounds": 1, "run-dir": str(folder)})
    with pytest.raises(ConfigError, match="has ended, and what its clients remembered of it is"):
        go_on(folder, rounds=2)
    assert (folder / "summary.json").exists()


def test_no_two_processes_run_in_one_folder(ended):
    code = (
        "import sys; from pathlib import Path; from fleet.records import RunRecord\n"
        "with RunRecord(Path(sys.argv[1])).held():\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, ended], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        record = RunRecord(ended)
        text = "goes on in another process; end that first, or name another run-dir"
        with pytest.raises(ConfigError, match=text), record.held(patience=0.2):
            pass
        other.stdin.close()
        other.wait()
        with record.held():
            pass


UNSTORABLE = """
from strategies.algorithm import Algorithm, Step

class Memory:
    pass

def step(updates, state, memory):
    tensors = {**state.tensors, **{n: state.tensors[n] + d for n, d in updates[0].delta.items()}}
    return Step(type(state)(state.plan, tensors), memory, {})

algorithm = Algorithm(lambda state: {"mine": Memory()}, step)
"""


def test_a_strategy_whose_memory_cannot_be_kept_runs_on_and_says_so(tmp_path, monkeypatch, caplog):
    (tmp_path / "my_strategy.py").write_text(UNSTORABLE)
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "run"
    settings = {"strategy": "my_strategy:algorithm", "rounds": 2, "run-dir": str(folder)}
    record = simulate(SMALL | settings)
    assert record.summary()["rounds"] == 2
    warnings = [r.getMessage() for r in caplog.records if "cannot be resumed" in r.getMessage()]
    assert warnings == [
        "this run cannot be resumed, should it be ended: /algorithm/mine is a Memory, which a "
        "checkpoint cannot hold; keep numbers, texts and NumPy arrays of numbers, and dicts, "
        "lists and tuples of these"
    ]
    assert not record.checkpoints_path.exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--resume", "nowhere"], "holds no run: there is no config.toml in it"),
        (["recipe.toml", "--resume", "x"], "recipe recipe.toml and --resume x exclude each other"),
    ],
)
def test_the_command_says_what_it_cannot_go_on_with(arguments, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["simulate", *arguments])
    assert result.exit_code == 1 and text in result.stderr
    assert not os.listdir(tmp_path)


def test_resume_without_a_folder_is_refused():
    with pytest.raises(ConfigError, match="resume is on and run-dir is empty; name the run's"):
        simulate({"resume": True})


def test_a_damaged_config_is_named(ended, tmp_path):
    copy = Path(shutil.copytree(ended, tmp_path / "copy"))
    (copy / "config.toml").write_text("settings = ")
    with pytest.raises(ConfigError, match=r"config\.toml is not TOML"):
        go_on(copy)
