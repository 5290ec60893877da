"""Accuracy by round and by bytes: a line a row, with a band over its seeds."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fleet.report.history import Line
from fleet.report.names import labels, lines_in
from fleet.report.style import (
    COLOURS,
    DASHES,
    MARKERS,
    QUIET,
    RULE,
    TEXT,
    Picture,
    byte_unit,
    new_figure,
    plain_axes,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# More lines than these are no longer told apart in one picture.
MOST_TOGETHER = 6
_MOST_MARKS = 12  # points marked on a line
_LABEL = 20  # characters of a name beside its line, which has two lines
_TITLE = 24  # characters of one above its axes
_WIDE = 10  # ratio of largest to smallest from which an axis is logarithmic

Curve = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # x, mean, lowest, highest


def by_round(lines: Sequence[Line]) -> Picture | None:
    """Accuracy by round; None if no run has one."""
    curves = {n: c for n, line in enumerate(lines) if (c := _curve(line, False))}
    return _picture("accuracy-by-round", "Accuracy by round", "round", lines, curves, "whole")


def by_bytes(lines: Sequence[Line]) -> Picture | None:
    """Accuracy by bytes that both links carried; None if no run has one, or sent any."""
    curves, label, scale = _by_bytes(lines)
    return _picture("accuracy-by-bytes", "Accuracy by bytes", label, lines, curves, scale)


def both(lines: Sequence[Line]) -> Picture:
    """The two side by side; empty axes where no run has an accuracy."""
    rounds = {n: c for n, line in enumerate(lines) if (c := _curve(line, False))}
    sent, label, scale = _by_bytes(lines)
    with styled():
        figure = new_figure(3.3, width=9.2)
        left, right = figure.subplots(1, 2, sharey=True)
        all_sent = sent.keys() == rounds.keys()  # names stand where every line is
        _draw_together(figure, left, lines, rounds, "whole", named=not all_sent)
        _draw_together(figure, right, lines, sent, scale, named=all_sent)
        left.set(xlabel="round", ylabel="accuracy (%)")
        right.set(xlabel=label)
    title = "Accuracy by round and by bytes"
    return Picture("accuracy", title, _caption(lines, rounds), _description(lines, rounds), figure)


def place_labels(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Heights near the wanted ones, in their order, none nearer to another than the gap.

    Args:
        wanted: heights of the lines' ends.
        gap: of neighbours at least, as far as there is room.
        low, high: between which the labels are to be, as far as there is room.
    """
    order = np.argsort(wanted, kind="stable")
    placed = [float(wanted[i]) for i in order]
    for i in range(len(placed)):
        placed[i] = max(placed[i], low if i == 0 else placed[i - 1] + gap)
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], high if i == len(placed) - 1 else placed[i + 1] - gap)
    result = [0.0] * len(placed)
    for i, height in zip(order, placed, strict=True):
        result[i] = height
    return result


def _curve(line: Line, sent: bool) -> Curve | None:
    """Over the rounds of which every seed has an accuracy: a mean of fewer would jump."""
    runs = [run for run in line.runs if run.rounds]
    shared = set.intersection(*({*run.rounds} for run in runs)) if runs else set()
    if not shared:
        return None
    keep = [[i for i, number in enumerate(run.rounds) if number in shared] for run in runs]
    x, y = (
        np.array([np.array(getattr(run, key))[kept] for run, kept in zip(runs, keep, strict=True)])
        for key in ("sent" if sent else "rounds", "accuracy")
    )
    return x.mean(0), y.mean(0), y.min(0), y.max(0)


def _by_bytes(lines: Sequence[Line]) -> tuple[dict[int, Curve], str, str]:
    """Curves by bytes, what to write at their axis, and its scale."""
    curves = {n: c for n, line in enumerate(lines) if (c := _curve(line, True)) and c[0][-1]}
    ends = [curve[0][-1] for curve in curves.values()] or [1.0]
    size, unit = byte_unit(max(ends))
    logarithmic = max(ends) > _WIDE * min(ends)
    for number, (sent, *accuracy) in curves.items():
        shown = sent > 0 if logarithmic else slice(None)  # nothing was sent before round 1
        curves[number] = (sent[shown] / size, *(values[shown] for values in accuracy))
    label = f"{unit} sent, up and down" + (" (log)" if logarithmic else "")
    return curves, label, "log" if logarithmic else "linear"


