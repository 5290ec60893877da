"""Rounds leave nothing behind in memory: a fleet of two devices, and what would be noticed."""

import gc

import numpy as np
import psutil
import pytest
from safetensors import safe_open

from fleet.heap import trim
from fleet.records import RunRecord
from simulations.launch import simulate

ROUNDS = 40
HALF = ROUNDS // 2


class Held:
    """Bytes that this process alone holds, and its open files, after some rounds."""

    def __init__(self):
        self.bytes, self.files = {}, {}

    def note(self, number):
        if number in (HALF, ROUNDS - 1):  # after the last round, much that a run held is gone
            gc.collect()
            trim()
            process = psutil.Process()
            self.bytes[number] = process.memory_full_info().uss
            self.files[number] = process.num_fds()

    @property
    def growth(self):
        return self.bytes[ROUNDS - 1] - self.bytes[HALF]


def bound(state_bytes):
    """Half of what a leak of one state a round comes to; the heap comes and goes by less."""
    return (ROUNDS - 1 - HALF) * state_bytes // 2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a memory of each client, steps between versions, and residuals."""
    held, folder = Held(), tmp_path_factory.mktemp("leaks") / "run"
    simulate(
        {
            "clients": 4,
            "sampled": 2,
            "rounds": ROUNDS,
            "backbone": "mobilenet_v3_small",
            "weights": "none",
            "image-size": 32,
            "train-examples": 32,
            "test-examples": 10,
            "partition": "iid",
            "validation-fraction": 0.0,
            "batch-size": 8,
            "local-epochs": 1,
            "blocks": "2",
            "codec-up": "int8+feedback",
            "codec-down": "int8",
            "run-dir": str(folder),
        },
        on_round=lambda report: held.note(report.server_round),
    )
    return held, RunRecord(folder)


def state_bytes(record):
    """Of what one client sends, in float32."""
    report = list(record.rounds())[-1]
    with safe_open(record.model_path, "numpy") as model:
        return sum(4 * int(np.prod(model.get_slice(n).get_shape())) for n in report.coverage)


def test_memory_does_not_grow_with_rounds(run):
    held, record = run
    assert state_bytes(record) > 2**20
    assert held.growth < bound(state_bytes(record))


def test_files_do_not_stay_open(run):
    held, _ = run
    assert held.files[ROUNDS - 1] <= held.files[HALF]


def test_a_leak_of_one_state_a_round_would_be_noticed(run):
    _, record = run
    grown = []
    for _ in range(3):  # what tests before this one have left may go in the middle of it
        held, leaked = Held(), []
        for number in range(ROUNDS):
            leaked.append(np.ones(state_bytes(record) // 4, np.float32))
            held.note(number)
        grown.append(held.growth)
        leaked.clear()
    assert max(grown) > bound(state_bytes(record))
