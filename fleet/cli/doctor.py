"""`fleet doctor`."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fleet.cli.options import format_option

_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red", "unknown": "dim"}


@click.command("doctor")
@click.option(
    "--bundle", type=click.Path(path_type=Path), help="The device's, an archive or a folder."
)
@click.option("--server", metavar="HOST:PORT", help="Instead of a bundle's.")
@click.option(
    "--ca",
    type=click.Path(path_type=Path),
    help="Certificate of the server's authority; goes with --server.",
)
@click.option("--data", metavar="DIR", help="The device's images, as for fleet client.")
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    help="Where the client writes.  [default: $FLEET_STATE or ~/.local/state/fleet]",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    help="Where its features lie.  [default: $FLEET_CACHE or ~/.cache/fleet/features]",
)
@format_option("text", "json")
def command(
    bundle: Path | None,
    server: str | None,
    ca: Path | None,
    data: str | None,
    state: Path | None,
    cache: Path | None,
    output_format: str,
) -> None:
    """Check whether this device can take part, and say what to do where it cannot.

    Ends with 1 if something blocks. Where nothing is installed yet, python3 -m
    clients.doctor does the same from a checkout.
    """
    from clients.doctor import Subject, diagnose, report
    from clients.doctor.findings import verdict

    subject = Subject(bundle, server, ca, data, state, cache)
    with Console(stderr=True).status("looking at this device") as status:
        findings = diagnose(subject, lambda name: status.update(f"looking at {name}"))
    told = report(findings)
    if output_format == "json":
        click.echo(json.dumps(told, indent=2))
    else:
        _print_table(told["findings"])
        click.echo(f"\n{verdict(findings)}")
    sys.exit(0 if told["ready"] else 1)


def _print_table(findings: Sequence[Mapping[str, str]]) -> None:
    console = Console()
    if not console.is_terminal:  # a file has no edge to wrap at
        console = Console(width=200)
    table = Table(show_edge=False, pad_edge=False)
    for column in ("state", "check", "fact", "remedy"):
        table.add_column(column, overflow="fold", no_wrap=column in ("state", "check"))
    for finding in findings:
        state, *texts = (finding[key] for key in ("state", "check", "fact", "remedy"))
        table.add_row(Text(state, _STYLES[state]), *map(Text, texts))
    console.print(table)
