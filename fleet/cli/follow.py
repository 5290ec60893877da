"""A run of a fleet, shown as it goes on."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fleet.cli.progress import show_progress
from fleet.cli.report import show_run
from fleet.records import RoundReport, RunRecord, to_json
from fleet.remarks import read_remarks
from fleet.report.history import kind_of, last_line

if TYPE_CHECKING:
    from fleet.deploy.wishes import Standing, Wishes

_POLL_SECONDS = 0.5
_MOST_REFUSED = 10  # of a round, that are told by name


def follow(wishes: "Wishes", name: str, output_format: str) -> None:
    """Show a run until it is over; fail if it has."""
    from fleet.deploy.wishes import FINISHED

    wish = wishes.read(name)
    record = RunRecord(Path(wish.run_dir))
    try:
        with show_progress(int(wish.settings["rounds"])) as (on_round, _):
            tell = Telling(lambda line: click.echo(line, err=True))
            *_, standing = _standings(wishes, name, record, on_round, tell)
    except KeyboardInterrupt:
        click.echo(
            f"run {name} goes on; follow it with: fleet run --resume {name}\n"
            f"end it with: fleet run --stop {name}",
            err=True,
        )
        raise click.exceptions.Exit(130) from None
    if standing.status != FINISHED:
        click.echo(f"run {name} has {standing.status}: {standing.reason}", err=True)
    elif output_format == "json":
        click.echo(to_json(record.summary(), indent=2))
    else:
        show_run(record)
    if standing.status != FINISHED:
        raise click.exceptions.Exit(1)


def _standings(
    wishes: "Wishes",
    name: str,
    record: RunRecord,
    on_round: Callable[[RoundReport], None],
    tell: "Telling",
) -> Iterator["Standing"]:
    """Where a run stands, until it is over; its rounds are told as they come, each once."""
    position, told = 0, -1
    while True:
        # In this order: what is on record as the run is over has been told by then.
        standing, attempt = wishes.standing(name), wishes.read(name).attempt
        if record.rounds_path.is_file():
            size = record.rounds_path.stat().st_size
            if size < position:  # it was cut back to its checkpoint
                position = 0
            for report, behind in record.rounds_from(position):
                position = behind
                if report.server_round > told:
                    told = report.server_round
                    on_round(report)
                    tell.refused(report)
        tell.remarks(_remarks(standing, record))
        yield standing
        if standing.over and standing.attempt == attempt:
            return
        time.sleep(_POLL_SECONDS)


class Telling:
    """Tells who was refused, and what there is to say beside, each time that it is something new.

    Args:
        show: shows a line.
    """

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._refused: dict[str, str] = {}  # client → kind of reason, in the last round
        self._said: tuple[str, ...] = ()

    def refused(self, report: RoundReport) -> None:
        """Who was refused in a round, unless it was for the like reason in the one before."""
        reasons = {name: last_line(reason) for name, reason in report.refused.items()}
        now = {name: kind_of(reason) for name, reason in reasons.items()}
        new = [name for name, kind in now.items() if self._refused.get(name) != kind]
        for name in new[:_MOST_REFUSED]:
            self._show(f"  round {report.server_round}: {name}: {reasons[name]}")
        if len(new) > _MOST_REFUSED:
            self._show(f"  and {len(new) - _MOST_REFUSED} more, see the record")
        self._refused = now

    def remarks(self, lines: tuple[str, ...]) -> None:
        """What there is to say now."""
        for line in lines:
            if line not in self._said:
                self._show(f"the run: {line}")
        self._said = lines


def _remarks(standing: "Standing", record: RunRecord) -> tuple[str, ...]:
    if standing.over:
        return ()
    reasons = (standing.reason,) if standing.reason else ()
    return reasons + read_remarks(record.path)
