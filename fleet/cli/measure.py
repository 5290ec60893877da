"""`fleet measure`."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from fleet.cli.options import format_option
from fleet.errors import ConfigError
from fleet.plan import STASHES
from fleet.records import to_json

if TYPE_CHECKING:
    from fleet.measure.setup import Setup
    from fleet.measure.step import Measurement

_MIB = 2**20


@click.command("measure")
@click.option(
    "--backbone",
    "backbones",
    multiple=True,
    default=["efficientnet_lite0"],
    show_default=True,
    help="As in simulate; --compare takes several.",
)
@click.option(
    "--method",
    help="mobiletl, shifts, head, blocks or full; or one they are held against: full+checkpoint, "
    "blocks+checkpoint, blocks+frozen-norms, bias-only.  [default: mobiletl]",
)
@click.option("--blocks", default="5", show_default=True, help="Top blocks that train, or all.")
@click.option("--stash", help=f"Of mobiletl: {', '.join(STASHES)}.  [default: recompute]")
@click.option("--batch-size", default=32, show_default=True, help="Images.")
@click.option("--image-size", default=224, show_default=True, help="Pixels a side.")
@click.option("--cached", is_flag=True, help="The frozen half's output comes from a cache.")
@click.option("--num-classes", default=10, show_default=True, help="Of the head.")
@click.option(
    "--weights",
    default="none",
    show_default=True,
    help="As in simulate; random ones cost the same.",
)
@click.option("--threads", default=1, show_default=True, help="Of PyTorch.")
@click.option(
    "--repetitions", default=5, show_default=True, help="Steps timed; the fastest counts."
)
@click.option(
    "--resident/--no-resident",
    default=True,
    show_default=True,
    help="Measure resident growth too, in a process each.",
)
@click.option("--compare", is_flag=True, help="Measure all methods, side by side.")
@format_option("text", "json", "markdown")
def command(
    backbones: tuple[str, ...],
    method: str | None,
    blocks: str,
    stash: str | None,
    batch_size: int,
    image_size: int,
    cached: bool,
    num_classes: int,
    weights: str,
    threads: int,
    repetitions: int,
    resident: bool,
    compare: bool,
    output_format: str,
) -> None:
    """Measure what a training step costs on this machine's CPU.

    Bytes are beyond the loaded model; CPU seconds, FLOPs and bytes are of a
    step that begins with images, or with features if they are cached.
    """
    if compare and (method or stash):
        raise ConfigError("--compare measures all methods and stashes; leave out --method, --stash")
    if not compare and len(backbones) > 1:
        raise ConfigError(f"{len(backbones)} backbones are for --compare; give one, or add it")
    if repetitions < 1:
        raise ConfigError(f"repetitions must be at least 1, got {repetitions}")
    from fleet.measure.comparison import contenders
    from fleet.measure.setup import Setup
    from fleet.measure.step import measure

    loaded = []  # all before the first is measured: it takes minutes, and a name may be wrong
    for name in backbones:
        setup = Setup(
            backbone=name,
            method=method or "mobiletl",
            blocks=0,
            stash=stash or "recompute",
            batch_size=batch_size,
            image_size=image_size,
            num_classes=num_classes,
            weights=weights,
            cached=cached,
            threads=threads,
        )
        backbone = setup.load()
        setup = dataclasses.replace(setup, blocks=_number(blocks, len(backbone.blocks)))
        loaded.append((setup, backbone))
    measurements, first = [], loaded[0][0]
    for setup, backbone in loaded:
        name = setup.backbone
        measurements += measure(
            list(contenders(setup, backbone)) if compare else [setup],
            backbone,
            repetitions=repetitions,
            resident=resident,
            on_progress=lambda text, name=name: click.echo(f"{name} {text}", err=True),
        )
    if output_format == "json":
        values = [dataclasses.asdict(m) for m in measurements]
        click.echo(to_json(values if compare else values[0], indent=2))
    elif output_format == "markdown":
        _print_markdown(measurements, first)
    elif compare:
        _print_table(measurements, first)
    else:
        _print_one(measurements[0], first)


def _number(blocks: str, there: int) -> int:
    if blocks == "all":
        return there
    try:
        return int(blocks)
    except ValueError:
        raise ConfigError(f"blocks must be a number or all, got {blocks}") from None


def _print_one(m: "Measurement", setup: "Setup") -> None:
    from fleet.measure.comparison import heading

    resident = "–" if m.resident_bytes is None else f"{m.resident_bytes / _MIB:.1f} MiB"
    lines = {
        "kept for backward": f"{m.saved_bytes / _MIB:.1f} MiB",
        "allocator peak": f"{m.peak_bytes / _MIB:.1f} MiB",
        "resident growth": resident,
        "CPU": f"{m.cpu_seconds:.3f} s",
        "operations": f"{m.flops / 1e9:.2f} GFLOP",
        "  frozen half": f"{m.flops_prefix / 1e9:.2f} GFLOP",
        "  forward": f"{m.flops_forward / 1e9:.2f} GFLOP",
        "  backward": f"{m.flops_backward / 1e9:.2f} GFLOP",
        "trained tensors": f"{m.trainable_bytes / _MIB:.2f} MiB",
    }
    stash = f", stash {m.stash}" if m.stash else ""
    source = "cached features" if m.cached else "images"
    blocks = "1 block" if m.blocks == 1 else f"{m.blocks} blocks"
    click.echo(f"{m.backbone}, {m.method}, {blocks}{stash}, from {source}")
    click.echo(f"{heading(setup)}\n")
    for noun, value in lines.items():
        click.echo(f"{noun:<18} {value:>15}")


def _print_table(measurements: "Sequence[Measurement]", setup: "Setup") -> None:
    from fleet.measure.comparison import COLUMNS, heading, rows

    console = Console()
    if not console.is_terminal:  # a file has no edge to wrap at
        console = Console(width=200)
    table = Table(title=heading(setup), title_justify="left")
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if i in (0, 1, 3, 4) else "right")
    for row in rows(measurements):
        table.add_row(*row)
    console.print(table, highlight=False)


def _print_markdown(measurements: "Sequence[Measurement]", setup: "Setup") -> None:
    from fleet.measure.comparison import COLUMNS, heading, rows

    click.echo(f"{heading(setup)}:\n")
    click.echo(f"| {' | '.join(COLUMNS)} |")
    click.echo(f"|{'---|' * len(COLUMNS)}")
    for row in rows(measurements):
        click.echo(f"| {' | '.join(row)} |")
