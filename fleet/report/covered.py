"""Which part of the model was trained by how many, under unequal plans."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fleet.report.grid import Grid
from fleet.report.history import History, Line, blocks_of
from fleet.report.names import labels, lines_in
from fleet.report.style import QUIET, Picture, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_NUMBERS = 14  # columns up to which a cell has its figure written in it
_MOST_CELLS = 1500  # beyond, the cells are a bitmap inside the picture
_LABEL = 20  # characters of a line of a name
_HOW = (
    "Share of the updates that counted that trained the block; of a block's tensors, the least "
    "trained one counts."
)


def coverage_by_round(history: History) -> Picture | None:
    """A row a block, a column a round; None if no round tells."""
    blocks = blocks_of([history])
    if not blocks:
        return None
    rounds = range(min(history.coverage), max(history.coverage) + 1)
    shares = np.full((len(blocks), len(rounds)), np.nan)
    for number, (updates, counts) in history.coverage.items():
        for row, block in enumerate(blocks):
            shares[row, number - rounds[0]] = 100 * counts.get(block, 0) / updates
    with styled():
        figure = new_figure(1.2 + 0.24 * len(blocks))
        axes = figure.subplots()
        _heat(figure, axes, shares, rounds[0] - 0.5)
        axes.set_yticks(range(len(blocks)), labels(blocks, _LABEL))
        axes.set_xlabel("round")
        _whole_ticks(axes)
    return Picture(
        "coverage",
        "Who trained what",
        f"{_HOW} Top: the end of the model. Grey: no update counted.",
        _description(blocks, shares),
        figure,
    )


def coverage_by_row(lines: Sequence[Line]) -> Picture | None:
    """A row a line, a column a block, over all rounds and seeds; None if no run tells."""
    told = [line for line in lines if any(run.coverage for run in line.runs)]
    blocks = blocks_of([run for line in told for run in line.runs])[::-1]
    if not blocks:
        return None
    totals = [_totals(line.runs) for line in told]
    shares = np.array(
        [[100 * counts[b] / all_ if b in counts else np.nan for b in blocks]
         for all_, counts in totals]
    )  # fmt: skip
    names = labels([line.name for line in told], _LABEL, lines=2)
    with styled():
        figure = new_figure(1.9 + (0.3 if lines_in(names) == 1 else 0.36) * len(told))
        axes = figure.subplots()
        _heat(figure, axes, shares[::-1], -0.5)
        axes.set_yticks(range(len(told)), names[::-1], linespacing=1)
        axes.set_xticks(range(len(blocks)), labels(blocks, _LABEL), rotation=90)
    return Picture(
        "coverage",
        "Who trained what",
        f"{_HOW} All rounds and seeds together. Left: the end of the model. Grey: not trained.",
        "; ".join(
            f"{line.name}: {np.nanmin(row):.0f} to {np.nanmax(row):.0f} %"
            for line, row in zip(told, shares, strict=True)
        )
        + ".",
        figure,
    )


def coverage_grid(history: History) -> Grid | None:
    """A row a block, the end of the model first; None if no round tells."""
    updates, counts = _totals([history])
    if not updates:
        return None
    rows = [
        (block, str(counts[block]), f"{100 * counts[block] / updates:.1f}")
        for block in blocks_of([history])[::-1]
    ]
    return Grid(
        "Who trained what",
        ("block", "updates", "of all %"),
        rows,
        f"Of {updates} updates that counted, those that trained the least trained tensor of the "
        "block.",
        named=True,
    )


def _totals(runs: Sequence[History]) -> tuple[int, dict[str, int]]:
    """Updates that counted, and of these, block → those that trained it."""
    updates, totals = 0, {}
    for run in runs:
        for counted, counts in run.coverage.values():
            updates += counted
            for block, count in counts.items():
                totals[block] = totals.get(block, 0) + count
    return updates, totals


def _heat(figure: "Figure", axes: "Axes", shares: np.ndarray, left: float) -> None:
    """Cells from light to dark; 0…100 %."""
    rows, columns = shares.shape
    axes.set_facecolor("#d0d0d0")
    image = axes.pcolormesh(
        np.arange(columns + 1) + left,
        np.arange(rows + 1) - 0.5,
        shares,
        cmap="Blues",
        vmin=0,
        vmax=100,
        edgecolors="white" if columns <= 60 else "face",
        linewidth=0.5 if columns <= 60 else 0,
        rasterized=rows * columns > _MOST_CELLS,
    )
    bar = figure.colorbar(image, ax=axes, location="top", aspect=40, shrink=0.6, pad=0.02)
    bar.set_ticks([0, 50, 100], labels=["0", "50", "100 %"])
    bar.outline.set_visible(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if columns <= _MOST_NUMBERS:
        for row, column in np.argwhere(np.isfinite(shares)):
            share = shares[row, column]
            axes.text(
                column + left + 0.5, row, f"{share:.0f}", ha="center", va="center", fontsize=9,
                color="white" if share > 60 else "#222222",
            )  # fmt: skip


def _whole_ticks(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.tick_params(axis="x", length=3, color=QUIET)


def _description(blocks: Sequence[str], shares: np.ndarray) -> str:
    means = np.nanmean(shares, axis=1)
    words = [f"{block} {mean:.0f} %" for block, mean in zip(blocks, means, strict=True)]
    return f"Mean over rounds: {', '.join(reversed(words))}."
