"""What the runs of a comparison came to: values of each, rows of them, tables and files."""

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleet.errors import ConfigError
from fleet.records import RunRecord, summarise, to_json
from fleet.report import Grid, Outcome, as_html, as_markdown, spreadsheet_cell, write_comparison
from fleet.report.frame import frame
from fleet.report.rounds import MIB
from fleet.report.rows import Row
from simulations.paired import Estimate, estimate, paired_difference
from simulations.recipe import Recipe, Variant

if TYPE_CHECKING:
    import pandas

DIFFERENCE = "difference, points"  # heading of a column that every table has
RECIPE, CELLS = "recipe.toml", "cells.jsonl"  # what a comparison's folder is known by
WRITTEN = (CELLS, RECIPE, "table.md", "table.csv", "report.html")  # anew each time; and pictures
_POINT = 0.01  # below the reference's accuracy: the target where none is given


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        heading: with its unit.
        digits: behind the point.
        value: (facts of a run, target) → its value, in bytes, FLOPs, seconds, shares of 1
            and counts; NaN: not known.
        scale: from that to the heading's unit.
    """

    heading: str
    digits: int
    value: Callable[["Facts", float], float]
    scale: float = 1.0


@dataclass(frozen=True)
class Facts:
    """What the columns need of one run, from one pass over its record.

    Attributes:
        totals: of `summarise`.
        accuracy: of each round, 0…1; NaN where it was not evaluated.
        sent: bytes of both links up to the end of each round.
        device_flops: of a client's training, mean over the clients.
    """

    totals: Mapping[str, Any]
    accuracy: Sequence[float]
    sent: Sequence[int]
    device_flops: float

    @classmethod
    def of(cls, record: RunRecord, measured: Mapping[str, Any]) -> "Facts":
        """Read a run's record.

        Args:
            measured: beside it, when it was made.
        """
        rounds = list(record.rounds())
        return cls(
            summarise(rounds),
            [math.nan if r.accuracy is None else r.accuracy for r in rounds],
            list(accumulate(r.bytes_up + r.bytes_down for r in rounds)),
            float(measured["device_flops"]),
        )

    @property
    def last_accuracy(self) -> float:
        """Of the last round that has one."""
        return next((a for a in reversed(self.accuracy) if not math.isnan(a)), math.nan)

    def first_round_at(self, target: float) -> int | None:
        """The first round whose accuracy is the target or above; round 0 trains nobody."""
        return next((n for n, a in enumerate(self.accuracy) if a >= target), None)


def _cell(by_seed: Mapping[int, float], column: Column) -> str:
    """A row's mean in one column; of how many seeds, if others have none."""
    text = shown(estimate(list(by_seed.values())), column)
    known = sum(not math.isnan(value) for value in by_seed.values())
    return f"{known} of {len(by_seed)}: {text}" if 0 < known < len(by_seed) else text


def _total(key: str) -> Callable[[Facts, float], float]:
    return lambda facts, target: float(facts.totals[key])


def _rounds_to(facts: Facts, target: float) -> float:
    number = facts.first_round_at(target)
    return math.nan if number is None else number


def _bytes_to(facts: Facts, target: float) -> float:
    number = facts.first_round_at(target)
    return math.nan if number is None else facts.sent[number]


COLUMNS: Mapping[str, Column] = {
    "accuracy": Column("accuracy %", 1, lambda facts, target: facts.last_accuracy, 100),
    "rounds-to-target": Column("rounds to target", 1, _rounds_to),
    "bytes-to-target": Column("MiB to target", 2, _bytes_to, 1 / MIB),
    "bytes-up": Column("MiB up", 2, _total("bytes_up"), 1 / MIB),
    "bytes-down": Column("MiB down", 2, _total("bytes_down"), 1 / MIB),
    "client-memory": Column("client peak MiB", 1, _total("peak_client_bytes"), 1 / MIB),
    "device-flops": Column("device GFLOP", 1, lambda facts, target: facts.device_flops, 1e-9),
    "seconds": Column("seconds", 1, _total("seconds")),
    "refused": Column("refused", 1, _total("refused")),
}


