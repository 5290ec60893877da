"""`fleet compare`."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from fleet.cli.options import format_option
from fleet.cli.simulate import find_modules_here
from fleet.cli.stopping import exit_code, signals_stop
from fleet.cli.sweep import show_sweep
from fleet.config import read_toml
from fleet.errors import ConfigError
from fleet.records import to_json
from fleet.report import Grid, as_text

_MANY = 10_000  # cells; more are asked about
_UNBROKEN = 10_000  # characters of a line that goes to no terminal
_NAME = 24  # characters of a row's name that a line has room for


@click.command("compare")
@click.argument("recipe", type=click.Path(path_type=Path), required=False)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for it all.")
@click.option(
    "--vary",
    multiple=True,
    metavar="NAME=VALUE,VALUE…",
    help="An axis, as strategy=fedavg,fedadam; a value with commas in quotes: "
    "'blocks=\"1,3,5\",5'.",
)
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="A setting of every run."
)
@click.option("--seeds", help="How many, as 3, or which, as 0,4,7.")
@click.option("--target", type=float, help="Accuracy that rounds and bytes are counted to.")
@click.option("--columns", help="Of the table, as accuracy,bytes-up.")
@click.option("--jobs", default=1, show_default=True, help="Runs at once, a process each.")
@click.option("--keep-models", is_flag=True, help="Keep every run's model and page.")
@click.option(
    "--yes",
    is_flag=True,
    help=f"Do not ask about more than {_MANY:,} runs, nor refuse them without a terminal.",
)
@format_option("text", "json", "md", "csv")
def command(
    recipe: Path | None,
    out: Path,
    vary: tuple[str, ...],
    settings: tuple[str, ...],
    seeds: str | None,
    target: float | None,
    columns: str | None,
    jobs: int,
    keep_models: bool,
    yes: bool,
    output_format: str,
) -> None:
    """Compare runs: those of a RECIPE (TOML), changed and completed by the options.

    As: fleet compare --vary strategy=fedavg,fedadam --seeds 3 --out runs/mine. Settings are those
    that fleet simulate --help lists; ready recipes are in simulations/recipes.

    Runs that are there are not run again; the same command goes on where it was stopped.
    """
    with signals_stop():
        try:
            find_modules_here()
            asked = _asked(recipe, vary, settings, seeds, target, columns)
            _ask(asked.num_cells, yes)
            comparison = _shown(asked, out, jobs, keep_models)
        except KeyboardInterrupt as stopped:
            click.echo(f"stopped; the same command goes on with what is in {out}", err=True)
            raise click.exceptions.Exit(exit_code(stopped)) from None
    show_comparison(comparison, output_format)
    if comparison.failed:
        raise click.exceptions.Exit(1)


def _asked(
    recipe: Path | None,
    vary: tuple[str, ...],
    settings: tuple[str, ...],
    seeds: str | None,
    target: float | None,
    columns: str | None,
) -> Any:
    """The `simulations.recipe.Recipe` that a file and options ask for."""
    from simulations.compare import load_recipe
    from simulations.recipe import in_tables, parse_axis, parse_seeds, parse_setting

    values: dict[str, Any] = dict(in_tables(read_toml(recipe))) if recipe else {}
    for key, parse, texts in (("vary", parse_axis, vary), ("settings", parse_setting, settings)):
        if texts:
            values[key] = {**values.get(key, {}), **dict(map(parse, texts))}
    if seeds is not None:
        values["seeds"] = parse_seeds(seeds)
    if target is not None:
        values["target"] = target
    if columns is not None:
        values["columns"] = [name.strip() for name in columns.split(",") if name.strip()]
        if not values["columns"]:
            raise ConfigError(
                f"--columns names none, got {columns!r}; name some, as accuracy,bytes-up, or leave "
                f"it out for all"
            )
    if recipe is None and not {"vary", "settings", "seeds"} & values.keys():
        raise ConfigError(
            "nothing to compare; give a recipe, as simulations/recipes/strategies.toml, or an "
            "axis, as --vary strategy=fedavg,fedadam"
        )
    return load_recipe(values)


def _shown(asked: Any, out: Path, jobs: int, keep_models: bool) -> Any:
    """The `simulations.comparison.Comparison`, its progress shown."""
    from simulations.compare import compare

    with show_sweep(asked.num_cells) as (on_cell, on_round, note):
        return compare(
            asked,
            out,
            jobs=jobs,
            keep_models=keep_models,
            on_cell=on_cell,
            on_round=on_round,
            on_note=note,
        )


def show_comparison(comparison: Any, output_format: str) -> None:
    """Print a comparison's table, what failed, and where the page is.

    Args:
        comparison: a `simulations.comparison.Comparison`.
    """
    if output_format == "json":
        click.echo(to_json(comparison.cells(), indent=2))
    elif output_format == "md":
        click.echo((comparison.folder / "table.md").read_text(), nl=False)
    elif output_format == "csv":
        click.echo((comparison.folder / "table.csv").read_text(), nl=False)
    else:
        console, table = Console(), comparison.table()
        if console.is_terminal:
            table = _fitting(table, console)
        else:  # a file or another program takes lines of any length
            console = Console(width=_UNBROKEN)
        console.print(as_text(table))
        for row in comparison.rows:
            for seed, (reason, _) in sorted(row.failed.items()):
                text = f"failed: {row.variant.name}, seed {seed}: {reason}"
                console.print(text, style="yellow", markup=False)
        console.print(f"report {comparison.folder / 'report.html'}", soft_wrap=True)


def _fitting(table: Grid, console: Console) -> Grid:
    """The table with as many columns as the console has room for; accuracy is kept longest."""
    # Here, not above: it brings a simulation's libraries.
    from simulations.comparison import COLUMNS, DIFFERENCE

    columns, rows = list(table.columns), [list(row) for row in table.rows]
    kept, dropped = (COLUMNS["accuracy"].heading, DIFFERENCE), 0
    while len(columns) > 4:
        widths = [
            max(map(len, cells))
            for cells in zip(columns[1:], *(row[1:] for row in rows), strict=True)
        ]
        if sum(widths) + len(widths) + _NAME <= console.width:
            break
        dropped += 1
        others = [n for n, name in enumerate(columns) if n > 1 and name not in kept]
        for cells in (columns, *rows):
            del cells[others[-1]]
    more = f" {dropped} more columns are in table.md." if dropped else ""
    return replace(
        table, columns=tuple(columns), rows=[tuple(row) for row in rows], note=table.note + more
    )


def _ask(cells: int, yes: bool) -> None:
    if cells <= _MANY or yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError(
            f"this is {cells:,} runs, more than {_MANY:,}; with --yes they are run, all of them"
        )
    click.confirm(f"This is {cells:,} runs, more than {_MANY:,}. Run them all?", abort=True)
