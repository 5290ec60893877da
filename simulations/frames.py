"""Rounds as a pandas frame, of whatever a notebook has at hand."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from fleet.errors import ConfigError
from fleet.records import RoundReport, RunRecord
from fleet.report.frame import frame as frame_of_run
from simulations.compare import holds_comparison, read_comparison
from simulations.comparison import Comparison

if TYPE_CHECKING:
    import pandas


def frame(of: RunRecord | Comparison | str | Path | Iterable[RoundReport]) -> "pandas.DataFrame":
    """Rounds as a pandas frame.

    Args:
        of: a run's record, a comparison, the folder of either, or rounds.

    Returns:
        As `fleet.report.frame.frame`; of a comparison as `Comparison.frame`.

    Raises:
        ConfigError: for anything else, a folder that holds neither or is damaged, or if
            there is no pandas.
    """
    if isinstance(of, str | Path):
        folder = Path(of)
        is_run = os.path.isfile(RunRecord(folder).config_path)
        of = RunRecord(folder) if is_run or not holds_comparison(folder) else read_comparison(of)
    if isinstance(of, Comparison):
        return of.frame()
    if not isinstance(of, RunRecord | Iterable):
        raise ConfigError(
            f"a frame is of a run's record, a comparison, the folder of either, or rounds; got "
            f"{of!r:.80}"
        )
    return frame_of_run(of)
