"""A run's pictures and tables as files of their own."""

import re
from collections.abc import Sequence
from pathlib import Path

from fleet.errors import ConfigError
from fleet.records import RunRecord
from fleet.report.grid import as_csv, as_markdown
from fleet.report.history import Line, read_history
from fleet.report.pictures import run_pictures, write_pictures
from fleet.report.tables import all_tables


def write_files(record: RunRecord, folder: Path, beside: Sequence[RunRecord] = ()) -> None:
    """Each picture as SVG and PNG, each table as CSV and Markdown.

    Args:
        folder: made if need be.
        beside: runs to draw into the pictures of accuracy.

    Raises:
        ConfigError: if there is no run, matplotlib is not installed, or the folder
            cannot be written.
    """
    rounds = list(record.rounds())
    history = read_history(rounds)
    others = [Line(other.path.name, [read_history(other.rounds())]) for other in beside]
    pictures, _ = run_pictures(record.path.name, history, others)
    write_pictures(folder, pictures)
    try:
        for grid in all_tables(rounds, history):
            stem = re.sub(r"\W+", "-", grid.title.lower())
            (folder / f"{stem}.csv").write_bytes(as_csv(grid).encode("utf-8", "replace"))
            (folder / f"{stem}.md").write_bytes(as_markdown(grid).encode("utf-8", "replace"))
    except OSError as error:
        raise ConfigError(
            f"cannot write tables to {folder}: {error.strerror}; name another folder, or make it "
            f"writable"
        ) from error
