"""`python -m simulations.benchmark_scale`; see the package."""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

import click

from fleet.config import Value
from fleet.plan import STASHES
from fleet.report import Grid, as_markdown
from simulations.benchmark_scale.job import Course, RoundNote, run_kept
from simulations.benchmark_scale.trend import trend

_MIB = 2**20
_JOB: dict[str, Value] = {
    "partition": "iid",
    "method": "head",
    "image-size": 32,
    "batch-size": 16,
    "local-epochs": 1,
    "test-examples": 300,
    "validation-fraction": 0.0,
}
_WARM = 2  # rounds of a run over fleet sizes that are not counted

_data = click.option(
    "--data",
    default="digits",
    show_default=True,
    help="As of fleet simulate; the digits do for 1,400 clients.",
)
_images = click.option(
    "--images", default=0, help="Training images of each client; 0: all there are."
)
_method = click.option("--method", default=_JOB["method"], show_default=True)
_blocks = click.option("--blocks", default="1", show_default=True)
_out = click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/scale"), show_default=True
)


@click.group()
def main() -> None:
    """Memory over many rounds; time over fleet sizes."""


@main.command()
@click.option("--clients", default=1000, show_default=True)
@click.option("--sampled", default=100, show_default=True, help="Clients a round.")
@click.option("--rounds", default=200, show_default=True)
@click.option("--workers", default=2, show_default=True)
@click.option("--codec-up", default="int8+feedback", show_default=True)
@click.option("--codec-down", default="int8", show_default=True)
@click.option("--name", default="soak", show_default=True, help="Under which it is kept.")
@_data
@_images
@_method
@_blocks
@_out
def soak(
    clients: int,
    sampled: int,
    rounds: int,
    workers: int,
    codec_up: str,
    codec_down: str,
    name: str,
    data: str,
    images: int,
    method: str,
    blocks: str,
    out: Path,
) -> None:
    """Many rounds: the peak of memory, whether it goes on growing, and files that stay open."""
    settings = _JOB | {
        "data": data,
        "clients": clients,
        "sampled": sampled,
        "rounds": rounds + 1,  # of the last one workers' memory is not known
        "train-examples": clients * images,
        "method": method,
        "blocks": blocks,
        "codec-up": codec_up,
        "codec-down": codec_down,
    }
    course = run_kept(out, name, settings, workers, _telling(rounds))
    click.echo(as_markdown(soak_table(course)).replace("## ", "### ", 1))
    click.echo(_made_by([course]))


