"""`fleet service`."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fleet.deploy import services
from fleet.deploy.units import Service, unit_text
from fleet.device_files import links_lost_to_services, told_of_links
from fleet.errors import ConfigError

if TYPE_CHECKING:
    from fleet.deploy.client import ClientOptions

_PATH = click.Path(path_type=Path)


@click.group("service")
def command() -> None:
    """Let systemd start a server or a client, and keep it alive."""


@command.group("install")
def install() -> None:
    """Write a systemd unit that restarts, limits and shuts in what it runs."""


def _options(side: str, memory_max: str) -> Callable[[Callable], Callable]:
    """What both sides take."""
    name = f"fleet-{side}"
    decorators = (
        click.option(
            "--state", type=_PATH, help="Where it writes.  [default: /var/lib/NAME of the service]"
        ),
        click.option("--user", metavar="NAME", help="Whom it runs as.  [default: who calls sudo]"),
        click.option("--name", default=name, show_default=True, help="Of the service."),
        click.option(
            "--memory-max",
            default=memory_max,
            show_default=True,
            help="The most that it may take: 80%, 1500M, infinity.",
        ),
        click.option("--gpu", is_flag=True, help="Let it see the machine's devices."),
        click.option(
            "--wait-for-clock/--no-wait-for-clock",
            default=True,
            show_default=True,
            help="Start once a time service has set the clock; without a time server in reach, "
            "do not.",
        ),
        click.option("--print", "only_print", is_flag=True, help="Print the unit, write nothing."),
        click.option("--force", is_flag=True, help="Also replace, or remove, a changed unit."),
        click.option("--uninstall", is_flag=True, help="Remove the unit; state and keys stay."),
        click.option(
            "--unit-dir",
            "unit_folder",
            type=_PATH,
            default=services.UNIT_FOLDER,
            show_default=True,
            help="Where units lie.",
        ),
        click.argument("arguments", nargs=-1, metavar=f"[-- OPTIONS OF fleet {side}]"),
    )
    return lambda function: reduce(lambda f, decorate: decorate(f), reversed(decorators), function)


@install.command("client")
@click.option("--bundle", type=_PATH, help="The device's, an archive or a folder.  [required]")
@click.option("--data", type=_PATH, metavar="DIR", help="The device's images.  [required]")
@_options("client", services.CLIENT_MEMORY)
def client(bundle: Path | None, data: Path | None, **options: Any) -> None:
    """Write the unit of a device's client."""

    def make(**common: Any) -> Service:
        if bundle is None or data is None:
            missing = "--bundle" if bundle is None else "--data"
            raise ConfigError(f"{missing} is missing; fleet service install client --help tells")
        service = services.client_service(bundle=bundle, data=data, **common)
        if told := told_of_links(data, links_lost_to_services(data)):
            click.echo(f"Warning: {': '.join(told)}", err=True)
        return _with_files(service, _check_client(service, common["arguments"]))

    _run(make, **options)


@install.command("server")
@click.option(
    "--dir",
    "folder",
    type=_PATH,
    default="server",
    show_default=True,
    help="The server's folder, which fleet provision made.",
)
@click.option("--host", help="Address that it listens on.  [default: of fleet server]")
@click.option("--port", type=click.IntRange(1, 65535), help="[default: of fleet server]")
@click.option(
    "--readable",
    type=_PATH,
    multiple=True,
    metavar="PATH",
    help="What runs may name as --data or --weights, below a home or /tmp; several.",
)
@click.option(
    "--writable", type=_PATH, multiple=True, metavar="DIR", help="Where runs are written; several."
)
@_options("server", "infinity")
def server(
    folder: Path,
    host: str | None,
    port: int | None,
    readable: tuple[Path, ...],
    writable: tuple[Path, ...],
    **options: Any,
) -> None:
    """Write the unit of the server."""

    def make(**common: Any) -> Service:
        service = services.server_service(
            folder=folder, host=host, port=port, readable=readable, writable=writable, **common
        )
        _check_server(service, common["arguments"])
        return service

    _run(make, **options)


def _run(
    make: Callable[..., Service],
    *,
    name: str,
    state: Path | None,
    user: str | None,
    memory_max: str,
    gpu: bool,
    wait_for_clock: bool,
    only_print: bool,
    force: bool,
    uninstall: bool,
    unit_folder: Path,
    arguments: tuple[str, ...],
) -> None:
    if uninstall:
        path = services.uninstall(name, unit_folder, force=force)
        _say(f"removed {path}; end it", f"stop {name}", "daemon-reload")
        return
    service = make(
        name=name,
        state=state,
        user=user or services.default_user(),
        memory_max=memory_max,
        devices=gpu,
        arguments=arguments,
        clock=services.clock_units() if wait_for_clock else (),
        systemd_version=services.systemd_version(),
    )
    if only_print:
        click.echo(unit_text(service), nl=False)
        return
    done = services.install(service, unit_folder, force=force)
    if not done.changed:
        click.echo(f"{done.path} is there already, the same in every line")
        return
    click.echo(done.text)
    verb, start = ("replaced", "restart") if done.replaced else ("wrote", "enable --now")
    _say(f"{verb} {done.path}; go on", "daemon-reload", f"{start} {name}")
    if service.clock:
        click.echo(
            f"It waits for {service.clock[-1]}; without a time server in reach that is for ever: "
            f"--no-wait-for-clock"
        )


def _check_client(service: Service, arguments: Sequence[str]) -> "ClientOptions":
    """Refuse what `fleet client` would refuse as the unit starts, for ever again."""
    from fleet.cli import client
    from fleet.deploy.bundle import read_bundle

    given = _given(client.command, service, arguments, ("--bundle", "--data", "--state"))
    options = client.read_options(lambda source, state: read_bundle(source), **given)
    options.check()
    return options


def _check_server(service: Service, arguments: Sequence[str]) -> None:
    """Refuse what `fleet server` would refuse as the unit starts, for ever again."""
    from fleet.cli import server

    given = _given(server.command, service, arguments, ("--dir", "--host", "--port", "--state"))
    server.read_options(**given).check()


def _given(
    program: click.Command, service: Service, arguments: Sequence[str], own: Sequence[str]
) -> dict[str, Any]:
    """What a command is given by a unit's command line.

    Args:
        program: `fleet client` or `fleet server`.
        service: whose command line begins with the program and the command's name.
        arguments: those of it that were given after `--`.
        own: options of the service's own.

    Raises:
        ConfigError: if an argument would take the place of such an option.
        click.UsageError: for arguments that the command does not have.
    """
    for argument in arguments:
        if (option := argument.partition("=")[0]) in own:
            raise ConfigError(
                f"{argument} after -- would take the place of the service's own {option}; give "
                f"{option} before --"
            )
    _, name, *words = service.command
    return program.make_context(f"fleet {name}", words).params


def _with_files(service: Service, options: "ClientOptions") -> Service:
    """A service that sees the files which its arguments name.

    Raises:
        ConfigError: for one that it would look for elsewhere.
    """
    for path in options.files:
        if not any(word.endswith(str(path)) for word in service.command):
            raise ConfigError(
                f"the service starts in another folder, and would not find what is {path} here; "
                f"name it so after --, in full"
            )
    return replace(service, readable=[*service.readable, *options.files])


def _say(what: str, *commands: str) -> None:
    click.echo(f"{what} with\n" + "\n".join(f"    sudo systemctl {text}" for text in commands))
