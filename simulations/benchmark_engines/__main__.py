"""`python -m simulations.benchmark_engines`; see the package."""

import os
import platform
from pathlib import Path
from statistics import median

import click

from fleet.measure.comparison import commit
from fleet.report import Grid, as_markdown
from simulations.benchmark_engines.measure import Cost, Engine, engines, run_job

NOTE = (
    "Medians of {repeats} interleaved runs, in brackets the lowest and the highest. Start: from "
    "the start of the process to the end of round 1, less the imports of PyTorch and Flower. CPU: "
    "of all processes, a round, rounds 6 to 45. Ratios are of one repeat's runs, beside each other "
    "in time. Loss: of the last network over all images; the same steps give the same."
)


@click.command()
@click.option("--venvs", type=click.Path(path_type=Path), help="Where BlazeFL's and pfl's are.")
@click.option("--repeats", default=3, show_default=True)
def main(venvs: Path | None, repeats: int) -> None:
    """Run the small job on every engine in turn, and print the table."""
    known = engines(venvs)
    costs: dict[str, list[Cost]] = {engine.name: [] for engine in known}
    for _ in range(repeats):
        for engine in known:
            costs[engine.name].append(run_job(engine))
            click.echo(f"{engine.name}: {costs[engine.name][-1]}", err=True)
    click.echo("    python -m simulations.benchmark_engines --venvs FOLDER\n")
    click.echo(as_markdown(table(known, costs)).replace("## ", "### ", 1))
    versions = {key: v for of in costs.values() for key, v in of[0].versions.items()}
    named = ", ".join(f"{key} {value}" for key, value in sorted(versions.items()))
    load = os.getloadavg()[2]
    click.echo(
        f"Commit {commit()}, {platform.machine()}, {os.cpu_count()} cores, load of the last "
        f"quarter of an hour {load:.1f}, {named}."
    )


def table(known: list[Engine], costs: dict[str, list[Cost]]) -> Grid:
    """A line an engine, beside the plain loop and beside ours."""
    loop, ours = costs["plain loop"], costs["ours"]
    rows = []
    for engine in known:
        own = costs[engine.name]
        rows.append(
            (
                engine.name,
                _spread([cost.start_seconds for cost in own], 1),
                _spread(
                    [
                        cost.start_seconds / o.start_seconds
                        for cost, o in zip(own, ours, strict=True)
                    ],
                    1,
                ),
                _spread([1000 * cost.cpu_seconds for cost in own], 0),
                _spread(
                    [cost.cpu_seconds / o.cpu_seconds for cost, o in zip(own, loop, strict=True)], 2
                ),
                _spread(
                    [cost.cpu_seconds / o.cpu_seconds for cost, o in zip(own, ours, strict=True)], 2
                ),
                _spread([1000 * cost.seconds for cost in own], 0),
                f"{own[0].result:.6f}",
            )
        )
    columns = (
        "engine",
        "start s",
        "start ÷ ours",
        "CPU ms a round",
        "CPU ÷ loop",
        "CPU ÷ ours",
        "wall ms a round",
        "loss",
    )
    title = "62,006 parameters, 100 clients × 50 images, 10 a round, batch 10"
    return Grid(title, columns, rows, NOTE.format(repeats=len(loop)), named=True)


def _spread(values: list[float], digits: int) -> str:
    low, high = min(values), max(values)
    return f"{median(values):.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


if __name__ == "__main__":
    main()
