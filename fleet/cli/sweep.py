"""A comparison on the terminal while it goes on: a line a run, and where it is below."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from fleet.cli.progress import duration


class Sweep:
    """Where a comparison is.

    Args:
        clock: seconds that pass.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = self._last = clock()
        self._ended = 0  # since then
        self._to_come: int | None = None

    def end_cell(self, done: int, total: int) -> None:
        """A run has ended, the one of so many."""
        self._last = self._clock()
        self._ended += 1
        self._to_come = total - done

    def seconds_left(self) -> float | None:
        """By the mean time between two ends, and less with every second; None while unknown.

        rich's own column forgets ends after 30 s: of runs that take longer it would
        show nothing. What was there already has taken no time, and does not count.
        """
        if not self._to_come:
            return None if self._to_come is None else 0.0
        mean = (self._last - self._began) / self._ended
        under_way = max(0.0, mean - (self._clock() - self._last))
        return under_way + (self._to_come - 1) * mean

    def time(self) -> str:
        """Time left in words; so far, while it is unknown."""
        left = self.seconds_left()
        if left is None:
            return f"{duration(self._clock() - self._began)} so far"
        return f"{duration(left)} left"


class _Time(ProgressColumn):
    """Of rich's progress: what the sweep says."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__()
        self._sweep = sweep

    def render(self, task: Task) -> Text:
        return Text(self._sweep.time())


@contextlib.contextmanager
def show_sweep(
    cells: int, console: Console | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[tuple[Callable[..., None], Callable[..., None], Callable[[str], None]]]:
    """Show a comparison on standard error: `on_cell`, `on_round` and `on_note` for `compare`.

    Where there is no terminal, on one that cannot move its cursor, and with NO_COLOR,
    each run is one plain line.

    Args:
        cells: runs of the comparison.
        console: where to; standard error if left out.
        clock: seconds that pass.
    """
    console = console or Console(stderr=True)
    sweep = Sweep(clock)

    def line(row: str, seed: int, done: int, total: int, failed: str) -> str:
        return f"{done} of {total}: {row}, seed {seed}" + (f" failed: {failed}" if failed else "")

    if not console.is_terminal or console.is_dumb_terminal or console.no_color:

        def print_cell(row: str, seed: int, done: int, total: int, failed: str) -> None:
            sweep.end_cell(done, total)
            more = f"; {sweep.time()}" if done < total else ""
            click.echo(line(row, seed, done, total, failed) + more, file=console.file)

        yield print_cell, lambda *_: None, lambda text: click.echo(text, file=console.file)
        return
    columns = (BarColumn(), MofNCompleteColumn(), _Time(sweep))
    with Progress(*columns, TextColumn("{task.description}"), console=console) as progress:
        task = progress.add_task("", total=cells)

        def on_cell(row: str, seed: int, done: int, total: int, failed: str) -> None:
            sweep.end_cell(done, total)
            progress.update(task, completed=done)
            console.print(line(row, seed, done, total, failed), markup=False, highlight=False)

        def on_round(cell: Any, number: int, accuracy: float | None) -> None:
            told = "" if accuracy is None else f", {100 * accuracy:.1f} %"
            progress.update(task, description=f"{cell.variant.name}: round {number}{told}")

        def note(text: str) -> None:
            console.print(text, markup=False, highlight=False)

        yield on_cell, on_round, note
