"""A run, and a comparison of runs, as one HTML page."""

import html
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fleet.errors import ConfigError
from fleet.records import RoundReport, RunRecord, summarise
from fleet.report.beside import Outcome
from fleet.report.grid import Grid, as_html
from fleet.report.history import Line, read_history, read_line
from fleet.report.pictures import comparison_pictures, run_pictures, write_pictures
from fleet.report.refused import most_refused
from fleet.report.rounds import MIB
from fleet.report.rows import Row
from fleet.report.style import Picture
from fleet.report.tables import all_tables

_wanted = True


@contextmanager
def without_pages() -> Iterator[None]:
    """Let `write_page` write nothing until the block ends.

    For runs whose folder keeps none: to draw one takes longer than a small run.
    """
    global _wanted
    before, _wanted = _wanted, False
    try:
        yield
    finally:
        _wanted = before


def write_page(record: RunRecord, beside: Sequence[RunRecord] = ()) -> None:
    """Write `report.html`: pictures where matplotlib is, tables, and who was refused.

    Nothing within `without_pages`.

    Args:
        record: the run that the page is about, where it is written.
        beside: runs to draw into the pictures of accuracy.

    Raises:
        ConfigError: if there is no run, or the page cannot be written.
    """
    if not _wanted:
        return
    rounds = list(record.rounds())
    others = [Line(other.path.name, [read_history(other.rounds())]) for other in beside]
    name, history = record.path.name, read_history(rounds)
    try:
        pictures, missing = run_pictures(name, history, others)
    except ConfigError as error:
        pictures, missing = [], [str(error)]
    page = as_page(name, _facts(rounds), pictures, missing, all_tables(rounds, history))
    _write(record.page_path, page, f"run: fleet report {record.path}")


def write_comparison(
    folder: Path,
    title: str,
    rows: Sequence[Row],
    grids: Sequence[Grid],
    outcomes: Sequence[Outcome] = (),
) -> None:
    """Write `report.html`, and its pictures as SVG and PNG, where matplotlib is.

    Args:
        folder: made if need be.
        title: of the page.
        rows: what is compared, each record read once.
        grids: tables to show below the pictures.
        outcomes: what the rows came to.

    Raises:
        ConfigError: if a record is damaged, or the folder cannot be written.
    """
    lines = [read_line(row) for row in rows]
    try:
        pictures, missing = comparison_pictures(lines, outcomes)
    except ConfigError as error:
        pictures, missing = [], [str(error)]
    write_pictures(folder, pictures)
    runs, failed = (sum(len(getattr(row, key)) for row in rows) for key in ("runs", "failed"))
    facts = f"{len(rows)} rows, {runs} runs" + (f", {failed} more failed" if failed else "")
    refused = most_refused(lines)
    tables = [*grids, *([refused] if refused else []), *([_failed(rows)] if failed else [])]
    page = as_page(title, facts, pictures, missing, tables)
    _write(folder / "report.html", page, "write the comparison again")


def as_page(
    title: str,
    facts: str,
    pictures: Sequence[Picture],
    missing: Sequence[str],
    tables: Sequence[Grid],
) -> str:
    """One page that loads nothing from elsewhere.

    Args:
        facts: a sentence below the title.
        missing: sentences in place of pictures.
    """
    shown = "".join(
        f'<figure id="{picture.name}"><figcaption><h2>{html.escape(picture.title)}</h2>'
        f"{_paragraph(picture.caption)}</figcaption>{picture.svg()}</figure>"
        for picture in pictures
    )
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        f"<title>{html.escape(title)}</title>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        # Should a name ever get through as markup, it loads and runs nothing.
        "<meta http-equiv=Content-Security-Policy "
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f"<style>{_STYLE}</style></head>\n<body><main><h1>{html.escape(title)}</h1>"
        + _paragraph(facts)
        + (f"\n<div class=pictures>{shown}</div>" if shown else "")
        + "".join(f"\n{_paragraph(sentence)}" for sentence in missing)
        + "".join(f"\n<section>{as_html(table)}</section>" for table in tables)
        + "</main></body></html>\n"
    )


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>" if text else ""


def _facts(rounds: Sequence[RoundReport]) -> str:
    if not rounds:
        return "No round is on record yet."
    total = summarise(list(rounds))
    words = [f"{total['rounds']} rounds"]
    if total["accuracy"] is not None:
        words.append(f"accuracy {100 * total['accuracy']:.1f} %")
    words.append(f"{total['bytes_up'] / MIB:,.1f} MiB up, {total['bytes_down'] / MIB:,.1f} down")
    if total["peak_client_bytes"]:
        words.append(f"peak memory of a client {total['peak_client_bytes'] / MIB:,.1f} MiB")
    words.append(f"{total['refused']} refused")
    return ", ".join(words) + "."


def _failed(rows: Sequence[Row]) -> Grid:
    cells = [(row.name, str(seed), why) for row in rows for seed, why in sorted(row.failed.items())]
    return Grid("Failed", ("row", "seed", "reason"), cells, named=True)


def _write(path: Path, page: str, then: str) -> None:
    try:
        path.write_bytes(page.encode("utf-8", "replace"))
    except OSError as error:
        raise ConfigError(
            f"cannot write page {path}: {error.strerror}; make it writable, then {then}"
        ) from error


# Long words break, tables scroll: a phone's page is no wider than it. A page is as wide as its
# tables, where there is room. Where a table goes on beyond an edge, a shadow shows it: one is at
# each edge, and a white cover that moves with the table lies on it where the table ends.
_STYLE = """
:root{color-scheme:light}*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;color:#222;background:#fff;margin:0;
overflow-wrap:anywhere}
main{width:fit-content;min-width:min(100%,64rem);max-width:min(100%,100rem);margin:0 auto;
padding:1rem}
h1{font-size:1.6rem;line-height:1.2;margin:.5rem 0;max-width:60rem}
h2{font-size:1.1rem;line-height:1.3;margin:1.5rem 0 .25rem}
p{margin:.25rem 0 .75rem;max-width:44rem}figcaption p,.wide+p{font-size:.875rem;color:#595959}
.pictures{max-width:62rem;display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));
gap:0 2rem;align-items:start}
figure{margin:0;min-width:0}figure svg{display:block;width:100%;height:auto}
.wide{overflow:auto;max-height:36rem;background:
linear-gradient(90deg,#fff 1rem,#fff0) 0 0/2rem 100% local,
linear-gradient(270deg,#fff 1rem,#fff0) 100% 0/2rem 100% local,
linear-gradient(0deg,#fff 1rem,#fff0) 0 100%/100% 2rem local,
linear-gradient(90deg,#0004,#0000) 0 0/.75rem 100% scroll,
linear-gradient(270deg,#0004,#0000) 100% 0/.75rem 100% scroll,
linear-gradient(0deg,#0004,#0000) 0 100%/100% .75rem scroll;background-repeat:no-repeat}
table{border-collapse:collapse;font-size:.9375rem;font-variant-numeric:tabular-nums;
overflow-wrap:normal}
td,th{padding:.2rem .4rem;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}
th{position:sticky;top:0;background:#fff;vertical-align:bottom;white-space:normal}
.words{text-align:left;white-space:normal;min-width:8rem;max-width:min(32rem,60vw);
overflow-wrap:break-word}
@media print{.wide{max-height:none;overflow:visible;background:none}}
"""
