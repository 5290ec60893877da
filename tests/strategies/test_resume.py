"""A server that is ended at any step of its writing goes on, and ends where it would have."""

import contextlib
import copy
import dataclasses
import errno
import itertools
import logging
import math
import os
import shutil
from pathlib import Path

import pytest
from numpy.testing import assert_array_equal
from safetensors.numpy import load_file

from fleet import records
from fleet.checkpoint import Checkpoints
from fleet.errors import CheckpointError, ConfigError
from fleet.message import Enrolment, write_enrolment
from fleet.records import RunRecord
from strategies.algorithm import Algorithm, algorithm
from strategies.sampling import Roster
from tests.toy_fleet import BLOCKS, ROUNDS, Fleet, Snapshots, at_every_step, repeated_rounds

FEEDBACK = {"codec-up": "int4+feedback", "codec-down": "int4+feedback"}
RUNS = {
    "fedadam, feedback both ways": FEEDBACK
    | {"strategy": "fedadam", "server-learning-rate": 0.01, "rule": "clipped_mean"},
    "feddyn": {"strategy": "feddyn", "objective": "feddyn", "rule": "mean", "codec-down": "int8"},
    "centred clipping": FEEDBACK | {"rule": "centred_clipping", "strategy": "fedavgm"},
}
FIRST = "fedadam, feedback both ways"


def assert_same_end(folder, strategy, whole_folder, whole):
    """Bit for bit the same state and model; the same rounds on record, but for their seconds."""
    for name, array in whole.state.tensors.items():
        assert_array_equal(strategy.state.tensors[name], array)
    ours, theirs = (load_file(f / "model.safetensors") for f in (folder, whole_folder))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert_array_equal(ours[name], theirs[name])
    assert rounds_of(folder) == rounds_of(whole_folder)


def rounds_of(folder):
    rounds = list(RunRecord(folder).rounds())
    assert [report.server_round for report in rounds] == list(range(len(rounds)))
    return [vars(report) | {"seconds": 0} for report in rounds]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Flower writes thirty lines a run."""
    monkeypatch.setattr(logging.getLogger("flwr"), "disabled", True)


@pytest.mark.parametrize(
    "settings",
    [
        # What these two remember is there again between any two rounds: below.
        pytest.param(settings, id=name, marks=[pytest.mark.slow] * (name != FIRST))
        for name, settings in RUNS.items()
    ],
)
def test_wherever_the_server_is_killed_it_goes_on_to_the_same_end(
    tmp_path, monkeypatch, scripted_grid, settings
):
    fleet = Fleet(scripted_grid, **settings)
    folder = tmp_path / "whole"
    folder.mkdir()
    snapshots = Snapshots(folder, tmp_path)
    with at_every_step(monkeypatch, folder, snapshots):
        whole = fleet.run(folder, resume=True)
    monkeypatch.setattr("os.fsync", lambda handle: None)
    assert snapshots.steps > 150
    for killed in sorted(tmp_path.glob("[0-9]*")):
        strategy = fleet.run(killed, resume=True)
        assert_same_end(killed, strategy, folder, whole)
        assert len(repeated_rounds(killed)) <= 1
        shutil.rmtree(killed)
    assert len(rounds_of(folder)) == ROUNDS + 1


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_a_run_that_goes_on_to_more_rounds_is_one_that_was_to_have_them(
    tmp_path, scripted_grid, settings
):
    """And nobody trains a round twice."""
    fleet = Fleet(scripted_grid, **settings)
    whole = fleet.run(tmp_path / "whole", rounds=6)
    folder = tmp_path / "run"
    fleet.run(folder, rounds=4)
    strategy = fleet.run(folder, rounds=6, resume=True)
    assert_same_end(folder, strategy, tmp_path / "whole", whole)
    assert len(rounds_of(folder)) == 7 and not repeated_rounds(folder)


def test_a_resumed_run_that_is_killed_again_goes_on_too(tmp_path, monkeypatch, scripted_grid):
    fleet = Fleet(scripted_grid, **RUNS["feddyn"])
    whole = fleet.run(tmp_path / "whole", resume=True)
    folder = tmp_path / "run"

    def end(report):
        raise Ended

    for server_round in range(ROUNDS + 1):
        with pytest.raises(Ended):
            fleet.run(folder, resume=True, on_round=end)
        assert len(rounds_of(folder)) == server_round + 1
    strategy = fleet.run(folder, resume=True)
    assert_same_end(folder, strategy, tmp_path / "whole", whole)


class Ended(Exception):
    """What a run is ended by in these tests."""


# A disk that is full


@contextlib.contextmanager
def full_disk(first, last=math.inf):
    """The server's writes from one to another, counted from 0, find no room."""
    writes = itertools.count()

    def failing(function):
        def write(*arguments, **options):
            if first <= next(writes) <= last:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*arguments, **options)

        return write

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((os, "write"), (records, "_write_all"), (Path, "write_bytes")):
            patch.setattr(owner, name, failing(getattr(owner, name)))
        yield


