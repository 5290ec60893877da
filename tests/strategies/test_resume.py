"""A server that is ended at any step of its writing goes on, and ends where it would have."""

import logging
import shutil

import pytest
from numpy.testing import assert_array_equal
from safetensors.numpy import load_file

from fleet.records import RunRecord
from tests.toy_fleet import (
    ROUNDS,
    Fleet,
    Snapshots,
    at_every_step,
    repeated_rounds,
)

FEEDBACK = {"codec-up": "int4+feedback", "codec-down": "int4+feedback"}
RUNS = {
    "fedadam, feedback both ways": FEEDBACK
    | {"strategy": "fedadam", "server-learning-rate": 0.01, "rule": "clipped_mean"},
    "feddyn": {"strategy": "feddyn", "objective": "feddyn", "rule": "mean", "codec-down": "int8"},
    "centred clipping": FEEDBACK | {"rule": "centred_clipping", "strategy": "fedavgm"},
}


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


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
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
