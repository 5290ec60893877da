"""Options that several commands take."""

from collections.abc import Callable
from pathlib import Path

import click

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
