"""A run on the terminal while it goes on: a line a round, and where it is below."""

import contextlib
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TextIO

import click
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fleet.records import RoundReport
from fleet.report import round_line
from fleet.report.rounds import COLUMNS, MIB, round_cells
from fleet.signals import signals_held

OnRound = Callable[[RoundReport], None]
OnReply = Callable[[int, int], None]

_RECENT = 5  # rounds that time left is estimated from; the first may have filled a cache
_NARROW = 110  # columns that a whole line of a round takes


@contextlib.contextmanager
def show_progress(rounds: int, console: Console | None = None) -> Iterator[tuple[OnRound, OnReply]]:
    """Show a run on standard error: `on_round` and `on_reply` for `simulate`.

    On a terminal the last lines say where the run is. Elsewhere, on a terminal
    that cannot move its cursor, and with NO_COLOR, each round is one plain line.

    Args:
        rounds: of the run.
        console: where to; standard error if left out.
    """
    console = console or Console(stderr=True)
    course = Course(rounds)
    if not console.is_terminal or console.is_dumb_terminal or console.no_color:

        def print_line(report: RoundReport) -> None:
            course.end_round(report)
            left = course.seconds_left()
            more = f"; {duration(left)} left" if left and left >= 1 else ""
            with contextlib.suppress(OSError):  # a round that cannot be shown is none that failed
                click.echo(round_line(report, rounds) + more, file=console.file)

        yield print_line, course.count
        return

    def print_round(report: RoundReport) -> None:
        course.end_round(report)
        wide = console.width >= _NARROW
        line = round_line(report, rounds) if wide else _short_line(report, rounds)
        # rich prints a line twice whose printing is interrupted. A terminal that is gone
        # can be noticed here before the signal that says so.
        with contextlib.suppress(OSError), signals_held():
            console.print(line, highlight=False, markup=False)

    # Where only standard error is a terminal, what is printed to the other stays there.
    both = sys.stdout is not None and sys.stdout.isatty()
    streams = [sys.stderr, sys.stdout] if both else [sys.stderr]
    with Live(course, console=console, transient=True, redirect_stdout=both), _logs_above(streams):
        yield print_round, course.count


class Course:
    """Where a run is.

    Args:
        rounds: of the run.
        clock: seconds that pass.
    """

    def __init__(self, rounds: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rounds = rounds
        self._clock = clock
        self._began = self._round_began = clock()
        self._durations: deque[float] = deque(maxlen=_RECENT)
        self._done: int | None = None  # the last round that has ended
        self._answered = self._asked = 0
        self._accuracy: float | None = None
        self._bytes_up = self._bytes_down = 0

    def end_round(self, report: RoundReport) -> None:
        """A round has ended."""
        now = self._clock()
        if report.server_round:  # round 0 trains nobody: it says nothing of the others
            self._durations.append(now - self._round_began)
        self._round_began = now
        self._done = report.server_round
        self._answered = self._asked = 0
        self._bytes_up += report.bytes_up
        self._bytes_down += report.bytes_down
        if report.accuracy is not None:
            self._accuracy = report.accuracy

    def count(self, answered: int, asked: int) -> None:
        """So many of the clients that were asked have answered."""
        self._answered, self._asked = answered, asked

    def seconds_left(self) -> float | None:
        """By the mean of the last rounds, and less with every second; None while unknown.

        rich's own column forgets updates after 30 s: it would show nothing for
        rounds that take longer, and stand still between two of them.
        """
        if not self._durations:
            return None
        mean = sum(self._durations) / len(self._durations)
        under_way = max(0.0, mean - (self._clock() - self._round_began))
        ahead = self._rounds - self._done
        return under_way + (ahead - 1) * mean if ahead > 0 else 0.0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """A bar of the rounds, and below it as many lines as it takes."""
        line = Table.grid(padding=(0, 1), expand=True)
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True)
        bar = ProgressBar(total=self._rounds, completed=self._done or 0, pulse=self._done is None)
        line.add_row(self._name(), bar, self._time())
        yield line
        for text in _fill(self._facts(), options.max_width):
            yield Text(text, style="dim", no_wrap=True, overflow="ellipsis")

    def _name(self) -> str:
        if self._done is None:
            return "getting ready"
        return f"round {min(self._done + 1, self._rounds)} of {self._rounds}"

    def _time(self) -> str:
        left = self.seconds_left()
        if left is None:
            return f"{duration(self._clock() - self._began)} so far"
        return f"{duration(left)} left" if left else "finishing"

    def _facts(self) -> list[str]:
        facts = []
        if self._asked:
            facts.append(f"answered {self._answered} of {self._asked}")
        if self._accuracy is not None:
            facts.append(f"accuracy {100 * self._accuracy:.1f} %")
        if self._done is not None:
            facts.append(f"up {self._bytes_up / MIB:.1f} MiB")
            facts.append(f"down {self._bytes_down / MIB:.1f} MiB")
        return facts


def duration(seconds: float) -> str:
    """Seconds in the two units that matter: `45 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def _fill(facts: list[str], width: int) -> list[str]:
    """Facts in as few lines as hold them, none broken over two."""
    lines: list[str] = []
    for fact in facts:
        if lines and len(lines[-1]) + 3 + len(fact) <= width:
            lines[-1] += f" · {fact}"
        else:
            lines.append(fact)
    return lines


def _short_line(report: RoundReport, rounds: int) -> str:
    """A round in some 40 columns; more where it did not go well."""
    cells = dict(zip(COLUMNS, round_cells(report), strict=True))
    return (
        f"round {cells['round']}/{rounds}: {cells['acc. %']} %, loss {cells['loss']}, "
        f"{cells['seconds']} s"
        + (f", {len(report.refused)} refused" if report.refused else "")
        + (f", {len(report.late)} late" if report.late else "")
        + ("; abandoned" if report.abandoned else "")
    )


@contextlib.contextmanager
def _logs_above(streams: list[TextIO]) -> Iterator[None]:
    """Send log lines above the display: loggers hold the stream that they began with.

    Args:
        streams: standard ones whose place the display has taken, that of errors first.
    """
    display = sys.stderr
    moved: dict[logging.StreamHandler, TextIO] = {}
    for handler in _log_handlers():
        if handler.stream in streams:
            moved[handler] = handler.setStream(display)
    try:
        yield
    finally:
        for handler in _log_handlers():  # those made meanwhile too: the display goes
            if handler.stream is display:
                handler.setStream(moved.get(handler, streams[0]))


def _log_handlers() -> list[logging.StreamHandler]:
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    handlers = [handler for each in loggers for handler in getattr(each, "handlers", ())]
    # logging's handler of last resort has no stream of its own: it looks for standard error.
    return [h for h in handlers if isinstance(h, logging.StreamHandler) and "stream" in vars(h)]
