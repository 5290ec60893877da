"""Rounds as numbers: a pandas frame, and what trackers log."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from fleet.errors import ConfigError
from fleet.records import RoundReport, RunRecord

if TYPE_CHECKING:
    import pandas


def frame(run: RunRecord | Iterable[RoundReport]) -> "pandas.DataFrame":
    """A run's rounds so far as a pandas frame.

    Args:
        run: its record, or rounds of it.

    Returns:
        A row a round, indexed by `round`; columns as `round_numbers` names
        them. What was not measured is NaN.

    Raises:
        ConfigError: if there is no run, it is damaged, or there is no pandas.
    """
    try:
        # Here, not above: a device has no pandas.
        import pandas
    except ImportError as error:
        raise ConfigError("frames need pandas: pip install 'fleet-mobiletl[sim]'") from error
    if isinstance(run, RunRecord):
        run.check_whole()
    rounds = run.rounds() if isinstance(run, RunRecord) else run
    rows = {report.server_round: round_numbers(report) for report in rounds}
    columns = list(round_numbers(RoundReport(server_round=0, accuracy=None, loss=None)))
    index = pandas.Index(rows, name="round", dtype="int64")
    table = pandas.DataFrame(list(rows.values()), index=index, columns=columns)
    measured = ["accuracy", "loss", "train_loss"]
    return table.astype(dict.fromkeys(measured, "float64"))


def round_numbers(report: RoundReport) -> dict[str, float | None]:
    """A round's numbers by name, as in `RoundReport`; of clients and refusals, how many."""
    return {
        "accuracy": report.accuracy,
        "loss": report.loss,
        "train_loss": report.train_loss,
        "bytes_up": report.bytes_up,
        "bytes_down": report.bytes_down,
        "peak_client_bytes": report.peak_client_bytes,
        "seconds": report.seconds,
        "asked": len(report.asked),
        "clients": len(report.clients),
        "refused": len(report.refused),
        "late": len(report.late),
        "late_replies": report.late_replies,
        "full_state": len(report.full_state),
        "abandoned": int(report.abandoned),
    }
