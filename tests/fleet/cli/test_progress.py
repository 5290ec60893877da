import io
import logging
import re
import sys

import pytest
from rich.console import Console

from fleet.cli.progress import Course, duration, show_progress
from fleet.records import RoundReport

MIB = 2**20


def report(number, **values):
    given = {"accuracy": 0.5, "loss": 1.25, "bytes_up": MIB, "bytes_down": 2 * MIB} | values
    return RoundReport(server_round=number, **given)


def terminal(width=120, **options):
    environ = {"TERM": "xterm"} | options.pop("environ", {})
    return Console(
        file=io.StringIO(), force_terminal=True, width=width, _environ=environ, **options
    )


def shown(course, width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(course)
    return console.file.getvalue().splitlines()


def run_rounds(course, clock, durations):
    """End round 0 and then a round after each of some durations, in seconds."""
    course.end_round(report(0))
    for number, seconds in enumerate(durations, start=1):
        clock.now += seconds
        course.end_round(report(number))


@pytest.mark.parametrize("seconds", [0.5, 20, 45, 3600])
def test_time_left_is_that_of_the_rounds_to_come(clock, seconds):
    course = Course(10, clock)
    run_rounds(course, clock, [seconds] * 4)
    assert course.seconds_left() == pytest.approx(6 * seconds)


def test_time_left_shrinks_between_rounds_and_waits_for_one_that_takes_long(clock):
    course = Course(10, clock)
    run_rounds(course, clock, [60] * 4)
    clock.now += 45
    assert course.seconds_left() == pytest.approx(6 * 60 - 45)
    clock.now += 1000
    assert course.seconds_left() == pytest.approx(5 * 60)


def test_time_left_forgets_a_first_round_that_filled_a_cache(clock):
    course = Course(20, clock)
    run_rounds(course, clock, [500, 10, 10, 10, 10, 10])
    assert course.seconds_left() == pytest.approx(14 * 10)


def test_time_left_is_not_known_before_a_round_has_trained(clock):
    course = Course(3, clock)
    assert course.seconds_left() is None
    clock.now = 12
    assert "getting ready" in shown(course)[0] and "12 s so far" in shown(course)[0]
    course.end_round(report(0))
    assert course.seconds_left() is None


def test_a_run_that_is_through_has_no_time_left(clock):
    course = Course(2, clock)
    run_rounds(course, clock, [5, 5])
    assert course.seconds_left() == 0
    assert "round 2 of 2" in shown(course)[0] and "finishing" in shown(course)[0]


def test_what_is_shown_are_the_round_the_cohort_the_accuracy_and_the_bytes_so_far(clock):
    course = Course(5, clock)
    run_rounds(course, clock, [30, 30])
    course.count(3, 8)
    first, second = shown(course)
    assert first.startswith("round 3 of 5 ━") and first.endswith("1 min 30 s left")
    assert second == "answered 3 of 8 · accuracy 50.0 % · up 3.0 MiB · down 6.0 MiB"
    course.end_round(report(3, accuracy=None))
    assert shown(course)[1] == "accuracy 50.0 % · up 4.0 MiB · down 8.0 MiB"  # the last measured


@pytest.mark.parametrize("width", [40, 60, 100])
def test_no_line_is_wider_than_the_terminal_and_no_fact_is_cut(clock, width):
    course = Course(100, clock)
    run_rounds(course, clock, [400] * 3)
    course.count(100, 1000)
    lines = shown(course, width)
    assert max(map(len, lines)) <= width
    facts = ("round 4 of 100", "10 h 46 min left", "answered 100 of 1000", "accuracy 50.0 %")
    for fact in (*facts, "up 4.0 MiB", "down 8.0 MiB"):
        assert any(fact in line for line in lines), fact


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_durations_have_two_units(seconds, text):
    assert duration(seconds) == text


def test_a_terminal_keeps_a_line_a_round():
    console = terminal(width=200)
    with show_progress(2, console) as (on_round, on_reply):
        on_reply(0, 3)
        on_reply(3, 3)
        on_round(report(1))
        on_round(report(2, accuracy=None, loss=None))
    text = console.file.getvalue()
    assert "round 1/2: accuracy 50.0 %, loss 1.250, up" in text
    assert "round 2/2: accuracy – %, loss –, up" in text


def test_a_narrow_terminal_has_short_lines():
    console = terminal(width=40)
    with show_progress(12, console) as (on_round, _):
        on_round(report(10, seconds=123.4, stepped=True))
        on_round(report(11, seconds=1.2, refused={"a": "why"}, late=("b", "c")))
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).splitlines()
    assert "round 10/12: 50.0 %, loss 1.250, 123.4 s" in map(str.strip, lines)
    assert "1 refused, 2 late; abandoned" in " ".join(lines)


@pytest.mark.parametrize(
    "console",
    [
        lambda: Console(file=io.StringIO(), force_terminal=False),
        lambda: terminal(environ={"TERM": "dumb"}),
        lambda: terminal(environ={"NO_COLOR": "1"}),
    ],
    ids=["no terminal", "dumb", "NO_COLOR"],
)
def test_elsewhere_rounds_are_plain_lines(console):
    console = console()
    with show_progress(2, console) as (on_round, on_reply):
        on_reply(1, 3)
        for number in range(3):
            on_round(report(number))
    text = console.file.getvalue()
    assert "\x1b" not in text and "\r" not in text
    assert [line[:9] for line in text.splitlines()] == ["round 0/2", "round 1/2", "round 2/2"]


def test_what_is_logged_or_warned_meanwhile_stands_above_the_display(monkeypatch):
    stream, console = io.StringIO(), terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    # A handler that has held standard error from before the display came, and one of a
    # library that is imported meanwhile.
    early = logging.StreamHandler()
    logger, late_logger = (logging.getLogger(f"tests.progress.{name}") for name in ("a", "b"))
    logger.addHandler(early)
    with show_progress(2, console) as (on_round, _):
        on_round(report(1))
        logger.warning("a sensor is hot")
        print("a library's own message", file=sys.stderr)
        late = logging.StreamHandler()
        late_logger.addHandler(late)
        late_logger.warning("a late one")
    text = console.file.getvalue()
    assert stream.getvalue() == ""  # nothing went to the terminal behind the display's back
    # Whole lines, each behind the codes that wipe the display away.
    for line in ("a sensor is hot", "a library's own message", "a late one"):
        assert re.search(rf"\x1b\[2K{re.escape(line)}\r?\n", text), text
    assert early.stream is stream
    assert late.stream is stream
    logger.warning("afterwards")
    assert stream.getvalue() == "afterwards\n"
    logger.removeHandler(early)
    late_logger.removeHandler(late)


class Paper(io.StringIO):
    """What is written to, until it runs out."""

    out = False

    def write(self, text):
        if self.out:
            raise OSError(5, "Input/output error")
        return super().write(text)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_round_that_cannot_be_shown_is_passed_over(is_terminal):
    console = Console(
        file=Paper(), force_terminal=is_terminal, width=120, _environ={"TERM": "xterm"}
    )
    with show_progress(3, console) as (on_round, _):
        on_round(report(1))
        console.file.out = True
        on_round(report(2))
        console.file.out = False
        on_round(report(3))
    assert "round 1/3" in console.file.getvalue() and "round 3/3" in console.file.getvalue()
