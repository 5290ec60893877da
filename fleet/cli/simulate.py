"""`fleet simulate`."""

import contextlib
import json
import os
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fleet.cli.options import format_option
from fleet.cli.report import show_run
from fleet.config import default_settings, describe_settings, read_config
from fleet.errors import ConfigError
from fleet.records import RoundReport, RunRecord, to_json
from fleet.report import round_line


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


@click.command("simulate")
@click.argument("recipe", type=click.Path(path_type=Path), required=False)
@_setting_options
@click.option("--engine", default="local", help="local (in this process) or flower (Ray).")
@click.option(
    "--workers",
    default="1",
    help="Processes that clients run in (engine local); 1: this one; auto: one for each core.",
)
@click.option(
    "--attack",
    help="What hostile clients do: sign_flip:10, alie, ipm:0.5, gaussian:0.1, nan or label_flip.",
)
@click.option("--hostile", type=float, help="Share of the clients that do it.")
@click.option("--drop", type=float, help="Probability that a client's update is lost.")
@format_option("text", "json")
def command(
    recipe: Path | None,
    engine: str,
    workers: str,
    attack: str | None,
    hostile: float | None,
    drop: float | None,
    output_format: str,
    **options: Any,
) -> None:
    """Run a simulated fleet; settings come from a RECIPE (TOML) and from options.

    A run's config.toml is a recipe too: it repeats the run in another directory.
    """
    settings, adversity = _read_recipe(recipe) if recipe else ({}, {})
    given = {"attack": attack, "hostile": hostile, "drop": drop}
    adversity |= {key: value for key, value in given.items() if value is not None}
    settings |= {k.replace("_", "-"): v for k, v in options.items() if v is not None}
    config = read_config(default_settings() | settings)
    # Named here, so that an interrupted run can say where it is.
    record = RunRecord.reserve(config.run_dir)
    settings["run-dir"] = str(record.path)
    _find_modules_here()
    with _interruptible(record):
        from simulations.adversity import Adversity
        from simulations.launch import simulate as launch

        adversity = vars(Adversity.of(adversity))
        with show_progress(config.federation.rounds) as (on_round, on_reply):
            record = launch(settings, engine, on_round, on_reply, workers=workers, **adversity)
    if output_format == "json":
        click.echo(to_json(record.summary(), indent=2))
    else:
        show_run(record)


def _find_modules_here() -> None:
    """A strategy or rule of the user's own may lie in the working directory.

    A console script does not look there. It comes last: what is installed is not hidden.
    """
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


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


def _read_recipe(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings by name and the table [simulation], from a recipe or the config.toml of a run."""
    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read recipe {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} is not TOML: {error}") from error
    simulation = values.pop("simulation", {})
    if not isinstance(simulation, dict):
        raise ConfigError(f"recipe {path}: simulation must be a table, got {simulation!r}")
    if not isinstance(values.get("settings"), dict):
        return values, simulation
    if others := values.keys() - {"settings", "versions", "machine"}:
        raise ConfigError(
            f"recipe {path} has {', '.join(sorted(others))} beside [settings]; "
            f"move it into [settings], or remove the header"
        )
    # A run's own directory is taken: by that run.
    settings = {key: value for key, value in values["settings"].items() if key != "run-dir"}
    return settings, simulation


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
