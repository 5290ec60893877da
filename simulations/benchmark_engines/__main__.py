"""`python -m simulations.benchmark_engines`; see the package."""

import os
import platform
from pathlib import Path
from statistics import median

import click

from fleet.measure.comparison import commit
from fleet.report import Grid, as_markdown
from simulations.benchmark_engines.measure import JOBS, Cost, Engine, Job, engines, run_job

_MIB = 2**20

NOTE = (
    "Medians of {repeats} interleaved runs, in brackets the lowest and the highest. Start: from "
    "the start of the process to the end of round 1, less the imports of PyTorch and Flower. CPU: "
    "of all processes, a round, rounds {first} to {last}. Job: all {last} rounds and their start, "
    "imports included, by the clock and CPU of all processes. Ratios are of one repeat's runs, "
    "beside each other in time. Peak: the most that all processes were seen to hold at once, once "
    "a second, shared pages counted once. Loss: of the last network over all images; the same "
    "steps give the same."
)


@click.command()
@click.option("--job", "name", type=click.Choice(list(JOBS)), default="small", show_default=True)
@click.option("--venvs", type=click.Path(path_type=Path), help="Where BlazeFL's and pfl's are.")
@click.option("--repeats", default=3, show_default=True)
def main(name: str, venvs: Path | None, repeats: int) -> None:
    """Run a job on every engine in turn, and print the table."""
    job = JOBS[name]
    known = engines(venvs, job)
    costs: dict[str, list[Cost]] = {engine.name: [] for engine in known}
    for _ in range(repeats):
        for engine in known:
            costs[engine.name].append(run_job(engine, job.rounds))
            click.echo(f"{engine.name}: {costs[engine.name][-1]}", err=True)
    more = (" --venvs FOLDER" if venvs else "") + f" --repeats {repeats}"
    click.echo(f"    python -m simulations.benchmark_engines --job {name}{more}\n")
    made = table(known, costs, job) if job.task else start_table(costs["fleet simulate"], job)
    click.echo(as_markdown(made).replace("## ", "### ", 1))
    versions = {key: v for of in costs.values() for key, v in of[0].versions.items()}
    named = ", ".join(f"{key} {value}" for key, value in sorted(versions.items()))
    load = os.getloadavg()[2]
    click.echo(
        f"Commit {commit()}, {platform.machine()}, {os.cpu_count()} cores, load of the last "
        f"quarter of an hour {load:.1f}, {named}."
    )


def table(known: list[Engine], costs: dict[str, list[Cost]], job: Job) -> Grid:
    """A line an engine, beside the plain loop and beside ours."""

    def beside(engine: Engine, other: str, attribute: str, digits: int) -> str:
        """Ratios of the runs that were made one after the other."""
        pairs = zip(costs[engine.name], costs[other], strict=True)
        return _spread([getattr(a, attribute) / getattr(b, attribute) for a, b in pairs], digits)

    rows = []
    for engine in known:
        own = costs[engine.name]
        rows.append(
            (
                engine.name,
                _spread([cost.start_seconds for cost in own], 1),
                beside(engine, "ours", "start_seconds", 1),
                _spread([1000 * cost.cpu_seconds for cost in own], 0),
                beside(engine, "plain loop", "cpu_seconds", 2),
                beside(engine, "ours", "cpu_seconds", 2),
                _spread([1000 * cost.seconds for cost in own], 0),
                _spread([cost.job_seconds for cost in own], 1),
                _spread([cost.job_cpu_seconds for cost in own], 1),
                beside(engine, "ours", "job_cpu_seconds", 2),
                _spread([cost.peak_bytes / _MIB for cost in own], 0),
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
        "job s",
        "job CPU s",
        "job CPU ÷ ours",
        "peak MiB",
        "loss",
    )
    _, warm, last = job.rounds
    note = NOTE.format(repeats=len(costs["ours"]), first=warm + 1, last=last)
    return Grid(job.title, columns, rows, note, named=True)


def start_table(costs: list[Cost], job: Job) -> Grid:
    """What the command takes until its first round has ended, beyond imports."""
    row = (
        "fleet simulate",
        _spread([cost.start_seconds for cost in costs], 1),
        _spread([cost.start_cpu_seconds for cost in costs], 1),
        _spread([cost.import_seconds for cost in costs], 1),
        _spread([1000 * cost.cpu_seconds for cost in costs], 0),
        _spread([1000 * cost.seconds for cost in costs], 0),
        _spread([cost.peak_bytes / _MIB for cost in costs], 0),
        f"{costs[0].result:.6f}",
    )
    columns = ("command", "start s", "start CPU s", "imports s", "CPU ms a round")
    _, warm, last = job.rounds
    note = (
        f"Medians of {len(costs)} runs, in brackets the lowest and the highest. Start: from the "
        f"start of the process to the end of round 1, model and evaluation included, less the "
        f"imports of PyTorch and Flower; by the clock, and CPU of all processes. "
        f"CPU: of a round, rounds {warm + 1} to {last}. No features "
        f"were cached before. Loss: of the last model."
    )
    columns += ("wall ms a round", "peak MiB", "loss")
    return Grid(job.title, columns, [row], note, named=True)


def _spread(values: list[float], digits: int) -> str:
    low, high = min(values), max(values)
    return f"{median(values):.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


if __name__ == "__main__":
    main()