@pytest.mark.parametrize("first", range(16))
def test_a_disk_that_stays_full_ends_the_run_which_then_goes_on(tmp_path, scripted_grid, first):
    fleet = Fleet(scripted_grid, **FEEDBACK)
    whole = fleet.run(tmp_path / "whole")
    folder = tmp_path / "run"
    text = f"^cannot write .*{folder}.*: No space left on device; .*resume the run"
    with full_disk(first), pytest.raises((CheckpointError, ConfigError), match=text):
        fleet.run(folder)
    kept = Checkpoints(folder / "checkpoints").load()
    # Four writes a round: two of the checkpoint, one each of model and record.
    assert (kept and kept[0]) == (None if first < 2 else (first - 2) // 4)
    strategy = fleet.run(folder, resume=True)
    assert_same_end(folder, strategy, tmp_path / "whole", whole)


@pytest.mark.parametrize("first", range(0, 16, 3))
def test_a_disk_that_is_full_for_a_while_is_waited_for(
    tmp_path, monkeypatch, scripted_grid, first, caplog
):
    fleet = Fleet(scripted_grid, **FEEDBACK)
    whole = fleet.run(tmp_path / "whole")
    monkeypatch.setattr("fleet.durable.time.sleep", lambda seconds: None)
    with full_disk(first, first + 3):
        strategy = fleet.run(tmp_path / "run", patience=60)
    assert_same_end(tmp_path / "run", strategy, tmp_path / "whole", whole)
    assert caplog.text.count("waiting up to 60 s for room") == 1


# What is remembered of clients


def test_a_reply_to_a_message_from_before_is_refused_and_nobody_counts_twice(
    tmp_path, scripted_grid
):
    """Its token died with the server that gave it out."""
    stale, folder = [], tmp_path / "run"

    def keep_replies(grid):
        def answer(name, reply):
            def both(message):
                content = reply(message)
                if message.metadata.message_type != "query" and name == "pi-1":
                    stale.append(copy.deepcopy(content))
                    return [stale[0], content]
                return content

            return both

        return lambda nodes: grid(
            {node: answer(f"pi-{node - 10}", reply) for node, reply in nodes.items()}
        )

    def end(report):
        if report.server_round == 1:
            raise Ended

    fleet = Fleet(keep_replies(scripted_grid), **FEEDBACK)
    with pytest.raises(Ended):
        fleet.run(folder, on_round=end)
    fleet.run(folder, resume=True)
    first, second = list(RunRecord(folder).rounds())[1:3]
    assert first.refused == {"pi-1 (again)": "reply to no message that waits for one; dropped"}
    assert [client.name for client in first.clients] == list(BLOCKS)
    assert "pi-1 carries an unknown token" in second.refused["pi-1"]
    assert [client.name for client in second.clients] == ["pi-0", "pi-2"]


def test_a_client_that_was_there_before_is_waited_for(tmp_path, scripted_grid, monkeypatch):
    monkeypatch.setattr("strategies.sampling._POLL_SECONDS", 0.01)
    there = {8: _enrols("a"), 9: _enrols("b")}
    grid = scripted_grid(there)
    looks = itertools.count()
    late = _enrols("c")

    def nodes():
        if next(looks) == 5:
            grid.nodes[10] = late
        return list(grid.nodes)

    grid.get_node_ids = nodes
    assert list(Roster(grid, timeout=5).wait_for({"a", "c"}, 1)) == ["a", "b", "c"]


def test_a_client_that_does_not_come_back_is_not_waited_for_for_ever(scripted_grid, monkeypatch):
    monkeypatch.setattr("strategies.sampling._POLL_SECONDS", 0.01)
    roster = Roster(scripted_grid({8: _enrols("a")}), timeout=0.1)
    assert list(roster.wait_for({"a", "gone"}, 1)) == ["a"]


def _enrols(name):
    return lambda message: write_enrolment(Enrolment(name, 10, ("cat", "dog")))


# What a strategy remembers


def test_a_memory_that_cannot_be_kept_ends_no_run(tmp_path, scripted_grid, caplog):
    def choose(config, seed, clients):
        ours = algorithm(config, seed, clients)
        return Algorithm(
            lambda state: (object(), ours.init(state)),
            lambda updates, state, memory: replaced(ours.step(updates, state, memory[1]), memory),
        )

    def replaced(step, memory):
        return dataclasses.replace(step, memory=(memory[0], step.memory))

    fleet = Fleet(scripted_grid, choose=choose)
    fleet.run(tmp_path / "run")
    assert len(rounds_of(tmp_path / "run")) == ROUNDS + 1
    assert caplog.text.count("this run cannot be resumed, should it be ended: /algorithm/0 is") == 1
    with pytest.raises(CheckpointError, match="has rounds on record and no checkpoint"):
        fleet.run(tmp_path / "run", resume=True)


def test_a_checkpoint_of_another_version_is_refused(tmp_path, scripted_grid):
    fleet = Fleet(scripted_grid)
    fleet.run(tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    number, tree = checkpoints.load()
    checkpoints.save(number, tree | {"more": 1})
    with pytest.raises(CheckpointError, match=r"another version's \(.*more.*\); resume it with"):
        fleet.run(tmp_path / "run", resume=True)


def test_the_checkpoint_of_another_run_is_refused_and_no_round_is_lost(tmp_path, scripted_grid):
    fleet = Fleet(scripted_grid)
    fleet.run(tmp_path / "run")
    fleet.run(tmp_path / "other", clients=dict(list(BLOCKS.items())[1:]))
    own = tmp_path / "run" / "checkpoints"
    own.rename(tmp_path / "own")
    shutil.copytree(tmp_path / "other" / "checkpoints", own)
    before = (tmp_path / "run" / "rounds.jsonl").read_bytes()
    text = (
        rf"the checkpoint of run {tmp_path / 'run'} is another run's: its round 3 took .* s, and "
        r"the one on record .* s; put this run's own checkpoints back, or begin anew in another"
    )
    with pytest.raises(CheckpointError, match=text):
        fleet.run(tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "rounds.jsonl").read_bytes() == before
    shutil.rmtree(own)
    (tmp_path / "own").rename(own)
    fleet.run(tmp_path / "run", resume=True)
