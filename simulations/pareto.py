"""Accuracy against what it costs, of every method: a table and a picture.

python -m simulations.pareto simulations/results/accuracy.jsonl simulations/results/pareto.svg
"""

import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import click

from simulations.benchmark_accuracy import read_cells

# Of methods; Okabe and Ito's colours, which colour-blind readers tell apart.
_FAMILIES = {
    "mobiletl": ("#0072B2", "o", "MobileTL"),
    "blocks": ("#D55E00", "s", "stock autograd, top blocks"),
    "full": ("#000000", "D", "stock autograd, whole model"),
    "shifts": ("#009E73", "^", "norms' shifts"),
    "head": ("#999999", "v", "head alone"),
}


@dataclass(frozen=True)
class Point:
    """What one method came to over its seeds."""

    name: str
    family: str
    accuracies: tuple[float, ...]  # per cent
    peak_mib: float
    teraflops: float
    sent_mib: float
    learning_rate: float

    @property
    def label(self) -> str:
        """What the point's shape and colour do not say already; the default stash goes unsaid."""
        return self.name.removeprefix(f"{self.family} ").replace(" recompute", "")

    @property
    def accuracy(self) -> float:
        """Mean over the seeds, in per cent."""
        return statistics.fmean(self.accuracies)


@click.command()
@click.argument("cells", type=click.Path(exists=True, path_type=Path))
@click.argument("picture", type=click.Path(path_type=Path))
def main(cells: Path, picture: Path) -> None:
    """Print a Markdown table of CELLS and draw the PICTURE (SVG)."""
    points = sorted(points_of(cells), key=lambda point: -point.accuracy)
    print("| method | accuracy, % | seeds | rate | peak, MiB | TFLOP | trained, MiB |")
    print("|---|---|---|---|---|---|---|")
    for p in points:
        spread = f" ± {statistics.stdev(p.accuracies):.1f}" if len(p.accuracies) > 1 else ""
        print(
            f"| {p.name} | {p.accuracy:.1f}{spread} | {len(p.accuracies)} | {p.learning_rate:g} | "
            f"{p.peak_mib:.1f} | {p.teraflops:.1f} | {p.sent_mib:.2f} |"
        )
    draw(points, picture)


def points_of(path: Path) -> list[Point]:
    """One point a method, of all its seeds."""
    by_method = defaultdict(list)
    for cell in read_cells(path):
        if not cell["tuning"]:
            by_method[cell["method"], cell["blocks"], cell["stash"], cell["views"]].append(cell)
    return [_point(cells) for cells in by_method.values()]


def front(points: list[Point], cost: str) -> list[Point]:
    """Those that no other beats in accuracy at the same or a lower cost, by rising cost."""
    best, kept = float("-inf"), []
    for point in sorted(points, key=lambda p: (getattr(p, cost), -p.accuracy)):
        if point.accuracy > best:
            best = point.accuracy
            kept.append(point)
    return kept


def draw(points: list[Point], path: Path) -> None:
    """Two panels, memory and operations, with the Pareto front of each."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    panels = {
        "peak_mib": "peak memory of training, MiB beyond the model",
        "teraflops": "operations of the whole training, TFLOP",
    }
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (cost, label) in zip(axes, panels.items(), strict=True):
        on_front = front(points, cost)
        line = [(getattr(p, cost), p.accuracy) for p in on_front]
        axis.plot(*zip(*line, strict=True), color="#0072B2", linewidth=6, alpha=0.15, zorder=0)
        for p in points:
            colour, marker, _ = _FAMILIES[p.family]
            x = getattr(p, cost)
            axis.errorbar(
                x, p.accuracy, _half_range(p), color=colour, marker=marker, elinewidth=0.8,
                linestyle="none",
            )  # fmt: skip
            axis.annotate(
                p.label, (x, p.accuracy), (5, 4), textcoords="offset points", color=colour,
                fontsize=7.5, fontweight="bold" if p in on_front else "normal",
            )  # fmt: skip
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("held-out accuracy, %")
    used = {p.family for p in points}
    for family, (colour, marker, words) in _FAMILIES.items():
        if family in used:
            axes[1].plot([], [], color=colour, marker=marker, linestyle="none", label=words)
    axes[1].legend(loc="lower right", frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _half_range(point: Point) -> list[list[float]]:
    """Down to the worst seed and up to the best."""
    low, high = min(point.accuracies), max(point.accuracies)
    return [[point.accuracy - low], [high - point.accuracy]]


def _point(cells: list[dict]) -> Point:
    first = cells[0]
    method = first["method"].partition("+")[0].replace("bias-only", "shifts")
    k = f"k={first['blocks']}" if first["blocks"] else ""
    views = f"{first['views']} views" if first["views"] > 1 else ""
    return Point(
        name=" ".join(filter(None, (first["method"], k, first["stash"], views))),
        family=method,
        accuracies=tuple(100 * cell["accuracy"] for cell in cells),
        peak_mib=first["peak_bytes"] / 2**20,
        teraflops=first["flops"] / 1e12,
        sent_mib=first["trainable_bytes"] / 2**20,
        learning_rate=first["learning_rate"],
    )


if __name__ == "__main__":
    main()
