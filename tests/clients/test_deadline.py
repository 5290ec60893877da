"""A process that hangs, ended from outside of Python. Each is a fork of this one."""

import os
import re
import time

import pytest

from clients import deadline
from clients.client import Client
from fleet.config import default_settings, read_config
from tests.forked import Forked


@pytest.fixture
def pipe(tmp_path):
    os.mkfifo(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.fixture
def reading(pipe, tmp_path):
    """Function (round-timeout, node configuration, grace) → a process that reads the pipe.

    And the file with what it says on standard error.
    """
    started = []

    def start(timeout, node, grace=0.5):
        config = read_config(default_settings() | {"round-timeout": timeout})

        def read():
            deadline.GRACE_SECONDS = grace
            with deadline.ended_at_deadline(Client("pi-01", node, config)):
                pipe.read_text()  # waits for somebody who writes
            print("done")

        errors = (tmp_path / "errors").open("w+")
        started.append((Forked(read, errors), errors))
        return started[-1]

    yield start
    for process, errors in started:
        process.kill()
        process.wait()
        errors.close()


def test_a_device_that_hangs_is_ended_and_says_where(reading):
    process, errors = reading(0.5, {})
    assert process.stdout.read() == "" and process.wait(120) == 1
    told = said_on(errors)
    left = re.search(r"Timeout \(0:00:00(\.\d+)\)!", told)  # of a second, since the message
    assert 0.5 < float(left[1]) < 1.0
    assert re.search(rf'File "{__file__}", line \d+ in read\n', told)


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
    process, errors = reading(timeout, node, grace)
    with pipe.open("w"):  # waits until it reads
        time.sleep(1.5)
    assert process.stdout.read() == "done\n" and process.wait(120) == 0
    assert said_on(errors) == ""


def said_on(errors):
    errors.seek(0)  # the fork's writes have moved it
    return errors.read()


def test_the_time_left_is_counted_from_each_message_on():
    config = read_config(default_settings() | {"round-timeout": 60.0})
    now = time.monotonic()
    assert 55 < deadline.seconds_waited_for(Client("pi-01", {}, config)) <= 60
    assert 10 < deadline.seconds_waited_for(Client("pi-01", {}, config, began=now - 45)) <= 15
    assert deadline.seconds_waited_for(Client("pi-01", {}, config, began=now - 90)) == 0.0