@main.command()
@click.option(
    "--fleet", "fleets_", type=int, multiple=True, default=(100, 300, 1000, 3000), show_default=True
)
@click.option("--sampled", default=30, show_default=True, help="Clients a round.")
@click.option("--rounds", default=12, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@_data
@_images
@_method
@_blocks
@_out
def fleets(
    fleets_: tuple[int, ...],
    sampled: int,
    rounds: int,
    repeats: int,
    data: str,
    images: int,
    method: str,
    blocks: str,
    out: Path,
) -> None:
    """A cohort out of fleets of several sizes; no feature cache, so that all work alike."""
    courses: dict[int, list[Course]] = {fleet: [] for fleet in fleets_}
    for repeat in range(repeats):
        for fleet in fleets_:
            settings = _JOB | {
                "data": data,
                "clients": fleet,
                "sampled": sampled,
                "rounds": rounds + 1,
                "train-examples": fleet * images,
                "method": method,
                "blocks": blocks,
                "cache": "off",
            }
            name = f"fleet-{fleet}-{repeat}"
            click.echo(name, err=True)
            courses[fleet].append(run_kept(out, name, settings, 1, _telling(rounds)))
    click.echo(as_markdown(fleets_table(courses)).replace("## ", "### ", 1))
    click.echo(_made_by([course for own in courses.values() for course in own]))


@main.command()
@click.option("--clients", default=4, show_default=True)
@click.option("--rounds", default=6, show_default=True)
@click.option("--repeats", default=2, show_default=True)
@click.option("--backbone", default="efficientnet_lite0", show_default=True)
@click.option("--weights", default="default", show_default=True, help="As of fleet simulate.")
@click.option("--image-size", default=128, show_default=True)
@click.option(
    "--stash",
    "stashes",
    multiple=True,
    type=click.Choice(STASHES),
    default=("recompute",),
    show_default=True,
    help="Of MobileTL; each of several is a row.",
)
@click.option("--data", default="digits", show_default=True)
@click.option("--images", default=32, show_default=True, help="Training images of each client.")
@_out
def methods(
    clients: int,
    rounds: int,
    repeats: int,
    backbone: str,
    weights: str,
    image_size: int,
    stashes: tuple[str, ...],
    data: str,
    images: int,
    out: Path,
) -> None:
    """Rounds a minute of one fleet by MobileTL, k = 5, with the shared cache, and by full."""
    common = _JOB | {
        "data": data,
        "clients": clients,
        "rounds": rounds + 1,
        "train-examples": clients * images,
        "test-examples": 100,
        "backbone": backbone,
        "weights": weights,
        "image-size": image_size,
        "local-epochs": 2,
        "learning-rate": 0.01,
    }
    own: dict[str, dict[str, Value]] = {
        f"mobiletl-{stash}": {"method": "mobiletl", "blocks": "5", "stash": stash}
        for stash in dict.fromkeys(stashes)
    }
    own["full"] = {"method": "full"}
    courses: dict[str, list[Course]] = {method: [] for method in own}
    for repeat in range(repeats):
        for method, settings in own.items():
            name = f"{method}-{image_size}-{repeat}"
            click.echo(name, err=True)
            courses[method].append(run_kept(out, name, common | settings, 1, _telling(rounds)))
    click.echo(as_markdown(methods_table(courses)).replace("## ", "### ", 1))
    click.echo(_made_by([course for own in courses.values() for course in own]))


def soak_table(course: Course) -> Grid:
    """What a long run held."""
    settings, notes = course.settings, _steady(course)
    numbers = [note.server_round for note in notes]
    memory = trend(numbers, [note.anonymous / _MIB for note in notes])
    files = [note.files for note in notes]
    rows = [
        ("peak memory, seen", f"{course.peak_pss / _MIB:.0f} MiB"),
        ("peak memory, at most", f"{course.bound / _MIB:.0f} MiB"),
        (
            "memory, per 100 rounds",
            f"{100 * memory.slope:+.2f} ± {100 * memory.standard_error:.2f} MiB",
        ),
        ("least memory, in fifths of the run", _least_by_fifths(course)),
        ("open files", f"{min(files)} to {max(files)}; first {files[0]}, last {files[-1]}"),
        ("clients with a state on disk", str(course.state_clients)),
        ("their states", f"{course.state_bytes / _MIB:.1f} MiB"),
        ("feature cache", f"{course.cache_bytes / _MIB:.1f} MiB"),
        ("CPU a round", f"{_cpu_ms(notes):.0f} ms"),
        ("accuracy after the last round", f"{100 * course.accuracy:.1f} %"),
    ]
    title = (
        f"{settings['clients']} clients, {settings['sampled']} a round, "
        f"{settings['rounds'] - 1} rounds, {_processes(course)}"
    )
    note = (
        f"Peak: the proportional set size of all processes, looked at every second; and the sum "
        f"of what each held at most, which they need not have held at once. Per 100 rounds: pages "
        f"that lie in no file, by least squares, ± standard error. It, files and CPU are of rounds "
        f"{numbers[0]} to {numbers[-1]}, the run's second half. "
        f"{settings['method']}, {settings['image-size']} px, {settings['codec-up']} up, "
        f"{settings['codec-down']} down."
    )
    return Grid(title, ("what", "found"), rows, note, named=True)


def _least_by_fifths(course: Course) -> str:
    """What stays, whatever is held for a moment."""
    held = [note.anonymous / _MIB for note in course.rounds]
    cuts = [len(held) * i // 5 for i in range(6)]
    least = (min(held[a:b]) for a, b in pairwise(cuts) if a < b)
    return ", ".join(f"{mib:.1f}" for mib in least) + " MiB"


def fleets_table(courses: dict[int, list[Course]]) -> Grid:
    """What a round takes, beside what it takes in the smallest fleet."""
    first = courses[min(courses)]
    rows = []
    for fleet, own in courses.items():
        cpu = [_cpu_ms(course.rounds[_WARM:]) for course in own]
        beside = [c / _cpu_ms(o.rounds[_WARM:]) for c, o in zip(cpu, first, strict=True)]
        rows.append(
            (
                str(fleet),
                _spread(cpu, 0),
                _spread(beside, 2),
                _spread([1000 * median(_seconds(course)) for course in own], 0),
                _spread([course.peak_pss / _MIB for course in own], 0),
            )
        )
    settings = own[0].settings
    columns = ("clients", "CPU ms a round", "÷ smallest", "wall ms a round", "peak MiB")
    note = (
        f"Medians of {len(own)} interleaved runs, in brackets the lowest and the highest; ratios "
        f"are of one repeat's runs. Rounds {_WARM} to {settings['rounds'] - 1}, one process, "
        f"{settings['method']}, {settings['image-size']} px, no feature cache."
    )
    return Grid(
        f"{settings['sampled']} clients a round, of fleets of several sizes",
        columns,
        rows,
        note,
        named=True,
    )


def methods_table(courses: dict[str, list[Course]]) -> Grid:
    """Rounds a minute of CPU, and by the clock."""
    full = courses["full"]
    rows = []
    for own in courses.values():
        cpu = [60_000 / _cpu_ms(course.rounds[_WARM:]) for course in own]
        wall = [60 / median(_seconds(course)) for course in own]
        full_cpu = [60_000 / _cpu_ms(course.rounds[_WARM:]) for course in full]
        full_wall = [60 / median(_seconds(course)) for course in full]
        rows.append(
            (
                _label(own[0].settings),
                _spread(cpu, 1),
                _spread([a / b for a, b in zip(cpu, full_cpu, strict=True)], 2),
                _spread(wall, 1),
                _spread([a / b for a, b in zip(wall, full_wall, strict=True)], 2),
                _spread([course.peak_pss / _MIB for course in own], 0),
            )
        )
    settings = full[0].settings
    columns = ("method", "rounds a CPU minute", "÷ full", "a minute", "÷ full", "peak MiB")
    title = (
        f"{settings['clients']} clients × "
        f"{settings['train-examples'] // settings['clients']} images, "
        f"{settings['backbone']}, {settings['image-size']} px"
    )
    note = (
        f"Medians of {len(full)} interleaved runs, in brackets the lowest and the highest; ratios "
        f"are of one repeat's runs. {settings['local-epochs']} local epochs, batch "
        f"{settings['batch-size']}, one process; evaluation of {settings['test-examples']} images "
        f"and the writing of the model included. Rounds {_WARM} to {settings['rounds'] - 1}: "
        f"round 1 has filled the cache."
    )
    return Grid(title, columns, rows, note, named=True)


def _label(settings: Mapping[str, Value]) -> str:
    if settings["method"] == "full":
        return "full"
    return f"MobileTL, k = {settings['blocks']}, {settings['stash']}, cached"


def _steady(course: Course) -> tuple[RoundNote, ...]:
    """The second half: by then every client has been asked, and caches are full."""
    return course.rounds[len(course.rounds) // 2 :]


def _cpu_ms(notes: tuple[RoundNote, ...]) -> float:
    """Of all processes, a round."""
    rounds = notes[-1].server_round - notes[0].server_round
    return 1000 * (notes[-1].cpu_seconds - notes[0].cpu_seconds) / rounds


def _seconds(course: Course) -> list[float]:
    return [note.seconds for note in course.rounds[_WARM:]]


def _processes(course: Course) -> str:
    return "one process" if course.workers == 1 else f"{course.workers} workers"


def _spread(values: list[float], digits: int) -> str:
    low, high = min(values), max(values)
    return f"{median(values):.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def _telling(rounds: int) -> Callable[[RoundNote], None]:
    def tell(note: RoundNote) -> None:
        click.echo(
            f"round {note.server_round}/{rounds}: {note.seconds:.1f} s, "
            f"{note.pss / _MIB:.0f} MiB, {note.files} files",
            err=True,
        )

    return tell


def _made_by(courses: Sequence[Course]) -> str:
    """Where a table is from: of several commits, if there was one while it was made, all."""
    commits = [*dict.fromkeys(course.commit or "unknown" for course in courses)]
    return (
        f"\nCommit{'s' * (len(commits) > 1)} {', '.join(commits)}, {platform.machine()}, "
        f"{os.cpu_count()} cores, Python {platform.python_version()}, data "
        f"{Path(str(courses[0].settings['data'])).name}."
    )


if __name__ == "__main__":
    main()
