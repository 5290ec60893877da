"""The pictures of a run and of a comparison, and what to say where there is none."""

from collections.abc import Sequence
from pathlib import Path

from fleet.errors import ConfigError
from fleet.report.beside import Outcome, accuracy_by_row
from fleet.report.covered import coverage_by_round, coverage_by_row
from fleet.report.curves import by_bytes, by_round
from fleet.report.history import History, Line
from fleet.report.memory import by_memory
from fleet.report.refused import refusals_by_round, refusals_by_row
from fleet.report.spread import NOT_MEASURED, spread_by_round, spread_by_row
from fleet.report.style import Picture

NAMES = (
    "accuracy-by-row",
    "accuracy-by-round",
    "accuracy-by-bytes",
    "accuracy-by-memory",
    "client-accuracy",
    "coverage",
    "refusals",
)


def run_pictures(
    name: str, history: History, beside: Sequence[Line] = ()
) -> tuple[list[Picture], list[str]]:
    """A run's pictures, and a sentence for each that there is not.

    Args:
        beside: other runs, in the pictures of accuracy.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    lines = [Line(name, [history]), *beside]
    pictures = [by_round(lines), by_bytes(lines), by_memory(lines) if beside else None]
    pictures += [spread_by_round(history)]
    unequal = _is_unequal([history])
    pictures += [coverage_by_round(history) if unequal else None, refusals_by_round(history)]
    return _told(pictures, [history], unequal)


def comparison_pictures(
    lines: Sequence[Line], outcomes: Sequence[Outcome] = ()
) -> tuple[list[Picture], list[str]]:
    """A comparison's pictures, and a sentence for each that there is not.

    Args:
        outcomes: of the rows, in their order.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    runs = [run for line in lines for run in line.runs]
    lines = [line for line in lines if line.runs]
    if not runs:
        return [], ["No run ended well; there is nothing to draw."]
    unequal = _is_unequal(runs)
    pictures = [
        accuracy_by_row(outcomes),
        by_round(lines),
        by_bytes(lines),
        by_memory(lines),
        spread_by_row(lines),
        coverage_by_row(lines) if unequal else None,
        refusals_by_row(lines),
    ]
    return _told(pictures, runs, unequal)


def write_pictures(folder: Path, pictures: Sequence[Picture]) -> None:
    """Each as SVG and PNG; those of an earlier time that there are no more are removed.

    Raises:
        ConfigError: if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            (folder / f"{picture.name}.svg").write_bytes(picture.svg().encode())
            (folder / f"{picture.name}.png").write_bytes(picture.png())
        for name in {*NAMES} - {picture.name for picture in pictures}:
            for ending in ("svg", "png"):
                (folder / f"{name}.{ending}").unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot write pictures to {folder}: {error.strerror}; name another folder, or make "
            f"it writable"
        ) from error


def _told(
    pictures: Sequence[Picture | None], runs: Sequence[History], unequal: bool
) -> tuple[list[Picture], list[str]]:
    missing = []
    if not any(run.accuracy for run in runs):
        missing.append("No round has an accuracy yet: nobody evaluated the model.")
    elif not any(run.client_accuracy for run in runs):
        missing.append(NOT_MEASURED)
    if not unequal and any(run.coverage for run in runs):
        missing.append("Every update that counted trained every tensor of the plan.")
    if not any(run.refused for run in runs):
        missing.append("Nobody was refused.")
    return [picture for picture in pictures if picture], missing


def _is_unequal(runs: Sequence[History]) -> bool:
    """Whether some update trained less than all."""
    return any(
        count < updates
        for run in runs
        for updates, counts in run.coverage.values()
        for count in counts.values()
    )
