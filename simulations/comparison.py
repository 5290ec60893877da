"""What the runs of a comparison came to: values of each, rows of them, tables and files."""

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleet.errors import ConfigError
from fleet.records import RoundReport, RunRecord, summarise, to_json
from fleet.report import Grid, as_markdown, write_comparison
from fleet.report.frame import frame
from fleet.report.rounds import MIB
from fleet.report.rows import Row
from simulations.paired import Estimate, estimate, paired_difference
from simulations.recipe import Recipe, Variant

if TYPE_CHECKING:
    import pandas

_POINT = 0.01  # below the reference's accuracy: the target where none is given


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        heading: with its unit.
        digits: behind the point.
        value: (rounds, what was measured beside them, target) → a run's; NaN: not known.
        scale: of a value, as the table shows it.
    """

    heading: str
    digits: int
    value: Callable[[Sequence[RoundReport], Mapping[str, Any], float], float]
    scale: float = 1.0


def _last_accuracy(rounds: Sequence[RoundReport]) -> float:
    known = [report.accuracy for report in rounds if report.accuracy is not None]
    return known[-1] if known else math.nan


def _of_summary(key: str) -> Callable[[Sequence[RoundReport], Any, float], float]:
    return lambda rounds, measured, target: float(summarise(rounds)[key])


def _until(
    rounds: Sequence[RoundReport], target: float, spent: Callable[[RoundReport], float]
) -> float:
    """What was spent up to the first round that reaches the target; NaN: none does."""
    total = 0.0
    for report in rounds:
        total += spent(report)
        if report.accuracy is not None and report.accuracy >= target:
            return total
    return math.nan


COLUMNS: Mapping[str, Column] = {
    "accuracy": Column("accuracy %", 1, lambda rounds, _, target: _last_accuracy(rounds), 100),
    "rounds-to-target": Column(
        "rounds to target", 1, lambda r, _, target: _until(r, target, lambda x: x.server_round > 0)
    ),
    "bytes-to-target": Column(
        "MiB to target",
        2,
        lambda r, _, target: _until(r, target, lambda x: x.bytes_up + x.bytes_down),
        1 / MIB,
    ),
    "bytes-up": Column("MiB up", 2, _of_summary("bytes_up"), 1 / MIB),
    "bytes-down": Column("MiB down", 2, _of_summary("bytes_down"), 1 / MIB),
    "client-memory": Column("client peak MiB", 1, _of_summary("peak_client_bytes"), 1 / MIB),
    "device-flops": Column(
        "device GFLOP", 1, lambda r, measured, _: float(measured["device_flops"]), 1e-9
    ),
    "seconds": Column("seconds", 1, _of_summary("seconds")),
    "refused": Column("refused", 1, _of_summary("refused")),
}


@dataclass
class ComparedRow:
    """A row as it was run.

    Attributes:
        variant: what its runs have in common.
        runs: seed → record and what was measured beside it.
        failed: seed → why there is no run.
    """

    variant: Variant
    runs: dict[int, tuple[RunRecord, Mapping[str, Any]]] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """The runs of a recipe, and what they came to.

    Attributes:
        recipe: what was asked.
        folder: where runs, tables and page are.
        rows: in the recipe's order.
    """

    recipe: Recipe
    folder: Path
    rows: Sequence[ComparedRow]

    @property
    def failed(self) -> int:
        """Cells without a run."""
        return sum(len(row.failed) for row in self.rows)

    def values(self) -> list[dict[str, dict[int, float]]]:
        """For each row: column → seed → value, unscaled; NaN where it is not known."""
        loaded = [
            {seed: (list(run.rounds()), m) for seed, (run, m) in row.runs.items()}
            for row in self.rows
        ]
        targets = [self._target(loaded, number) for number in range(len(self.rows))]
        return [
            {
                name: {
                    seed: column.value(rounds, measured, target)
                    for seed, (rounds, measured) in runs.items()
                }
                for name, column in COLUMNS.items()
            }
            for runs, target in zip(loaded, targets, strict=True)
        ]

    def table(self) -> Grid:
        """A line a row: mean ± half of the 95 % interval, and the paired difference in accuracy."""
        values = self.values()
        columns = self.recipe.columns or tuple(COLUMNS)
        headings = [COLUMNS[name].heading for name in columns]
        lines = []
        for number, row in enumerate(self.rows):
            cells = [
                shown(estimate(list(values[number][name].values())), COLUMNS[name])
                for name in columns
            ]
            reference = self._reference(number)
            difference = "–"
            if reference != number:
                difference = shown(
                    paired_difference(values[number]["accuracy"], values[reference]["accuracy"]),
                    COLUMNS["accuracy"],
                    signed=True,
                )
            all_seeds = len(row.runs) + len(row.failed)
            seeds = f"{len(row.runs)} of {all_seeds}" if row.failed else str(all_seeds)
            lines.append((row.variant.name, seeds, *cells, difference))
        note = (
            "Mean over seeds ± half of its 95 % interval (Student's t). Difference: in accuracy, "
            f"to the first row{self._within()}, seed by seed."
        )
        if {"rounds-to-target", "bytes-to-target"} & {*columns}:
            note += f" Target: {self._target_in_words()}; of the seeds that reach it."
        return Grid(
            self.recipe.title,
            ("row", "seeds", *headings, "difference, points"),
            lines,
            note,
            named=True,
        )

    def frame(self) -> "pandas.DataFrame":
        """A pandas frame of all rounds: a line a row, seed and round, which are its index.

        Raises:
            ConfigError: if there is no pandas, or no run ended well.
        """
        frames = {
            (row.variant.name, seed): frame(run)
            for row in self.rows
            for seed, (run, _) in sorted(row.runs.items())
        }
        if not frames:
            raise ConfigError(f"no run of {self.folder} ended well; its cells.jsonl says why")
        import pandas  # `frame` has found it

        return pandas.concat(frames, names=["row", "seed"])

    def write(self) -> None:
        """`cells.jsonl`, `table.csv`, `table.md`, `report.html` and pictures.

        Raises:
            ConfigError: if they cannot be written.
        """
        table = self.table()
        try:
            (self.folder / "cells.jsonl").write_text("".join(self._cells()))
            (self.folder / "table.md").write_text(as_markdown(table))
            (self.folder / "table.csv").write_text(self._csv())
        except OSError as error:
            raise ConfigError(
                f"cannot write {error.filename}: {error.strerror}; free space or give write "
                f"permission there, then run the same command again: no run is repeated"
            ) from error
        rows = [
            Row(row.variant.name, {seed: run for seed, (run, _) in row.runs.items()}, row.failed)
            for row in self.rows
        ]
        write_comparison(self.folder, self.recipe.title, rows, [table])

    def _cells(self) -> list[str]:
        """A JSON object a cell."""
        lines = []
        for row, values in zip(self.rows, self.values(), strict=True):
            for seed in sorted(row.runs.keys() | row.failed.keys()):
                facts: dict[str, Any] = {"row": row.variant.name, "seed": seed}
                if seed in row.runs:
                    run = row.runs[seed][0].path
                    facts |= {"status": "done", "run": run.relative_to(self.folder).as_posix()}
                    facts |= {name: values[name][seed] for name in COLUMNS}
                else:
                    facts |= {"status": "failed", "reason": row.failed[seed]}
                facts |= {
                    "settings": dict(row.variant.settings),
                    "engine": row.variant.engine,
                    **row.variant.adversity,
                }
                lines.append(to_json(facts) + "\n")
        return lines

    def _csv(self) -> str:
        """Numbers without units' scales: mean, interval and difference of every column."""
        buffer = io.StringIO()
        writer = csv.writer(buffer)
        columns = self.recipe.columns or tuple(COLUMNS)
        parts = ("mean", "interval", "difference", "difference_interval")
        head = [f"{name}_{part}" for name in columns for part in parts]
        writer.writerow(["row", "seeds", "failed", *head])
        values = self.values()
        for number, row in enumerate(self.rows):
            reference = values[self._reference(number)]
            line = [row.variant.name, len(row.runs), len(row.failed)]
            for name in columns:
                ours = values[number][name]
                for one in (
                    estimate(list(ours.values())),
                    paired_difference(ours, reference[name]),
                ):
                    line += [_plain(one.mean), _plain(one.half_width)]
            writer.writerow(line)
        return buffer.getvalue()

    def _reference(self, number: int) -> int:
        """The first row that this one is held against."""
        group = self.rows[number].variant.group
        return next(i for i, row in enumerate(self.rows) if row.variant.group == group)

    def _target(self, loaded: Sequence[Mapping[int, Any]], number: int) -> float:
        if self.recipe.target is not None:
            return self.recipe.target
        runs = loaded[self._reference(number)].values()
        return estimate([_last_accuracy(rounds) for rounds, _ in runs]).mean - _POINT

    def _target_in_words(self) -> str:
        if self.recipe.target is not None:
            return f"an accuracy of {100 * self.recipe.target:g} %"
        return f"a point below the last accuracy of the first row{self._within()}"

    def _within(self) -> str:
        return f" with the same {' and '.join(self.recipe.within)}" if self.recipe.within else ""


def shown(one: Estimate, column: Column, signed: bool = False) -> str:
    """A mean and its interval as the table has them; a dash for what is not known."""
    if math.isnan(one.mean):
        return "–"
    sign = "+" if signed else ""
    mean = f"{one.mean * column.scale:{sign},.{column.digits}f}"
    if math.isnan(one.half_width):
        return mean
    return f"{mean} ± {one.half_width * column.scale:,.{column.digits}f}"


def read_cells(path: Path) -> list[dict[str, Any]]:
    """The lines of a `cells.jsonl`."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _plain(value: float) -> str:
    return "" if math.isnan(value) else repr(float(value))
