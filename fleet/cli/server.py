"""`fleet server`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fleet.cli.options import server_folder_option
from fleet.cli.until_signal import until_signal

if TYPE_CHECKING:
    from fleet.deploy.server import ServerOptions


@click.command("server")
@server_folder_option
@click.option("--host", default="0.0.0.0", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    help="Port to listen on.  [default: that which devices' bundles name]",
)
@click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where database and logs lie.  [default: state in the server's folder]",
)
@click.option("--insecure", is_flag=True, help="Without TLS and keys; on a loopback host only.")
def command(**given: Any) -> None:
    """Run the server: let devices in, and see runs through, until it is told to stop.

    It starts Flower's SuperLink and SuperExec and keeps them running. It follows
    what fleet provision and fleet run change, and begins and resumes runs by itself.
    """
    from fleet.deploy.server import log_to_stderr, serve

    options = read_options(**given)
    log_to_stderr()
    serve(options, until_signal)


def read_options(
    *, folder: Path, host: str, port: int | None, state: Path | None, insecure: bool
) -> "ServerOptions":
    """What the command line asks for; `ServerOptions.check` is still to come.

    Raises:
        ConfigError: if with keys the folder is no server's.
    """
    from fleet.deploy.addresses import DEFAULT_PORT
    from fleet.deploy.provisioning import ServerFolder
    from fleet.deploy.server import ServerOptions

    server = ServerFolder(folder)
    named = DEFAULT_PORT
    if not insecure:
        server.check()
        hosts = server.hosts()
        named = hosts[0].port if hosts else DEFAULT_PORT
    if port is not None and port != named and not insecure:
        click.echo(f"Warning: devices' bundles name port {named}, not {port}", err=True)
    return ServerOptions(
        folder=server,
        state=(state or server.state_path).absolute(),
        host=host,
        port=port or named,
        insecure=insecure,
    )