@dataclass
class ComparedRow:
    """A row as it was run.

    Attributes:
        variant: what its runs have in common.
        runs: seed → record and what was measured beside it.
        failed: seed → why there is no run, in a line and at length.
    """

    variant: Variant
    runs: dict[int, tuple[RunRecord, Mapping[str, Any]]] = field(default_factory=dict)
    failed: dict[int, tuple[str, str]] = field(default_factory=dict)


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

    @cached_property
    def values(self) -> list[dict[str, dict[int, float]]]:
        """For each row: column → seed → value, unscaled; NaN where it is not known."""
        facts = [
            {seed: Facts.of(*run) for seed, run in sorted(row.runs.items())} for row in self.rows
        ]
        targets = [self._target(facts[self._reference(n)].values()) for n in range(len(facts))]
        return [
            {
                name: {seed: column.value(run, target) for seed, run in runs.items()}
                for name, column in COLUMNS.items()
            }
            for runs, target in zip(facts, targets, strict=True)
        ]

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of the tables; all, if the recipe names none."""
        return self.recipe.columns or tuple(COLUMNS)

    def table(self) -> Grid:
        """A line a row: mean ± half of the 95 % interval, and the paired difference in accuracy.

        The difference comes right behind the accuracy, where a narrow screen has it too.
        """
        values, columns = self.values, self.columns
        headings = [COLUMNS[name].heading for name in columns]
        place = columns.index("accuracy") + 1 if "accuracy" in columns else 0
        headings.insert(place, DIFFERENCE)
        lines = []
        for number, row in enumerate(self.rows):
            cells = [_cell(values[number][name], COLUMNS[name]) for name in columns]
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
            cells.insert(place, difference)
            lines.append((row.variant.name, seeds, *cells))
        note = (
            "Mean over seeds ± half of its 95 % interval (Student's t). Difference: in accuracy, "
            f"to the first row{self._within()}, seed by seed."
        )
        if {"rounds-to-target", "bytes-to-target"} & {*columns}:
            note += (
                f" Target: {self._target_in_words()}; over the seeds that reach it, and how many "
                f"these are where not all do."
            )
        note += self._without_reference()
        return Grid(self.recipe.title, ("row", "seeds", *headings), lines, note, named=True)

    def _repr_html_(self) -> str:
        """The table, where a notebook's cell ends in a comparison."""
        return as_html(self.table())

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
        """`recipe.toml`, `cells.jsonl`, `table.csv`, `table.md`, `report.html` and pictures.

        Raises:
            ConfigError: if they cannot be written.
        """
        table = self.table()
        try:
            lines = [to_json(cell) + "\n" for cell in self.cells()]
            (self.folder / CELLS).write_text("".join(lines))
            (self.folder / RECIPE).write_text(self.recipe.as_toml())
            (self.folder / "table.md").write_text(self._markdown(table))
            (self.folder / "table.csv").write_text(self._csv())
        except OSError as error:
            raise ConfigError(
                f"cannot write {error.filename}: {error.strerror}; free space or give write "
                f"permission there, then run the same command again: no run is repeated"
            ) from error
        rows = [
            Row(
                row.variant.name,
                {seed: run for seed, (run, _) in row.runs.items()},
                {seed: reason for seed, (reason, _) in row.failed.items()},
            )
            for row in self.rows
        ]
        write_comparison(self.folder, self.recipe.title, rows, [table], self.outcomes())

    def outcomes(self) -> list[Outcome]:
        """Every row's last accuracy, as the table has it, with the group that it is held in."""
        outcomes = []
        for row, values in zip(self.rows, self.values, strict=True):
            one = estimate([100 * accuracy for accuracy in values["accuracy"].values()])
            pairs = zip(self.recipe.within, row.variant.group, strict=True)
            group = ", ".join(f"{setting}={value}" for setting, value in pairs)
            outcomes.append(Outcome(row.variant.name, group, one.mean, one.half_width))
        return outcomes

    def cells(self) -> list[dict[str, Any]]:
        """The lines of `cells.jsonl`: a run's settings, and results or why it failed."""
        cells = []
        for row, values in zip(self.rows, self.values, strict=True):
            for seed in sorted(row.runs.keys() | row.failed.keys()):
                facts: dict[str, Any] = {"row": row.variant.name, "seed": seed}
                if seed in row.runs:
                    run = row.runs[seed][0].path
                    facts |= {"status": "done", "run": run.relative_to(self.folder).as_posix()}
                    facts |= {name: values[name][seed] for name in COLUMNS}
                else:
                    reason, details = row.failed[seed]
                    facts |= {"status": "failed", "reason": reason, "details": details}
                facts |= {
                    "settings": dict(row.variant.settings),
                    "engine": row.variant.engine,
                    **row.variant.adversity,
                }
                cells.append(facts)
        return cells

    def _markdown(self, table: Grid) -> str:
        """The table, and below it why rows have fewer runs than seeds: the first reason of each."""
        lines = []
        for row in self.rows:
            if row.failed:
                first, *_ = seeds = sorted(row.failed)
                lines.append((row.variant.name, ", ".join(map(str, seeds)), row.failed[first][0]))
        below = Grid("Failed", ("row", "seeds", "first reason"), lines, named=True)
        return as_markdown(table) + ("\n" + as_markdown(below) if lines else "")

    def _csv(self) -> str:
        """Mean and difference of every column, in its heading's unit, and half of their intervals.

        Numbers are whole as they were worked out; a name that a spreadsheet would take for a
        formula begins with an apostrophe.
        """
        buffer = io.StringIO()
        writer = csv.writer(buffer)
        columns = self.columns
        parts = ("mean", "half interval", "difference", "half interval of difference")
        head = [f"{COLUMNS[name].heading}, {part}" for name in columns for part in parts]
        writer.writerow(["row", "seeds", "failed", *head])
        values = self.values
        for number, row in enumerate(self.rows):
            reference = values[self._reference(number)]
            line = [spreadsheet_cell(row.variant.name), len(row.runs), len(row.failed)]
            for name in columns:
                ours = values[number][name]
                for one in (
                    estimate(list(ours.values())),
                    paired_difference(ours, reference[name]),
                ):
                    scale = COLUMNS[name].scale
                    line += [_plain(one.mean * scale), _plain(one.half_width * scale)]
            writer.writerow(line)
        return buffer.getvalue()

    def _reference(self, number: int) -> int:
        """The first row that this one is held against."""
        group = self.rows[number].variant.group
        return next(i for i, row in enumerate(self.rows) if row.variant.group == group)

    def _without_reference(self) -> str:
        """What the note says of first rows that have no run, and of those held against them."""
        held = {self._reference(n) for n in range(len(self.rows)) if self._reference(n) != n}
        lost = [self.rows[n].variant.name for n in sorted(held) if not self.rows[n].runs]
        if not lost:
            return ""
        what = "no difference"
        if self.recipe.target is None and {"rounds-to-target", "bytes-to-target"} & {*self.columns}:
            what = "neither difference nor target"
        return f" No run of {' or '.join(lost)} ended well: rows held against it have {what}."

    def _target(self, reference: Iterable[Facts]) -> float:
        if self.recipe.target is not None:
            return self.recipe.target
        return estimate([facts.last_accuracy for facts in reference]).mean - _POINT

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


def _plain(value: float) -> str:
    return "" if math.isnan(value) else repr(float(value))
