"""The command `fleet`."""

from typing import Any

import click

from fleet.cli import (
    client,
    compare,
    doctor,
    export,
    measure,
    plan,
    predict,
    provision,
    report,
    run,
    server,
    service,
    simulate,
)
from fleet.cli.progress import show_progress
from fleet.cli.report import show_run
from fleet.errors import FleetError

__all__ = ["main", "show_progress", "show_run"]


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


_SIMULATIONS = (simulate, compare, report)
_SERVER = (provision, server, run)
_DEVICE = (client, doctor)
_LIBRARY = (measure, plan, export, predict)

for _module in (*_SIMULATIONS, *_SERVER, *_DEVICE, service, *_LIBRARY):
    main.add_command(_module.command)
