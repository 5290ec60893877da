"""A run as one HTML page."""

import html
from collections.abc import Sequence

from fleet.errors import ConfigError
from fleet.records import RunRecord
from fleet.report.picture import accuracy_picture
from fleet.report.rounds import refusals
from fleet.report.tables import as_html, tables


def write_page(record: RunRecord, beside: Sequence[RunRecord] = ()) -> None:
    """Write `report.html`: tables, refusals and, where matplotlib is, a picture.

    Args:
        record: the run that the page is about, where it is written.
        beside: runs to draw into the same picture.

    Raises:
        ConfigError: if there is no run, or the page cannot be written.
    """
    rounds = list(record.rounds())
    refused = "".join(f"<li>{html.escape(line)}</li>" for line in refusals(rounds))
    name = html.escape(record.path.name)
    try:
        picture = accuracy_picture([record, *beside])
    except ConfigError as error:
        picture = f"<p>{html.escape(str(error))}</p>"
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{name}</title>"
        f"<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<style>{_STYLE}</style><h1>{name}</h1>{picture}"
        + "".join(map(as_html, tables(rounds)))
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


# Long names and reasons break anywhere, tables scroll: a phone's page is no wider than it.
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;"
    "overflow-wrap:anywhere}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums;overflow-wrap:normal}"
    "td,th{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}"
    ".named td:first-child,.named th:first-child{text-align:left}"
    ".wide{overflow-x:auto}svg{max-width:100%;height:auto}"
)
