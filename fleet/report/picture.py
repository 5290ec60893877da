"""Accuracy of runs as one picture."""

from collections.abc import Sequence

from fleet.records import RunRecord
from fleet.report.curves import both
from fleet.report.history import Line, read_history


def accuracy_picture(records: Sequence[RunRecord]) -> str:
    """Accuracy by round and by bytes side by side, as one SVG.

    Args:
        records: runs to draw; each is read once.

    Raises:
        ConfigError: if matplotlib is not installed, or a record is damaged.
    """
    lines = [Line(record.path.name, [read_history(record.rounds())]) for record in records]
    return both(lines).svg()
