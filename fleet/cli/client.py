"""`fleet client`."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fleet.cli.until_signal import until_signal
from fleet.config import WEIGHTS, Value, budget, read_assignment
from fleet.errors import ConfigError
from fleet.node_settings import NODE_SETTINGS
from fleet.paths import expanded

if TYPE_CHECKING:
    from fleet.deploy.bundle import Bundle
    from fleet.deploy.client import ClientOptions


@click.command("client")
@click.option(
    "--bundle",
    "source",
    type=click.Path(path_type=Path),
    help="What fleet provision made for this device, .tar.gz or folder; once given, it is kept.",
)
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="This device's images: a folder for each class. They never leave it.",
)
@click.option(
    "--budget-mib",
    default="auto",
    show_default=True,
    help="Memory that training may take: MiB, auto (what is free), or off.",
)
@click.option("--blocks", type=click.IntRange(0), help="Blocks to train; fewer than the run's.")
@click.option("--weights", help="Of the pretrained model: a local file, or as in the run.")
@click.option(
    "--set",
    "others",
    multiple=True,
    metavar="KEY=VALUE",
    help=f"Another setting of this device's node, of {', '.join(NODE_SETTINGS)}; may be given "
    f"several times.",
)
@click.option(
    "--trusted-entities",
    type=click.Path(path_type=Path, dir_okay=False),
    help="YAML of keys: run only apps that one of them has signed.",
)
@click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where this device keeps key, memory of runs and logs.  "
    "[default: $FLEET_STATE or ~/.local/state/fleet]",
)
@click.option(
    "--cold",
    is_flag=True,
    help="Keep nothing of PyTorch in memory between rounds; each starts some seconds later.",
)
@click.option("--insecure", is_flag=True, help="Without TLS and key; loopback servers only.")
@click.option("--server", help="With --insecure: where the server is.")
@click.option("--name", help="With --insecure: this device's name.")
def command(**given: Any) -> None:
    """Run this device's client until it is told to stop.

    It starts Flower's SuperNode, and starts it again whenever it ends or the
    server does not see it any more.
    """
    from fleet.deploy.bundle import bundle_to_use
    from fleet.deploy.client import run_client
    from fleet.deploy.server import log_to_stderr

    log_to_stderr()
    run_client(read_options(bundle_to_use, **given), until_signal)


def read_options(
    take_bundle: "Callable[[Path | None, Path], Bundle]",
    *,
    source: Path | None,
    data: Path,
    budget_mib: str,
    blocks: int | None,
    weights: str | None,
    others: tuple[str, ...],
    trusted_entities: Path | None,
    state: Path | None,
    cold: bool,
    insecure: bool,
    server: str | None,
    name: str | None,
) -> "ClientOptions":
    """What the command line asks for, its paths absolute; `ClientOptions.check` is still to come.

    Args:
        take_bundle: from what is given and the state folder; with keys alone.

    Raises:
        ConfigError: for options that exclude each other, text that is no assignment or
            no budget, or as `take_bundle` does.
    """
    from fleet.deploy.addresses import Address
    from fleet.deploy.client import ClientOptions, state_folder

    if insecure and source is not None:
        raise ConfigError("--insecure uses no keys, and --bundle holds some; leave one out")
    if not insecure and (server or name):
        raise ConfigError("--server and --name go with --insecure; a bundle names both itself")
    folder, bundle, address = state_folder(state), None, None
    if insecure:
        address = Address.parse(server or "127.0.0.1")
        name = name or socket.gethostname()
    else:
        bundle = take_bundle(source, folder)
        name = bundle.name
    node: dict[str, Value] = {"name": name, "data": str(expanded(data, "--data").absolute())}
    node["budget-mib"] = str(budget(budget_mib))
    if blocks is not None:
        node["blocks"] = blocks
    if weights is not None:
        node["weights"] = weights
    for other in others:
        key, value = read_assignment(other)
        if key in node:
            raise ConfigError(f"--set {other}: {key} has an option of its own, --{key}")
        node[key] = value
    if "weights" in node and node["weights"] not in WEIGHTS:
        node["weights"] = str(expanded(str(node["weights"]), "weights").absolute())
    if trusted_entities is not None:
        trusted_entities = expanded(trusted_entities, "--trusted-entities").absolute()
    return ClientOptions(
        state=folder,
        node=node,
        bundle=bundle,
        server=address,
        trusted_entities=trusted_entities,
        cold=cold,
    )
