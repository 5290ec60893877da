"""`fleet simulate`."""

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from fleet.cli.options import format_option
from fleet.cli.progress import show_progress
from fleet.cli.quick_start import collecting_once_begun
from fleet.cli.report import show_run
from fleet.cli.stopping import stopping
from fleet.config import default_settings, describe_settings, read_config, read_toml
from fleet.errors import ConfigError
from fleet.records import RoundReport, RunRecord, to_json


def setting_options(command: Callable) -> Callable:
    """One option for every setting of a run; the defaults are pyproject.toml's."""
    defaults = default_settings()
    for key, kind, meaning in reversed(describe_settings()):
        if key == "resume":  # an option that takes the run's folder
            continue
        shown = f"{meaning} [default: {json.dumps(defaults[key])}]"
        flag = f"--{key}/--no-{key}" if kind is bool else f"--{key}"
        command = click.option(flag, key.replace("-", "_"), type=kind, default=None, help=shown)(
            command
        )
    return command


@click.command("simulate")
@click.argument("recipe", type=click.Path(path_type=Path), required=False)
@click.option(
    "--resume",
    "interrupted",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Folder of a run that was ended, or has ended: it goes on, to --rounds if you like.",
)
@setting_options
@click.option("--engine", help='local (in this process) or flower (Ray). [default: "local"]')
@click.option(
    "--workers",
    help="Processes that clients run in (engine local); 1: this one; auto: one for each core. "
    "[default: 1]",
)
@click.option(
    "--attack",
    help="What hostile clients do: sign_flip:10, alie, ipm:0.5, gaussian:0.1, nan or label_flip.",
)
@click.option("--hostile", type=float, help="Share of the clients that do it.")
@click.option("--drop", type=float, help="Probability that a client's update is lost.")
@click.option(
    "--log-to",
    multiple=True,
    help="Where else to show the rounds: tensorboard[:FOLDER], mlflow[:EXPERIMENT] or "
    "wandb[:PROJECT]; may be given several times.",
)
@format_option("text", "json")
def command(
    recipe: Path | None,
    interrupted: Path | None,
    engine: str | None,
    workers: str | None,
    attack: str | None,
    hostile: float | None,
    drop: float | None,
    log_to: tuple[str, ...],
    output_format: str,
    **options: Any,
) -> None:
    """Run a simulated fleet; settings come from a RECIPE (TOML) and from options.

    A run's config.toml is a recipe too: it repeats the run in another directory.
    With --resume a run that was ended goes on from its last round.
    """
    if interrupted and recipe:
        raise ConfigError(
            f"recipe {recipe} and --resume {interrupted} exclude each other: a run that goes on "
            f"has its own settings; leave one out"
        )
    if interrupted:
        from simulations.launch import resumed

        settings, adversity = resumed(interrupted)
        if options["rounds"] is not None:
            RunRecord(interrupted).check_more_rounds(options["rounds"])
    else:
        settings, adversity = _read_recipe(recipe) if recipe else ({}, {})
    given = {"attack": attack, "hostile": hostile, "drop": drop}
    adversity |= {key: value for key, value in given.items() if value is not None}
    settings |= {k.replace("_", "-"): v for k, v in options.items() if v is not None}
    in_recipe = {"engine": "local", "workers": 1} | adversity
    engine = in_recipe["engine"] if engine is None else engine
    workers = in_recipe["workers"] if workers is None else workers
    for key in ("engine", "workers"):
        adversity.pop(key, None)
    config = read_config(default_settings() | settings)
    # Named here, so that an interrupted run can say where it is.
    record = RunRecord(Path(config.run_dir)) if interrupted else RunRecord.reserve(config.run_dir)
    settings["run-dir"] = str(record.path)
    find_modules_here()
    with (
        stopping(record, _beside_config(engine, workers, log_to)),
        collecting_once_begun() as begun,
    ):
        from simulations.adversity import Adversity
        from simulations.launch import simulate as launch
        from simulations.trackers import read_tracker

        adversity = vars(Adversity.of(adversity))
        callbacks = [read_tracker(each) for each in log_to]
        with show_progress(config.federation.rounds) as (on_round, on_reply):

            def end_round(report: RoundReport) -> None:
                begun()
                on_round(report)

            record = launch(
                settings,
                engine,
                end_round,
                on_reply,
                workers=workers,
                callbacks=callbacks,
                **adversity,
            )
    if output_format == "json":
        click.echo(to_json(record.summary(), indent=2))
    else:
        show_run(record)


def _beside_config(engine: str, workers: str | int, log_to: Sequence[str]) -> str:
    """Options that a run's config.toml does not hold, as they follow it on a command line."""
    words = [] if engine == "local" else ["--engine", engine]
    words += [] if str(workers) == "1" else ["--workers", str(workers)]
    for each in log_to:
        words += ["--log-to", each]
    return "".join(f" {shlex.quote(word)}" for word in words)


def find_modules_here() -> None:
    """A strategy or rule of the user's own may lie in the working directory.

    A console script does not look there. It comes last: what is installed is not hidden.
    """
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _read_recipe(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings by name and the table [simulation], from a recipe or the config.toml of a run."""
    values = read_toml(path)
    if values.keys() & {"vary", "rows", "seeds"}:
        raise ConfigError(
            f"recipe {path} is one of several runs; run them with: fleet compare {path} --out DIR"
        )
    simulation = values.pop("simulation", {})
    if not isinstance(simulation, dict):
        raise ConfigError(f"recipe {path}: simulation must be a table, got {simulation!r}")
    from simulations.adversity import told_apart

    if not isinstance(values.get("settings"), dict):
        return told_apart(values, simulation, f"recipe {path}")
    if others := values.keys() - {"settings", "versions", "machine"}:
        raise ConfigError(
            f"recipe {path} has {', '.join(sorted(others))} beside [settings]; "
            f"move it into [settings], or remove the header"
        )
    # A run's own directory is taken: by that run.
    own = ("run-dir", "resume")
    settings = {key: value for key, value in values["settings"].items() if key not in own}
    return told_apart(settings, simulation, f"recipe {path}")
