"""Options that several commands take."""

from collections.abc import Callable

import click


def format_option(*formats: str) -> Callable:
    """`--format`, one of `formats`, of which the first is the default."""
    return click.option(
        "--format",
        "output_format",
        type=click.Choice(formats),
        default=formats[0],
        help="json prints one object and nothing else on standard output.",
    )
