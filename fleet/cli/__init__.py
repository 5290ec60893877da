"""The command `fleet`."""

from typing import Any

try:
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
    from fleet.cli.stopping import exit_code
    from fleet.errors import FleetError
except KeyboardInterrupt:  # a traceback out of imports tells nobody anything
    raise SystemExit(130) from None

__all__ = ["main", "show_progress", "show_run"]


class _Group(click.Group):
    """Prints what the user can mend as one line, without a traceback; Ctrl-C ends it with 130."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except FleetError as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt as stopped:
            raise click.exceptions.Exit(exit_code(stopped)) from None


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
