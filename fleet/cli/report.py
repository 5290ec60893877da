"""`fleet report`."""

import os
from pathlib import Path

import click
from rich.console import Console

from fleet.cli.options import format_option
from fleet.errors import ConfigError
from fleet.records import RunRecord, to_json
from fleet.report import (
    accuracy_picture,
    all_tables,
    as_csv,
    as_markdown,
    as_text,
    refusals,
    run_values,
    tables,
    write_files,
    write_page,
)


@click.command("report")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--against", multiple=True, type=click.Path(path_type=Path), help="A run to draw beside it."
)
@click.option("--picture", type=click.Path(path_type=Path), help="Write the picture to an SVG.")
@click.option(
    "--files",
    type=click.Path(path_type=Path),
    help="A folder for every picture as SVG and PNG, every table as CSV and Markdown.",
)
@format_option("text", "json", "md", "csv")
def command(
    run: Path,
    against: tuple[Path, ...],
    picture: Path | None,
    files: Path | None,
    output_format: str,
) -> None:
    """Print the tables of a RUN, or of a comparison's folder, and write its page anew.

    md prints the tables in Markdown; csv prints that of the rounds, and --files has the others.
    """
    # Path's own is_file raises for a name that is too long.
    if not os.path.isfile(RunRecord(run).config_path) and os.path.isfile(run / "cells.jsonl"):
        given = {"--against": against, "--picture": picture, "--files": files}
        if unused := [option for option, value in given.items() if value]:
            raise ConfigError(
                f"{run} is the folder of a comparison, and {unused[0]} is for a run's; leave it "
                f"out: pictures and tables are in the folder"
            )
        _report_comparison(run, output_format)
        return
    _check_begun_comparison(run)
    record, beside = RunRecord(run), [RunRecord(path) for path in against]
    for each in (record, *beside):
        each.check_whole()  # what cannot be read is refused; what cannot be written is not
    try:
        write_page(record, beside)
    except ConfigError as error:
        click.echo(f"Warning: {error}", err=True)
    if picture is not None:
        _write_picture(picture, [record, *beside])
    if files is not None:
        write_files(record, files, beside)
    if output_format == "json":
        click.echo(to_json(run_values(record), indent=2))
    elif output_format in ("md", "csv"):
        _print_tables(record, output_format)
    else:
        show_run(record)


def _check_begun_comparison(folder: Path) -> None:
    """Refuse the folder of a comparison that has written nothing but runs."""
    if os.path.isfile(RunRecord(folder).config_path):
        return
    if os.path.isdir(folder / "runs") and os.path.isfile(folder / ".lock"):
        raise ConfigError(
            f"{folder} is the folder of a comparison that has no tables yet: none of its runs has "
            f"ended, or it goes on; they are there once fleet compare ends or is stopped"
        )


def _report_comparison(folder: Path, output_format: str) -> None:
    # Here, not above: it brings a simulation's libraries, and its command brings this one.
    from fleet.cli.compare import show_comparison
    from simulations.compare import redraw

    comparison = redraw(folder)
    show_comparison(comparison, output_format)
    if not any(row.runs for row in comparison.rows):
        raise click.exceptions.Exit(1)


def _print_tables(record: RunRecord, output_format: str) -> None:
    rounds = list(record.rounds())
    if output_format == "csv":
        click.echo(as_csv(tables(rounds)[0]), nl=False)
        return
    click.echo("\n".join(map(as_markdown, all_tables(rounds))), nl=False)


def _write_picture(path: Path, records: list[RunRecord]) -> None:
    try:
        path.write_text(accuracy_picture(records), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot write picture {path}: {error.strerror}; name another file with --picture"
        ) from error


def show_run(record: RunRecord) -> None:
    """Print a run: its tables, who was refused, and where model and report are."""
    rounds = list(record.rounds())
    ended = record.summary_path.is_file()
    console = Console()
    for grid in tables(rounds, title=record.path.name):
        console.print(as_text(grid), *([""] if grid.note else []))
    for line in refusals(rounds):
        console.print(f"refused in {line}", style="yellow", markup=False)
    for noun, path in (("model", record.model_path), ("report", record.page_path)):
        if path.is_file():
            console.print(f"{noun:<7}{path}", soft_wrap=True, highlight=False)
    if not ended:
        console.print(f"the run has not ended: {len(rounds)} rounds so far", style="yellow")
