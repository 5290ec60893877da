"""`fleet run`."""

import hashlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from fleet.cli.follow import follow
from fleet.cli.options import format_option, server_folder_option
from fleet.cli.simulate import setting_options
from fleet.config import (
    WEIGHTS,
    RunConfig,
    Value,
    default_settings,
    read_assignment,
    read_config,
    text_settings,
)
from fleet.errors import ConfigError
from fleet.paths import expanded
from fleet.records import RunRecord, to_json
from fleet.remarks import read_remarks

if TYPE_CHECKING:
    from fleet.deploy.addresses import Address
    from fleet.deploy.provisioning import ServerFolder
    from fleet.deploy.wishes import Wishes


@click.command("run")
@server_folder_option
@click.option("--name", help="Of the run.  [default: by the clock]")
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="A setting by its name, as in a recipe; may be given several times.",
)
@click.option(
    "--sign",
    "key",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="KEY",
    help="Sign the app with this Ed25519 key of OpenSSH's, for devices with --trusted-entities; "
    "a public one (.pub): with the SSH agent's.",
)
@click.option("--detach", is_flag=True, help="Do not follow the run.")
@click.option(
    "--resume",
    "resumed",
    metavar="RUN",
    help="Let a run that is over go on, or follow; with --rounds any run goes on to that round.",
)
@click.option(
    "--beside",
    is_flag=True,
    help="Also while another run goes on; both then share the devices, and take longer.",
)
@click.option("--stop", "stopped", metavar="RUN", help="End a run; --resume lets it go on.")
@click.option("--list", "listed", is_flag=True, help="Show all runs.")
@setting_options
@format_option("text", "json")
def command(
    folder: Path,
    name: str | None,
    assignments: tuple[str, ...],
    key: Path | None,
    detach: bool,
    resumed: str | None,
    beside: bool,
    stopped: str | None,
    listed: bool,
    output_format: str,
    **options: Any,
) -> None:
    """Start a run on the fleet of a server that is running, and follow it.

    The server sees it through: a run that is lost with the SuperLink or its own
    process is submitted again and goes on from its checkpoint. Ctrl-C ends the
    following, not the run. Settings are those of fleet simulate; the number of
    clients is that of the devices.
    """
    from fleet.deploy.provisioning import ServerFolder
    from fleet.deploy.wishes import Wishes

    server = ServerFolder(folder)
    wishes = Wishes(server.runs_path.absolute())
    settings = {k.replace("_", "-"): v for k, v in options.items() if v is not None}
    settings |= dict(read_assignment(each, of_text=text_settings()) for each in assignments)
    given = {
        "--resume": resumed,
        "--stop": stopped,
        "--list": listed,
        "--name": name,
        "--sign": key,
    }
    rounds = _rounds_of_resumed(settings) if resumed is not None else None
    _check_one_wish(given, settings)
    if listed or stopped is not None:
        server.check_begun()
    if listed:
        _show_list(wishes, output_format)
        return
    if stopped is not None:
        wishes.stop(stopped)
        click.echo(f"run {stopped} is to stop; let it go on with: fleet run --resume {stopped}")
        return
    _check_server(server)
    if resumed is not None:
        name = resumed
        wishes.check(name, rounds)
        _check_alone(wishes, name, beside)
        wishes.resume(name, rounds)
    else:
        _check_alone(wishes, name, beside)
        name = name or time.strftime("%Y%m%d-%H%M%S")
        _wish(wishes, name, settings, server, key)
    if detach:
        click.echo(f"run {name} is submitted; follow it with: fleet run --resume {name}")
        return
    follow(wishes, name, output_format)


def _rounds_of_resumed(settings: dict[str, Value]) -> int | None:
    """The one setting that a run may be given anew, taken out of the others."""
    if "rounds" not in settings:
        return None
    rounds = {"rounds": settings.pop("rounds")}
    return read_config(default_settings() | rounds).federation.rounds


def _check_one_wish(given: dict[str, object], settings: dict[str, Value]) -> None:
    """--resume, --stop and --list stand alone, once the rounds of a resumed run are taken out."""
    wishes = [option for option in ("--resume", "--stop", "--list") if given[option]]
    if len(wishes) > 1 or (wishes and (settings or given["--name"] or given["--sign"])):
        but = ", or with --rounds" if wishes == ["--resume"] else ""
        raise ConfigError(f"{wishes[0]} stands alone{but}: a run that there is keeps its settings")


def _check_server(server: "ServerFolder") -> None:
    if not server.has_server():
        raise ConfigError(
            f"no server runs in {server.path}; start it with: fleet server --dir {server.path}"
        )


def _check_alone(wishes: "Wishes", name: str | None, beside: bool) -> None:
    """One run at a time, unless several are wanted: a device trains slower for each."""
    going_on = wishes.going_on()
    if beside or not going_on or name in going_on:  # that one is followed, or its name is taken
        return
    first, wish = going_on[0], wishes.read(going_on[0])
    rounds = max(0, RunRecord(Path(wish.run_dir)).last_round)
    raise ConfigError(
        f"run {first} goes on ({wishes.standing(first).status}, {rounds} of "
        f"{wish.settings['rounds']} rounds done), and devices would have to share their time "
        f"and memory; follow it with: fleet run --resume {first}; end it with: fleet run --stop "
        f"{first}; or start another at the same time with --beside"
    )


