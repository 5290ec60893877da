"""Options that several commands take."""

import tomllib
from collections.abc import Callable
from pathlib import Path

import click

from fleet.errors import ConfigError

server_folder_option = click.option(
    "--dir",
    "folder",
    default="server",
    show_default=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="The server's folder, made by fleet provision.",
)


def format_option(*formats: str) -> Callable:
    """`--format`, one of `formats`, of which the first is the default."""
    return click.option(
        "--format",
        "output_format",
        type=click.Choice(formats),
        default=formats[0],
        help="json prints one object and nothing else on standard output.",
    )


def read_value(text: str) -> tuple[str, str | int | float | bool]:
    """Read `KEY=VALUE`: VALUE is a number, true or false, or else text, with quotes or without.

    Raises:
        ConfigError: if there is no `=`, or VALUE is a list, a table or a time.
    """
    key, equals, written = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"--set takes KEY=VALUE, got {text!r}")
    try:
        value = tomllib.loads(f"value = {written}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return key, written.strip()
    if not isinstance(value, str | int | float | bool):
        raise ConfigError(f"--set {key} takes text, a number, true or false; got {written}")
    return key, value
