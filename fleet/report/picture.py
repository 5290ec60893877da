"""Accuracy of runs as one picture."""

import io
from collections.abc import Sequence
from itertools import cycle

from fleet.errors import ConfigError
from fleet.records import RunRecord
from fleet.report.rounds import MIB

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
