"""What each row came to, beside the row that it is held against."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fleet.report.names import labels, lines_in, without_shared
from fleet.report.style import COLOURS, QUIET, TEXT, Picture, new_figure, plain_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABEL = 18  # characters of a line of a row's name
_TITLE = 26  # of a group's


@dataclass(frozen=True)
class Outcome:
    """A row's accuracy.

    Attributes:
        name: the row's.
        group: of the rows that are held against its first; empty: all are one group.
        accuracy: of the last round that has one, in %: mean over seeds; NaN: not known.
        half_width: of its interval; NaN of a single seed.
    """

    name: str
    group: str
    accuracy: float
    half_width: float


def accuracy_by_row(outcomes: Sequence[Outcome]) -> Picture | None:
    """Axes a group, a point a row, beside its group's first; None for fewer than two rows."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.group, []).append(outcome)
    groups = {group: rows for group, rows in groups.items() if any(map(_is_known, rows))}
    if sum(_is_known(outcome) for outcome in outcomes) < 2:
        return None
    own = {group: without_shared([o.name for o in rows]) for group, rows in groups.items()}
    rows = [*{name: None for names in own.values() for name in names}]  # each where it is first
    names = labels(rows, _LABEL, lines=2)
    missing = [outcome.name for outcome in outcomes if not _is_known(outcome)]
    columns = min(2, len(groups))
    each = 0.24 if lines_in(names) == 1 else 0.34
    with styled():
        titled = 0.25 if len(groups) > 1 else 0.0
        high = -(-len(groups) // columns)
        figure = new_figure(0.6 + high * (titled + 0.15 + each * len(rows)))
        grid = figure.subplots(high, columns, sharex=True, sharey=True, squeeze=False).flat
        titles = labels([*groups], _TITLE) if len(groups) > 1 else [""]
        for axes, title, (group, held) in zip(grid, titles, groups.items(), strict=False):
            _draw(axes, held, [rows.index(name) for name in own[group]])
            axes.set_title(title, fontsize=9.5, loc="left", pad=2, color=TEXT)
        for axes in list(grid[len(groups) :]):
            axes.set_visible(False)
            grid[len(groups) - columns].tick_params(labelbottom=True)
        grid[0].set_yticks(range(len(rows)), names, linespacing=1)
        grid[0].set_ylim(len(rows) - 0.5, -0.5)
        figure.supxlabel("accuracy (%)", fontsize=10.5)
    return Picture(
        "accuracy-by-row",
        "Accuracy of each row" + (" within its group" if len(groups) > 1 else ""),
        _caption(outcomes, len(groups) > 1)
        + (f" Without an accuracy: {', '.join(missing)}." if missing else ""),
        "; ".join(
            (f"{group}: " if group else "")
            + ", ".join(
                f"{name} {one.accuracy:.1f} %"
                for name, one in zip(own[group], held, strict=True)
                if _is_known(one)
            )
            for group, held in groups.items()
        )
        + ".",
        figure,
    )


def _caption(outcomes: Sequence[Outcome], grouped: bool) -> str:
    """How to read it; of an interval only where one is drawn."""
    known = [outcome for outcome in outcomes if _is_known(outcome)]
    alone = [outcome for outcome in known if math.isnan(outcome.half_width)]
    if len(alone) == len(known):
        what = "After the last round, of one seed, so without an interval."
    else:
        what = "After the last round, mean over seeds. Thick bar: its 95 % interval"
        what += "; a row of one seed has none." if alone else "."
    return (
        f"{what} Diamond and upright line: the first row{' of the group' if grouped else ''}. "
        f"Dotted: from there to the row's own point, how much it gains or loses."
    )


def _is_known(outcome: Outcome) -> bool:
    return not math.isnan(outcome.accuracy)


def _draw(axes: "Axes", held: Sequence[Outcome], places: Sequence[int]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    plain_axes(axes, grid="x")
    blue, first = COLOURS[0], held[0]
    if _is_known(first):
        axes.axvline(first.accuracy, color=QUIET, lw=1)
    for place, one in zip(places, held, strict=True):
        if not _is_known(one):
            continue
        if _is_known(first):
            axes.hlines(place, first.accuracy, one.accuracy, color=blue, lw=1, ls=(0, (1, 1.5)))
        if not math.isnan(one.half_width):
            low, high = one.accuracy - one.half_width, one.accuracy + one.half_width
            axes.hlines(place, max(0.0, low), min(100.0, high), color=blue, lw=3.5, alpha=0.35)
        axes.plot(one.accuracy, place, "D" if one is first else "o", ms=6, color=blue)
    axes.xaxis.set_major_locator(MaxNLocator(5, min_n_ticks=2))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.tick_params(axis="y", length=0)
