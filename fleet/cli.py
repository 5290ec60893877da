"""The command `fleet`."""

import contextlib
import json
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fleet.config import default_settings, describe_settings, read_config
from fleet.errors import ConfigError, FleetError
from fleet.records import RoundReport, RunRecord, to_json
from fleet.report import (
    accuracy_picture,
    refusals,
    round_line,
    rounds_table,
    run_values,
    write_page,
)

_FORMAT = click.option(
    "--format",
    "output_format",
    type=click.Choice(["text", "json"]),
    default="text",
    help="json prints one object and nothing else on standard output.",
)


class _Group(click.Group):
    """Prints what the user can mend as one line, without a traceback."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except FleetError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group)
@click.version_option(package_name="fleet-mobiletl")
def main() -> None:
    """Fine-tune mobile CNNs on fleets of small devices."""


def _setting_options(command: Callable) -> Callable:
    """One option for every setting of a run; the defaults are pyproject.toml's."""
    defaults = default_settings()
    for key, kind, meaning in reversed(describe_settings()):
        shown = f"{meaning} [default: {json.dumps(defaults[key])}]"
        flag = f"--{key}/--no-{key}" if kind is bool else f"--{key}"
        command = click.option(flag, key.replace("-", "_"), type=kind, default=None, help=shown)(
            command
        )
    return command


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path), required=False)
@_setting_options
@click.option("--engine", default="local", help="local (in this process) or flower (Ray).")
@_FORMAT
def simulate(recipe: Path | None, engine: str, output_format: str, **options: Any) -> None:
    """Run a simulated fleet; settings come from a RECIPE (TOML) and from options.

    A run's config.toml is a recipe too: it repeats the run in another directory.
    """
    settings = _read_recipe(recipe) if recipe else {}
    settings |= {k.replace("_", "-"): v for k, v in options.items() if v is not None}
    config = read_config(default_settings() | settings)
    # Named here, so that an interrupted run can say where it is.
    record = RunRecord.reserve(config.run_dir)
    settings["run-dir"] = str(record.path)
    with _interruptible(record):
        from simulations.launch import simulate as launch

        with show_progress(config.federation.rounds) as (on_round, on_reply):
            record = launch(settings, engine, on_round, on_reply)
    if output_format == "json":
        click.echo(to_json(record.summary(), indent=2))
    else:
        show_run(record)


@contextlib.contextmanager
def _interruptible(record: RunRecord) -> Iterator[None]:
    """Ctrl-C ends the command with the shell's code for it, 128 + SIGINT, and says what is left."""
    try:
        yield
    except KeyboardInterrupt:
        if record.config_path.is_file():
            click.echo(f"stopped; what is done is in {record.path}", err=True)
        else:
            click.echo(f"stopped; nothing was written to {record.path} yet", err=True)
        raise click.exceptions.Exit(130) from None


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--against", multiple=True, type=click.Path(path_type=Path), help="A run to draw beside it."
)
@click.option("--picture", type=click.Path(path_type=Path), help="Write the picture to an SVG.")
@_FORMAT
def report(run: Path, against: tuple[Path, ...], picture: Path | None, output_format: str) -> None:
    """Print the table of a RUN and write its page anew."""
    record, beside = RunRecord(run), [RunRecord(path) for path in against]
    for each in (record, *beside):
        list(each.rounds())  # what cannot be read is refused; what cannot be written is not
    try:
        write_page(record, beside)
    except ConfigError as error:
        click.echo(f"Warning: {error}", err=True)
    if picture is not None:
        _write_picture(picture, [record, *beside])
    if output_format == "json":
        click.echo(to_json(run_values(record), indent=2))
    else:
        show_run(record)


def _write_picture(path: Path, records: list[RunRecord]) -> None:
    try:
        path.write_text(accuracy_picture(records), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot write picture {path}: {error.strerror}; name another file with --picture"
        ) from error


def _read_recipe(path: Path) -> dict[str, Any]:
    """Settings by name, from a recipe or from the config.toml of a run."""
    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read recipe {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} is not TOML: {error}") from error
    if not isinstance(values.get("settings"), dict):
        return values
    if others := values.keys() - {"settings", "versions", "machine"}:
        raise ConfigError(
            f"recipe {path} has {', '.join(sorted(others))} beside [settings]; "
            f"move it into [settings], or remove the header"
        )
    # A run's own directory is taken: by that run.
    return {key: value for key, value in values["settings"].items() if key != "run-dir"}


def show_run(record: RunRecord) -> None:
    """Print a run: its table, who was refused, and where model and report are."""
    rounds = list(record.rounds())
    ended = record.summary_path.is_file()
    console = Console()
    console.print(rounds_table(rounds, title=record.path.name))
    for line in refusals(rounds):
        console.print(f"refused in {line}", style="yellow", markup=False)
    for noun, path in (("model", record.model_path), ("report", record.page_path)):
        if path.is_file():
            console.print(f"{noun:<7}{path}", soft_wrap=True, highlight=False)
    if not ended:
        console.print(f"the run has not ended: {len(rounds)} rounds so far", style="yellow")


@contextlib.contextmanager
def show_progress(
    rounds: int,
) -> Iterator[tuple[Callable[[RoundReport], None], Callable[[int, int], None]]]:
    """Callbacks that show a run while it goes on, on standard error."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda report: click.echo(round_line(report, rounds), err=True), lambda *_: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        done = progress.add_task("rounds", total=rounds)
        cohort = progress.add_task("clients", total=None)

        def on_round(report: RoundReport) -> None:
            progress.update(done, completed=report.server_round)
            console.print(round_line(report, rounds), highlight=False)

        def on_reply(answered: int, asked: int) -> None:
            progress.update(cohort, completed=answered, total=asked)

        yield on_round, on_reply
