"""Rounds, who took part in them and what they sent: lines, tables, pictures, values, a page."""

from fleet.report.beside import Outcome
from fleet.report.files import write_files
from fleet.report.grid import Grid, as_csv, as_html, as_markdown, as_text, spreadsheet_cell
from fleet.report.page import without_pages, write_comparison, write_page
from fleet.report.participation import Group, Part, by_blocks, participation
from fleet.report.picture import accuracy_picture
from fleet.report.rounds import refusals, round_line
from fleet.report.rows import Row
from fleet.report.tables import all_tables, tables
from fleet.report.traffic import bytes_by_role
from fleet.report.values import run_values

__all__ = [
    "Grid",
    "Group",
    "Outcome",
    "Part",
    "Row",
    "accuracy_picture",
    "all_tables",
    "as_csv",
    "as_html",
    "as_markdown",
    "as_text",
    "by_blocks",
    "bytes_by_role",
    "participation",
    "refusals",
    "round_line",
    "run_values",
    "spreadsheet_cell",
    "tables",
    "without_pages",
    "write_comparison",
    "write_files",
    "write_page",
]
