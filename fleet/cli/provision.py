"""`fleet provision`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from fleet.cli.options import format_option
from fleet.errors import ConfigError
from fleet.records import to_json


class _SeveralValues(click.Command):
    """A command whose options may each be followed by several values: `--devices a b c`."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        several = {name for p in self.params if getattr(p, "multiple", False) for name in p.opts}
        spread: list[str] = []
        current = ""
        for argument in args:
            if argument.startswith("-"):
                current = argument if argument in several else ""
                spread.append(argument)
            elif current and spread[-1] != current:
                spread += [current, argument]
            else:
                spread.append(argument)
        return super().parse_args(context, spread)


@click.command("provision", cls=_SeveralValues)
@click.option(
    "--host",
    "hosts",
    multiple=True,
    metavar="NAME[:PORT]…",
    help="Where devices reach the server, a DNS name or IP address; further ones its certificate "
    "is good for too.",
)
@click.option("--devices", multiple=True, metavar="NAME…", help="The first devices.")
@click.option(
    "--out",
    default=".",
    show_default=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the folders are.",
)
@click.option("--add", multiple=True, metavar="NAME…", help="Give more devices keys.")
@click.option("--revoke", multiple=True, metavar="NAME…", help="Take devices out.")
@click.option("--renew", is_flag=True, help="A new certificate for the server.")
@click.option("--show", is_flag=True, help="What there is; also if no other option is given.")
@format_option("text", "json")
def command(
    hosts: tuple[str, ...],
    devices: tuple[str, ...],
    out: Path,
    add: tuple[str, ...],
    revoke: tuple[str, ...],
    renew: bool,
    show: bool,
    output_format: str,
) -> None:
    """Make keys and certificates: one folder for each machine.

    `fleet provision --host server.local --devices pi-01 pi-02` begins; copy
    pi-01.tar.gz to that device, and leave the folder server here. Keep the
    folder authority to yourself. A running server follows --add, --revoke and
    --renew by itself.
    """
    from fleet.deploy.addresses import Address
    from fleet.deploy.provisioning import Provisioner

    addresses = [Address.parse(host) for host in hosts]
    provisioner = Provisioner(out)
    if devices:
        if add or revoke or renew:
            raise ConfigError("--devices begins a fleet; for one that there is, use --add")
        if not addresses:
            raise ConfigError("the server has no host; name one with --host NAME[:PORT]")
        provisioner.begin(addresses, devices)
    elif addresses and not renew:
        raise ConfigError(
            "--host goes with --devices, which begins a fleet, or with --renew, which changes "
            "where a server is"
        )
    if revoke:
        provisioner.revoke(revoke)
    if renew:
        provisioner.renew(addresses)
    if add:
        provisioner.add(add)
    _print(provisioner, [*devices, *add], output_format)


def _print(provisioner: Any, made: Sequence[str], output_format: str) -> None:
    from fleet.deploy.provisioning import EXPIRES_SOON_DAYS, days_left

    there = provisioner.show()
    expiries = {"authority": there.authority_expires, "server": there.server_expires}
    if output_format == "json":
        values = {
            "hosts": [str(host) for host in there.hosts],
            "names": list(there.names),
            "devices": [
                {
                    "name": device.name,
                    "fingerprint": device.fingerprint,
                    "added": device.added.isoformat(),
                    "revoked": device.revoked.isoformat() if device.revoked else None,
                }
                for device in there.devices
            ],
            "certificates": {
                name: {"expires": moment.isoformat(), "days_left": days_left(moment)}
                for name, moment in expiries.items()
            },
            "bundles": {name: str(provisioner.bundle_path(name)) for name in made},
        }
        click.echo(to_json(values, indent=2))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("device", "fingerprint", "added", "revoked"):
        table.add_column(column, no_wrap=True)
    for device in there.devices:
        revoked = f"{device.revoked:%Y-%m-%d}" if device.revoked else ""
        table.add_row(device.name, device.fingerprint, f"{device.added:%Y-%m-%d}", revoked)
    console = Console(width=None if Console().is_terminal else 120)
    console.print(table, highlight=False)
    click.echo(f"server at {', '.join(map(str, there.hosts))}")
    for name, moment in expiries.items():
        left = days_left(moment)
        remedy = ""
        if left < EXPIRES_SOON_DAYS:
            remedy = "; renew it: fleet provision --renew" if name == "server" else "; begin anew"
        when = f"expires {moment:%Y-%m-%d}, in {left} days"
        if left < 0:
            when = f"expired {moment:%Y-%m-%d}, and no device connects"
        click.echo(f"{name}'s certificate {when}{remedy}")
    for name in made:
        click.echo(f"for {name}: {provisioner.bundle_path(name)}")