def _wish(
    wishes: "Wishes",
    name: str,
    settings: dict[str, Value],
    server: "ServerFolder",
    key: Path | None,
) -> None:
    from fleet.deploy.app_bundle import build_app
    from fleet.deploy.wishes import Wish

    settings = default_settings() | settings
    if not settings.get("run-dir"):
        settings["run-dir"] = str(wishes.folder / name)
    config = read_config(settings)
    _check_devices(server, config)
    _check_files(config)
    _check_blocks(config)
    app = build_app()
    signatures = _signatures(name, app, key) if key is not None else {}
    # The server works in another folder than the user.
    record = RunRecord.reserve(config.run_dir)
    final = config.as_settings() | _absolute_paths(config) | {"run-dir": str(record.path)}
    wish = Wish(run_dir=str(record.path), settings=final, signatures=signatures)
    wishes.make(name, wish, app)


def _signatures(name: str, app: bytes, key: Path) -> dict[str, str]:
    from fleet.deploy.signing import key_id, open_signer, sign_app

    def ask() -> str | None:
        terminal = sys.stdin.isatty()
        return click.prompt(f"Passphrase of {key}", hide_input=True, err=True) if terminal else None

    signer = open_signer(key, ask)
    click.echo(
        f"signing the app {name}.fab: {len(app)} bytes, SHA-256 {hashlib.sha256(app).hexdigest()}, "
        f"with key {key_id(signer.public_key)}",
        err=True,
    )
    return sign_app(app, signer)


def _check_devices(server: "ServerFolder", config: RunConfig) -> None:
    """A round that needs more devices than there are would be waited for for ever.

    Without keys nobody is registered: it may be that more devices are still to come.
    """
    from fleet.deploy.registry import read_devices

    federation = config.federation
    if (address := server.insecure_address()) is not None:
        online, wanted = _online(address), federation.min_clients
        if online < wanted:
            click.echo(
                f"Warning: {online} devices are online, and min-clients is {wanted}; the run waits "
                f"for more",
                err=True,
            )
        return
    devices = read_devices(server.registry_path).values()
    registered = sum(device.revoked is None for device in devices)
    for key, wanted in (
        ("min-clients", federation.min_clients),
        ("min-updates", federation.min_updates),
        ("quorum", federation.quorum),
    ):
        if wanted > registered:
            lower = f", or lower it: --{key} {registered}" if registered else ""
            raise ConfigError(
                f"{key} is {wanted}, and {registered} devices are registered; add some where you "
                f"began the fleet: fleet provision --add NAME{lower}"
            )


def _online(address: "Address") -> int:
    from fleet.deploy.control import ONLINE, Control

    control = Control(address, None)
    try:
        return sum(node.status == ONLINE for node in control.nodes())
    finally:
        control.close()


def _check_blocks(config: RunConfig) -> None:
    """The backbone and its blocks, before devices are waited for."""
    from fleet.backbones import structure_of
    from fleet.plan import make_plan

    plan = config.plan
    make_plan(structure_of(config.model.backbone), method=plan.method, blocks=max(plan.choices))


def _check_files(config: RunConfig) -> None:
    """Data and weights that are not there are told now, and not once devices wait."""
    from fleet.data import check_source
    from fleet.weights import check_weights_file

    if config.federation.evaluation == "server":  # else devices alone read images, their own
        check_source(config.data.source)
    if config.model.weights not in WEIGHTS:
        check_weights_file(Path(config.model.weights))


def _absolute_paths(config: RunConfig) -> dict[str, Value]:
    """Data and weights that are paths, made independent of the working directory."""
    from fleet.data import BUILT_IN

    paths = {}
    for key, value, names in (
        ("data", config.data.source, BUILT_IN),
        ("weights", config.model.weights, WEIGHTS),
    ):
        path = expanded(value, key)
        if value not in names and path.exists():
            paths[key] = str(path.absolute())
    return paths


def _show_list(wishes: "Wishes", output_format: str) -> None:
    rows = []
    for name in wishes.names():
        try:
            wish, standing = wishes.read(name), wishes.standing(name)
        except ConfigError as error:  # it hides none of the others
            row = {"name": name, "status": "damaged", "submissions": 0, "reason": str(error)}
            rows.append(row | {"run_dir": ""})
            continue
        reasons = [standing.reason] if standing.reason else []
        if not standing.over:
            reasons += read_remarks(Path(wish.run_dir))
        rows.append(
            {
                "name": name,
                "status": standing.status,
                "submissions": standing.submissions,
                "reason": "; ".join(reasons),
                "run_dir": wish.run_dir,
            }
        )
    if output_format == "json":
        click.echo(to_json(rows, indent=2))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("run", "status", "submissions", "folder", "reason"):
        table.add_column(column)
    for row in rows:
        cells = (row["name"], row["status"], row["submissions"], row["run_dir"], row["reason"])
        table.add_row(*map(str, cells))
    Console().print(table, highlight=False)
