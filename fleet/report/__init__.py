"""Rounds, who took part in them and what they sent: as lines, tables, values and one page."""

from fleet.report.page import write_page
from fleet.report.participation import Group, Part, by_blocks, participation
from fleet.report.picture import accuracy_picture
from fleet.report.rounds import refusals, round_line
from fleet.report.tables import Grid, as_html, as_text, tables
from fleet.report.traffic import bytes_by_role
from fleet.report.values import run_values

__all__ = [
    "Grid",
    "Group",
    "Part",
    "accuracy_picture",
    "as_html",
    "as_text",
    "by_blocks",
    "bytes_by_role",
    "participation",
    "refusals",
    "round_line",
    "run_values",
    "tables",
    "write_page",
]
