"""Accuracy by the memory that the devices need, and the rows that no other row beats."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from fleet.report.curves import MOST_TOGETHER
from fleet.report.history import Line
from fleet.report.names import labels
from fleet.report.style import (
    COLOURS,
    QUIET,
    Picture,
    byte_unit,
    new_figure,
    plain_axes,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

_LABEL = 20  # characters of a name beside its point, which has two lines
_SEEDS = " Upright lines: lowest to highest seed, not the table's 95 % interval."


@dataclass(frozen=True)
class Point:
    """A row by what it needs and what it comes to.

    Attributes:
        name: the row's.
        peak_bytes: largest of any client in any round, mean over seeds.
        accuracy: of the last round that has one, in %: mean over seeds, lowest, highest.
    """

    name: str
    peak_bytes: float
    accuracy: tuple[float, float, float]


def by_memory(lines: Sequence[Line]) -> Picture | None:
    """Last accuracy by peak memory of the devices; None for fewer than two rows that tell."""
    points = [point for line in lines if (point := _point(line))]
    if len(points) < 2:
        return None
    front = pareto_front([(point.peak_bytes, point.accuracy[0]) for point in points])
    size, unit = byte_unit(max(point.peak_bytes for point in points))
    with styled():
        figure = _draw(points, front, size, unit)
    named = len(points) <= MOST_TOGETHER
    return Picture(
        "accuracy-by-memory",
        "Accuracy by peak device memory",
        "Filled and joined: the Pareto front, that no row beats in both. Memory, of the largest "
        "client: the most that PyTorch allocates at once, beyond the loaded model, in a training "
        "step whose images no cache holds yet; batch and momentum are among it."
        + (_SEEDS if any(point.accuracy[1] < point.accuracy[2] for point in points) else "")
        + ("" if named else " " + _key(points)),
        "Pareto front: "
        + "; ".join(_words(points[i], size, unit) for i in front)
        + ". Others: "
        + ("; ".join(_words(p, size, unit) for i, p in enumerate(points) if i not in front) or "-")
        + ".",
        figure,
    )


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points (cost, gain) that none beats, by cost.

    A point beats another that costs no less and gains no more, unless both are alike.
    """
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1] or points[i] == points[front[-1]]:
            front.append(i)
    return front


def _point(line: Line) -> Point | None:
    runs = [run for run in line.runs if run.accuracy and run.peak_bytes]
    if not runs:
        return None
    accuracy = [run.accuracy[-1] for run in runs]
    return Point(
        line.name,
        sum(run.peak_bytes for run in runs) / len(runs),
        (sum(accuracy) / len(accuracy), min(accuracy), max(accuracy)),
    )


def _draw(points: Sequence[Point], front: Sequence[int], size: float, unit: str) -> "Figure":
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = new_figure(3.6)
    axes = figure.subplots()
    plain_axes(axes)
    x, y = [p.peak_bytes / size for p in points], [p.accuracy[0] for p in points]
    axes.vlines(
        x, [p.accuracy[1] for p in points], [p.accuracy[2] for p in points], color=QUIET, lw=1
    )
    axes.plot(
        [x[i] for i in front],
        [y[i] for i in front],
        color=COLOURS[0],
        lw=1.2,
        ls=(0, (4, 2)),
        drawstyle="steps-post",
    )
    for i in range(len(points)):
        best = i in front
        axes.plot(
            x[i],
            y[i],
            marker="o",
            ms=7,
            color=COLOURS[0] if best else QUIET,
            mfc=COLOURS[0] if best else "white",
            mew=1.4,
            ls="",
        )
    axes.margins(0.12, 0.12)
    axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))
    axes.set(xlabel=f"peak memory of a client ({unit})", ylabel="accuracy (%)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, min_n_ticks=2))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    many = len(points) > MOST_TOGETHER
    names = [str(i) for i in range(1, len(points) + 1)]
    if not many:
        names = labels([point.name for point in points], _LABEL, lines=2)
    bars = [(at, *p.accuracy[1:]) for at, p in zip(x, points, strict=True)]
    _label(figure, axes, list(zip(x, y, strict=True)), names, front, bars)
    return figure


def _label(
    figure: "Figure",
    axes: "Axes",
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    front: Sequence[int],
    bars: Sequence[tuple[float, float, float]],
) -> None:
    """A name beside each point, where it lies over no point, no other name, no line and no edge.

    One for which there is no room anywhere near is set where it is hidden least.
    """
    from matplotlib.transforms import Bbox

    texts: list[Text] = []
    for (x, y), name in zip(points, names, strict=True):
        texts.append(
            axes.annotate(
                name, (x, y), (0, 0), textcoords="offset points", fontsize=10, va="bottom"
            )
        )
        texts[-1].set_in_layout(False)  # the axes keep their size
    figure.draw_without_rendering()
    inside = axes.get_window_extent()
    scale = figure.dpi / 72
    centres = axes.transData.transform(points)
    taken = [Bbox.from_bounds(x - 5 * scale, y - 5 * scale, 10 * scale, 10 * scale)
             for x, y in centres]  # fmt: skip
    for (left, low), (right, high) in pairwise(centres[i] for i in front):  # the front's steps
        taken.append(Bbox.from_extents(left, low - scale, right, low + scale))
        taken.append(Bbox.from_extents(right - scale, low, right + scale, high))
    for at, lowest, highest in bars:  # upright, over the seeds
        (across, low), (_, high) = axes.transData.transform([(at, lowest), (at, highest)])
        taken.append(Bbox.from_extents(across - 1.5 * scale, low, across + 1.5 * scale, high))
    for text, centre in zip(texts, centres, strict=True):
        box = text.get_window_extent()
        width, height = box.width / scale, box.height / scale
        best = None
        for away in (7, 16, 26, 38):
            for dx, dy in (
                (away, -height / 2), (-width / 2, away), (-width / 2, -away - height),
                (-away - width, -height / 2), (away, away / 2), (-away - width, away / 2),
                (away, -away / 2 - height), (-away - width, -away / 2 - height),
            ):  # fmt: skip
                left, low = centre[0] + dx * scale, centre[1] + dy * scale
                here = Bbox.from_bounds(left, low, box.width, box.height)
                hidden = sum(
                    both.width * both.height
                    for other in taken
                    if (both := Bbox.intersection(here, other)) is not None
                )
                outside = here.width * here.height
                if (kept := Bbox.intersection(here, inside)) is not None:
                    outside -= kept.width * kept.height
                cost = hidden + 2 * outside + away / 100
                if best is None or cost < best[0]:
                    best = cost, here, (dx, dy)
        _, here, offset = best
        taken.append(here)
        text.set_position(offset)


def _words(point: Point, size: float, unit: str) -> str:
    return f"{point.name}: {point.accuracy[0]:.1f} % with {point.peak_bytes / size:.1f} {unit}"


def _key(points: Sequence[Point]) -> str:
    return "Rows: " + ", ".join(f"{i} {point.name}" for i, point in enumerate(points, 1)) + "."