def _picture(
    name: str,
    title: str,
    xlabel: str,
    lines: Sequence[Line],
    curves: dict[int, Curve],
    scale: str,
) -> Picture | None:
    if not curves:
        return None
    with styled():
        if len(lines) <= MOST_TOGETHER:
            figure = new_figure(3.3)
            _draw_together(figure, figure.subplots(), lines, curves, scale)
        else:
            names = labels([lines[number].name for number in curves], _TITLE, lines=2)
            height = 1.2 + 0.15 * lines_in(names)
            figure = new_figure(0.7 + height * -(-len(curves) // 2))
            _draw_apart(figure, names, curves, scale)
        figure.supxlabel(xlabel, fontsize=10.5)
        figure.supylabel("accuracy (%)", fontsize=10.5)
    return Picture(name, title, _caption(lines, curves), _description(lines, curves), figure)


def _draw_together(
    figure: "Figure",
    axes: "Axes",
    lines: Sequence[Line],
    curves: dict[int, Curve],
    scale: str,
    named: bool = True,
) -> None:
    """All in one, each with its name at its end."""
    for number, curve in curves.items():
        _draw(axes, curve, number)
    _scale(axes, scale)
    if len(curves) < 2 or not named:
        return
    names = labels([lines[number].name for number in curves], _LABEL, lines=2)
    ends = [(curve[0][-1], curve[1][-1]) for curve in curves.values()]
    # Names stand beside the axes, level with the ends as far as there is room.
    texts = [axes.text(1.04, 0.5, name, transform=axes.transAxes, va="center") for name in names]
    figure.draw_without_rendering()
    height = axes.get_window_extent().height
    gap = 1.55 * lines_in(names) - 0.3  # lines of text; names of two stand apart
    gap *= texts[0].get_fontsize() * figure.dpi / 72 / height
    to_axes = axes.transData + axes.transAxes.inverted()
    starts = to_axes.transform(ends)
    heights = place_labels([y for _, y in starts], gap, 0.02, 0.98)
    for number, text, (x, y), level in zip(curves, texts, starts, heights, strict=True):
        text.set_position((1.04, level))
        leader = {"color": COLOURS[number % len(COLOURS)], "linewidth": 0.8, "clip_on": False}
        axes.plot(
            (x, 1.03), (y, level), transform=axes.transAxes, scalex=False, scaley=False, **leader
        )


def _draw_apart(
    figure: "Figure", names: Sequence[str], curves: dict[int, Curve], scale: str
) -> None:
    """Each in axes of its own, before all others in grey."""
    grid = figure.subplots(-(-len(curves) // 2), 2, sharex=True, sharey=True, squeeze=False).flat
    for axes, name, curve in zip(grid, names, curves.values(), strict=False):
        for other in curves.values():
            axes.plot(other[0], other[1], color=RULE, lw=0.8)
        _draw(axes, curve, 0)
        _scale(axes, scale)
        axes.set_title(name, fontsize=9.5, loc="left", pad=2, color=TEXT, linespacing=1)
    for axes in list(grid[len(curves) :]):
        axes.set_visible(False)
        grid[len(curves) - 2].tick_params(labelbottom=True)


def _draw(axes: "Axes", curve: Curve, place: int) -> None:
    x, mean, lowest, highest = curve
    place %= len(COLOURS)
    colour = COLOURS[place]
    axes.plot(
        x,
        mean,
        color=colour,
        linestyle=DASHES[place],
        marker=MARKERS[place],
        markersize=4,
        markevery=max(1, -(-len(x) // _MOST_MARKS)),
        linewidth=1.6,
    )
    if (lowest != highest).any():
        axes.fill_between(x, lowest, highest, color=colour, alpha=0.18, linewidth=0)
        if len(x) == 1:
            axes.vlines(x, lowest, highest, color=colour, linewidth=1.2)


def _scale(axes: "Axes", scale: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    plain_axes(axes)
    plain = FuncFormatter(lambda value, _: f"{value:,.6g}")
    if scale == "log":
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        few = high / low < 100
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=9))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=scale == "whole", min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(5, min_n_ticks=2))
    axes.xaxis.set_major_formatter(plain)
    axes.yaxis.set_major_formatter(plain)
    axes.tick_params(color=QUIET)


def _caption(lines: Sequence[Line], curves: dict[int, Curve]) -> str:
    seeds = max((len(lines[number].runs) for number in curves), default=0)
    words = []
    if seeds > 1:
        words.append(
            "Line: mean over seeds. Band: from the lowest to the highest seed, not the "
            "table's 95 % interval."
        )
    if len(lines) > MOST_TOGETHER:
        words.append("Each row stands out once; grey: all others.")
    if missing := [line.name for n, line in enumerate(lines) if n not in curves]:
        words.append(f"Without an accuracy in a round that all seeds have: {', '.join(missing)}.")
    return " ".join(words)


def _description(lines: Sequence[Line], curves: dict[int, Curve]) -> str:
    ends = [
        f"{lines[number].name}: from {mean[0]:.1f} % to {mean[-1]:.1f} % at {x[-1]:,.6g}"
        for number, (x, mean, _, _) in curves.items()
    ]
    return "; ".join(ends) + "."
