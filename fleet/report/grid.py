"""A table, for a terminal, a page, a spreadsheet and a text in Markdown."""

import csv
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

_WORDS = 24  # characters of a cell from which its column holds words, not figures
_MISSING = "–"


@dataclass(frozen=True)
class Grid:
    """A table before it is drawn.

    Attributes:
        title: what stands above it.
        columns: their names.
        rows: a cell for each column.
        note: what stands below it.
        named: whether the first column holds names, not figures.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""
    named: bool = False


def as_text(grid: Grid) -> Table:
    """A grid for the terminal."""
    table = Table(
        title=Text(grid.title) if grid.title else None,
        title_justify="left",
        caption=Text(grid.note) if grid.note else None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for number, column in enumerate(grid.columns):
        if number == 0 and grid.named:  # a name may be long; a figure is not to be broken
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column, justify="right", no_wrap=True)
    for row in grid.rows:
        table.add_row(*map(Text, row))  # Text: a client's name is no markup
    return table


def as_html(grid: Grid) -> str:
    """A grid for a page; one that is wider or longer than fits scrolls by itself."""
    kinds = [" class=words" if _is_words(grid, i) else "" for i in range(len(grid.columns))]
    head = "".join(
        f"<th scope=col{kind}>{html.escape(name)}</th>"
        for kind, name in zip(kinds, grid.columns, strict=True)
    )
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td{kind}>{_breakable(cell) if kind else html.escape(cell)}</td>"
            for kind, cell in zip(kinds, row, strict=True)
        )
        + "</tr>"
        for row in grid.rows
    )
    label = html.escape(grid.title or "table")
    return (
        (f"<h2>{html.escape(grid.title)}</h2>" if grid.title else "")
        # What scrolls is reached by keyboard too.
        + f'<div class=wide tabindex=0 role=region aria-label="{label}">'
        + f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        + (f"<p>{html.escape(grid.note)}</p>" if grid.note else "")
    )


def as_markdown(grid: Grid) -> str:
    """A grid as a table of GitHub's Markdown, with its title and its note."""
    bars = [":--" if _is_words(grid, i) else "--:" for i in range(len(grid.columns))]
    lines = [f"## {_marked(grid.title)}", ""] if grid.title else []
    lines += ["| " + " | ".join(map(_marked, grid.columns)) + " |", "|" + "|".join(bars) + "|"]
    lines += ["| " + " | ".join(map(_marked, row)) + " |" for row in grid.rows]
    return "\n".join([*lines, *(["", _marked(grid.note)] if grid.note else [])]) + "\n"


def as_csv(grid: Grid) -> str:
    """The cells of a grid alone, after RFC 4180; what is not known is an empty cell.

    A spreadsheet takes text that begins with =, +, - or @ for a formula; a client
    chooses its name and the reason it gives. Such a cell begins with an apostrophe.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(grid.columns)
    writer.writerows([spreadsheet_cell(cell) for cell in row] for row in grid.rows)
    return buffer.getvalue()


def spreadsheet_cell(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula; empty for what is not known."""
    if cell == _MISSING:
        return ""
    is_number = re.fullmatch(r"[-+]?[\d,.]+(e[-+]?\d+)?", cell)
    return f"'{cell}" if cell[:1] in ("=", "+", "-", "@", "\t", "\r") and not is_number else cell


def _is_words(grid: Grid, column: int) -> bool:
    return (grid.named and column == 0) or any(len(row[column]) > _WORDS for row in grid.rows)


def _breakable(text: str) -> str:
    """Words as HTML that may go on in a new line behind `=` and a comma, not only a space."""
    return re.sub(r"([=,])(?=\S)", r"\1<wbr>", html.escape(text))


def _marked(text: str) -> str:
    """Text that Markdown takes for nothing else."""
    return re.sub(r"([\\`*_{}\[\]<>|#!~&$])", r"\\\1", " ".join(text.split()))
