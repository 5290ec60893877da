"""What a comparison shows while it runs."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from fleet.cli.sweep import Sweep, show_sweep


def terminal(**environ):
    return Console(
        file=io.StringIO(), force_terminal=True, width=100, _environ={"TERM": "xterm"} | environ
    )


@pytest.mark.parametrize("seconds", [2, 45, 3600])
def test_time_left_is_that_of_the_runs_to_come_whatever_they_take(clock, seconds):
    sweep = Sweep(clock)
    for done in (7, 8, 9):  # six were there already
        clock.now += seconds
        sweep.end_cell(done, 12)
    assert sweep.seconds_left() == pytest.approx(3 * seconds)
    clock.now += seconds / 2
    assert sweep.seconds_left() == pytest.approx(2.5 * seconds)
    clock.now += 10 * seconds  # the run under way takes longer than the others
    assert sweep.seconds_left() == pytest.approx(2 * seconds)


def test_time_left_is_unknown_before_a_run_has_ended_and_none_after_the_last(clock):
    sweep = Sweep(clock)
    clock.now = 70
    assert sweep.seconds_left() is None and sweep.time() == "1 min 10 s so far"
    sweep.end_cell(1, 1)
    assert sweep.seconds_left() == 0


def test_a_terminal_shows_time_left_between_runs_that_take_minutes(clock):
    console = terminal()
    with show_sweep(3, console, clock) as (on_cell, on_round, note):
        note("1 of 3 runs are there already")
        clock.now = 600
        on_cell("fedavg", 0, 2, 3, "")
        clock.now = 700
        on_round(SimpleNamespace(variant=SimpleNamespace(name="fedavg")), 4, 0.5)
    said = console.file.getvalue()
    assert "2 of 3: fedavg, seed 0" in said and "1 of 3 runs are there already" in said
    assert "8 min 20 s left" in said and "fedavg: round 4, 50.0 %" in said
    assert "\x1b[" in said


def test_without_colours_or_a_terminal_each_run_is_one_plain_line(clock):
    for console in (terminal(NO_COLOR="1"), terminal(TERM="dumb"), Console(file=io.StringIO())):
        with show_sweep(3, console, clock) as (on_cell, on_round, note):
            note("1 of 3 runs are there already")
            clock.now += 100
            on_cell("fedavg", 0, 2, 3, "it was killed")
            on_round(None, 4, 0.5)
            clock.now += 100
            on_cell("fedavg", 1, 3, 3, "")
        assert console.file.getvalue().splitlines() == [
            "1 of 3 runs are there already",
            "2 of 3: fedavg, seed 0 failed: it was killed; 1 min 40 s left",
            "3 of 3: fedavg, seed 1",
        ]
