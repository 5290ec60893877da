"""Ten thousand hostile replies: no exception, no bit of the model, no memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.strategies.hostile import KINDS

ROOT = Path(__file__).parents[2]
RUNS = 25  # of each of four codecs, with 100 hostile replies to train messages in each


@pytest.fixture(scope="module")
def seen():
    """What a process saw that ran them; it ends with an error if a claim does not hold."""
    command = [sys.executable, "-m", "tests.strategies.gate_fuzz", str(RUNS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_ten_thousand_hostile_replies_change_no_bit_and_each_is_refused_by_name(seen):
    assert seen["seen"]["train"] >= 10_000
    assert all(seen["seen"].get(kind, 0) >= 50 for kind in KINDS)  # none is left to luck


def test_the_servers_memory_grows_by_less_than_50_mb(seen):
    assert seen["grown"] < 50e6
