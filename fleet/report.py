"""Rounds as tables and one HTML page."""

import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import cycle
from typing import Any

from rich import box
from rich.table import Table

from fleet.errors import ConfigError
from fleet.records import RoundReport, RunRecord, summarise

MIB = 2**20

_COLUMNS = (
    "round",
    "acc. %",
    "loss",
    "up MiB",
    "down MiB",
    "peak MiB",
    "seconds",
    "clients",
    "refused",
)


def round_cells(report: RoundReport) -> tuple[str, ...]:
    """One round as text, in the order of the table's columns."""
    return (
        str(report.server_round),
        "–" if report.accuracy is None else f"{100 * report.accuracy:.1f}",
        "–" if report.loss is None else f"{report.loss:.3f}",
        f"{report.bytes_up / MIB:.2f}",
        f"{report.bytes_down / MIB:.2f}",
        f"{report.peak_client_bytes / MIB:.1f}" if report.peak_client_bytes else "–",
        f"{report.seconds:.1f}",
        str(len(report.clients)),
        str(len(report.refused)),
    )


def round_line(report: RoundReport, rounds: int) -> str:
    """One round as a sentence, for where there is no terminal."""
    cells = dict(zip(_COLUMNS, round_cells(report), strict=True))
    return (
        f"round {cells['round']}/{rounds}: accuracy {cells['acc. %']} %, loss {cells['loss']}, "
        f"up {cells['up MiB']} MiB, down {cells['down MiB']} MiB, "
        f"client peak {cells['peak MiB']} MiB, {cells['seconds']} s, "
        f"{cells['clients']} clients, {cells['refused']} refused"
    )


def rounds_table(rounds: Iterable[RoundReport], title: str = "") -> Table:
    """A run as a table, a line a round."""
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for column in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for report in rounds:
        table.add_row(*round_cells(report))
    return table


def refusals(rounds: Iterable[RoundReport]) -> list[str]:
    """Who was refused in which round, and why."""
    return [
        f"round {report.server_round}: {client}: {reason.strip().splitlines()[-1]}"
        for report in rounds
        for client, reason in report.refused.items()
        if reason.strip()
    ]


def run_values(record: RunRecord) -> dict[str, Any]:
    """A run as one object: its summary, whether it has ended, and its rounds.

    Returns:
        The keys of `summary.json`, or of the totals so far (`rounds` alone
        before the first); `ended`; and `per_round`, as in `rounds.jsonl`.

    Raises:
        ConfigError: if there is no run, or its record is damaged.
    """
    rounds = list(record.rounds())
    ended = record.summary_path.is_file()
    so_far = summarise(rounds) if rounds else {"rounds": 0}
    totals = record.summary() if ended else so_far
    return totals | {"ended": ended, "per_round": [asdict(report) for report in rounds]}


def write_page(record: RunRecord, beside: Sequence[RunRecord] = ()) -> None:
    """Write `report.html`: the table, the refusals and, where matplotlib is, a picture.

    Args:
        record: the run that the page is about, where it is written.
        beside: runs to draw into the same picture.

    Raises:
        ConfigError: if there is no run, or the page cannot be written.
    """
    rounds = list(record.rounds())
    head = "".join(f"<th>{html.escape(name)}</th>" for name in _COLUMNS)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in round_cells(report)) + "</tr>"
        for report in rounds
    )
    refused = "".join(f"<li>{html.escape(line)}</li>" for line in refusals(rounds))
    name = html.escape(record.path.name)
    try:
        picture = accuracy_picture([record, *beside])
    except ConfigError as error:
        picture = f"<p>{html.escape(str(error))}</p>"
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{name}</title>"
        f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style>"
        f"<h1>{name}</h1>{picture}"
        f"<div class=wide><table><tr>{head}</tr>{rows}</table></div>"
        + (f"<h2>Refused</h2><ul>{refused}</ul>" if refused else "")
        + "</html>\n"
    )
    try:
        record.page_path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot write page {record.page_path}: {error.strerror}; "
            f"make it writable, then run: fleet report {record.path}"
        ) from error


_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    "td,th{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #ddd}"
    ".wide{overflow-x:auto}svg{max-width:100%;height:auto}"
)
# Okabe and Ito's colours, told apart by colour-blind readers.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def accuracy_picture(records: Sequence[RunRecord]) -> str:
    """Accuracy by round and by bytes as one SVG.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("pictures need matplotlib: pip install 'fleet-mobiletl[sim]'") from error
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_round, by_bytes = figure.subplots(1, 2, sharey=True)
    for record, colour in zip(records, cycle(_COLOURS), strict=False):
        rounds = [report for report in record.rounds() if report.accuracy is not None]
        accuracy = [100 * report.accuracy for report in rounds]
        travelled, total = [], 0
        for report in rounds:
            total += report.bytes_up + report.bytes_down
            travelled.append(total / MIB)
        by_round.plot([r.server_round for r in rounds], accuracy, "o-", ms=3, color=colour)
        by_bytes.plot(travelled, accuracy, "o-", ms=3, color=colour)
        if rounds:
            by_bytes.annotate(
                record.path.name,
                (travelled[-1], accuracy[-1]),
                xytext=(6, -4),
                textcoords="offset points",
                color=colour,
            )
    by_round.set(xlabel="round", ylabel="held-out accuracy (%)")
    by_bytes.set(xlabel="MiB sent, up and down")
    by_bytes.set_xscale("symlog", linthresh=1)
    for axes in (by_round, by_bytes):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
