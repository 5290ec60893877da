"""A process that hangs, ended from outside of Python."""

import os
import subprocess
import sys
import time

import pytest

from clients import deadline
from clients.client import Client
from fleet.config import default_settings, read_config

PROGRAM = """
from clients import deadline
from clients.client import Client
from fleet.config import default_settings, read_config

config = read_config(default_settings() | {{"round-timeout": {timeout}}})
deadline.GRACE_SECONDS = {grace}
with deadline.ended_at_deadline(Client("pi-01", {node}, config)):
    open({pipe!r}).read()  # waits for somebody who writes
print("done")
"""


@pytest.fixture
def pipe(tmp_path):
    os.mkfifo(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.fixture
def reading(pipe):
    """Function (round-timeout, node configuration, grace) → a process that reads the pipe."""
    started = []

    def start(timeout, node, grace=0.5):
        program = PROGRAM.format(pipe=str(pipe), timeout=timeout, node=node, grace=grace)
        command = [sys.executable, "-c", program]
        started.append(subprocess.Popen(command, stdout=-1, stderr=-1, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_device_that_hangs_is_ended_and_says_where(reading):
    process = reading(0.5, {})
    said, told = process.communicate(timeout=120)
    assert process.returncode == 1 and said == ""
    assert "Timeout (0:00:01)!" in told
    assert 'File "<string>", line 9 in <module>' in told


@pytest.mark.parametrize(
    ("timeout", "node", "grace"),
    [
        (600.0, {}, 0.0),
        (0.5, {}, 600.0),  # who is about to say why it gives up
        (1e12, {}, 0.0),
        (0.5, {"partition-id": 0, "num-partitions": 2}, 0.0),  # its process is others' too
    ],
)
def test_who_is_in_time_or_simulated_is_not_ended(reading, pipe, timeout, node, grace):
    process = reading(timeout, node, grace)
    with pipe.open("w"):  # waits until it reads
        time.sleep(1.5)
    assert process.communicate(timeout=120) == ("done\n", "")


def test_the_time_left_is_counted_from_the_message_on(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(deadline.time, "monotonic", lambda: now[0])
    config = read_config(default_settings() | {"round-timeout": 60.0})
    client = Client("pi-01", {}, config)
    with deadline.ended_at_deadline(client):
        now[0] += 45  # to read its images and its model
        assert deadline.seconds_waited_for(client) == 15.0
        now[0] += 45
        assert deadline.seconds_waited_for(client) == 0.0
