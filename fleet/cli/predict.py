"""`fleet predict`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fleet.cli.options import format_option
from fleet.records import to_json

if TYPE_CHECKING:
    from fleet.inference import Prediction


@click.command("predict")
@click.argument("paths", nargs=-1, required=True, metavar="[RUN] IMAGE...")
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    help="On a device, instead of RUN: its state-dir, of which the newest model is taken.",
)
@click.option("--top", default=1, show_default=True, help="Classes of each image that are told.")
@format_option("text", "json")
@click.pass_context
def command(
    context: click.Context,
    paths: tuple[str, ...],
    state: Path | None,
    top: int,
    output_format: str,
) -> None:
    """Print class and probability of each IMAGE.

    RUN is a run's folder, or a .safetensors file that a run or fleet export wrote. With --state,
    the model is the last that this device has received from its server; nothing needs the
    network. Images are prepared as in training. An image that cannot be read is named, the others
    are predicted, and the command ends with 1.
    """
    source, images = (None, paths) if state is not None else (Path(paths[0]), paths[1:])
    if not images:
        raise click.UsageError("name at least one IMAGE behind RUN")
    from fleet.inference import predict

    model = source
    if state is not None:
        from clients.last_model import newest_model

        source, model = newest_model(state)
    found = predict(model, images, top=top)
    if output_format == "json":
        click.echo(to_json({"model": str(source), "predictions": _values(found)}, indent=2))
    else:
        _show(found)
    faults = [one for one in found if one.fault]
    for one in faults:
        click.echo(f"Error: {one.image} cannot be read: {one.fault}", err=True)
    if faults:
        context.exit(1)


def _values(found: "list[Prediction]") -> list[dict]:
    return [
        {
            "image": one.image,
            "ranking": [{"class": name, "probability": value} for name, value in one.ranking],
            "fault": one.fault,
        }
        for one in found
    ]


def _show(found: "list[Prediction]") -> None:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right")
    for one in found:
        for place, (name, probability) in enumerate(one.ranking):
            # Text: a file's or a class's name is no markup.
            image = Text("" if place else one.image)
            table.add_row(image, Text(name), f"{100 * probability:.1f} %")
    console = Console()
    if not console.is_terminal:  # a file has no edge to fold at
        console = Console(width=10_000)
    if table.row_count:
        console.print(table, highlight=False)
