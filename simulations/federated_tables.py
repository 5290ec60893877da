"""Tables of what `simulations.benchmark_federated` measured, as Markdown.

python -m simulations.federated_tables cells.jsonl
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby
from pathlib import Path
from statistics import mean, stdev

import click

from simulations.benchmark_federated import read_cells

MIB = 2**20
LAST = 3  # rounds whose mean is a run's final accuracy
REFERENCE = "full, float32"
FLOAT32 = "mobiletl k=3, float32"
BELOW = 0.01  # the target lies so far below the reference's final accuracy

Cells = Sequence[dict]


@click.command()
@click.argument("path", type=click.Path(path_type=Path, exists=True))
def main(path: Path) -> None:
    """Print a table for each group of runs that is there."""
    cells = read_cells(path)
    for title, table in (
        ("Bytes to the full model's accuracy", bytes_table(cells)),
        ("Unequal plans", accuracy_table(cells, "plans", FLOAT32)),
        ("Hostile clients", accuracy_table(cells, "attacks", None)),
        ("Lost replies", accuracy_table(cells, "drops", "none lost")),
    ):
        click.echo(f"### {title}\n\n{table}\n")
    click.echo(f"commits: {', '.join(sorted({cell['commit'] for cell in cells}))}")


def bytes_table(cells: Cells) -> str:
    """Rounds and bytes, up plus down, until a run reaches its seed's target.

    The target of a seed is the final accuracy that the full model reaches in
    float32, less one point. A run is there once the mean of its last rounds is, so
    that one lucky round does not count. Times fewer bytes are against what the full
    model itself takes to get there, over the seeds that reach it.
    """
    finals = {(c["name"], c["seed"]): final(c) for c in cells if c["group"] == "bytes"}
    reference = {cell["seed"]: cell for cell in _of(cells, "bytes", REFERENCE)}
    rows = []
    for name, runs in _by_name(cells, "bytes"):
        paired = [cell for cell in runs if cell["seed"] in reference]
        reached = [_until(cell, reference[cell["seed"]]) for cell in paired]
        there = [r for r in reached if r is not None]
        factors = [
            _until(reference[cell["seed"]], reference[cell["seed"]])[1] / r[1]
            for cell, r in zip(paired, reached, strict=True)
            if r is not None
        ]
        rows.append(
            (
                name,
                _spread([100 * final(cell) for cell in runs]),
                _differences(runs, finals, FLOAT32),
                len(runs),
                f"{mean(_each_round(runs, 'bytes_up')) / MIB:.3f}",
                f"{mean(_each_round(runs, 'bytes_down')) / MIB:.3f}",
                f"{len(there)} of {len(paired)}",
                f"{mean(r[0] for r in there):.1f}" if there else "–",
                f"{mean(r[1] for r in there) / MIB:.1f}" if there else "–",
                f"{min(factors):.0f} to {max(factors):.0f}" if factors else "–",
            )
        )
    return markdown(
        [
            "method and codec",
            "accuracy %",
            "against float32",
            "seeds",
            "up MiB a round",
            "down MiB a round",
            "reached the target",
            "rounds until then",
            "MiB until then",
            "times fewer bytes",
        ],
        rows,
    )


def accuracy_table(cells: Cells, group: str, against: str | None) -> str:
    """Final accuracies, and the mean difference, seed by seed, from another row.

    Args:
        against: that row; None: the row of the same rule without an attack.
    """
    finals = {(c["name"], c["seed"]): final(c) for c in cells if c["group"] in (group, "bytes")}
    rows = []
    for name, runs in _by_name(cells, group):
        who = name.partition(" / ")[0]
        plain = f"mean, {who.rpartition(', ')[2]} / no attack"
        rows.append(
            (
                name,
                _spread([100 * final(cell) for cell in runs]),
                len(runs),
                _differences(runs, finals, against or f"{who} / no attack"),
                *([] if against else [_differences(runs, finals, plain)]),
                f"{mean(sum(cell['stepped'][1:]) for cell in runs):g} "
                f"of {len(runs[0]['accuracy']) - 1}",
                f"{mean(sum(cell['refused']) for cell in runs):g}",
            )
        )
    columns = (
        [f"against {against}"] if against else ["against no attack", "against mean unattacked"]
    )
    head = ["run", "accuracy %", "seeds", *columns, "rounds that stepped", "refused"]
    return markdown(head, rows)


def _differences(runs: Cells, finals: dict[tuple[str, int], float], base: str) -> str:
    """Mean difference, seed by seed, from another row in points."""
    found = [
        100 * (final(cell) - finals[base, cell["seed"]])
        for cell in runs
        if (base, cell["seed"]) in finals and cell["name"] != base
    ]
    return f"{mean(found):+.1f}" if found else "–"


def final(cell: dict) -> float:
    """Accuracy of a run: the mean of its last rounds'."""
    return mean(cell["accuracy"][-LAST:])


def markdown(head: Sequence[str], rows: Iterable[Sequence]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _until(cell: dict, reference: dict) -> tuple[int, int] | None:
    """Round in which a run reaches the target, and bytes until then; None: it does not."""
    target = final(reference) - BELOW
    accuracies = cell["accuracy"]
    smooth = [mean(accuracies[max(0, r + 1 - LAST) : r + 1]) for r in range(len(accuracies))]
    sent = accumulate(map(sum, zip(cell["bytes_up"], cell["bytes_down"], strict=True)))
    for number, (accuracy, total) in enumerate(zip(smooth, sent, strict=True)):
        if accuracy >= target:
            return number, max(total, 1)
    return None


def _each_round(runs: Cells, key: str) -> list[float]:
    return [sum(cell[key]) / max(1, len(cell[key]) - 1) for cell in runs]


def _by_name(cells: Cells, group: str) -> Iterable[tuple[str, Cells]]:
    """Runs of a group by name, in the order of the file."""
    order = [c["name"] for c in cells].index
    chosen = sorted((c for c in cells if c["group"] == group), key=lambda c: order(c["name"]))
    return [(name, list(runs)) for name, runs in groupby(chosen, key=lambda c: c["name"])]


def _of(cells: Cells, group: str, name: str) -> list[dict]:
    return [cell for cell in cells if (cell["group"], cell["name"]) == (group, name)]


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
