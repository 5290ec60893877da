"""`fleet plan`."""

import math

import click

from fleet.cli.options import format_option
from fleet.errors import ConfigError
from fleet.plan import METHODS
from fleet.records import to_json

_MIB = 2**20


@click.command("plan")
@click.option("--backbone", default="efficientnet_lite0", show_default=True, help="As in simulate.")
@click.option(
    "--budget-mib",
    type=float,
    help="For training, beyond the loaded model.  [default: what this device has free, less "
    "the reserve]",
)
@click.option(
    "--reserve-mib",
    default=256.0,
    show_default=True,
    help="Of the free memory, what is left to everything else.",
)
@click.option("--method", default="mobiletl", show_default=True, help=", ".join(METHODS))
@click.option("--max-blocks", type=int, help="Most blocks that train.  [default: all]")
@click.option("--min-batch-size", default=8, show_default=True, help="Images; smaller learn badly.")
@click.option("--max-batch-size", default=32, show_default=True, help="Images.")
@click.option("--image-size", default=224, show_default=True, help="Pixels a side.")
@click.option("--num-classes", default=10, show_default=True, help="Of the head.")
@click.option("--num-examples", default=1000, show_default=True, help="Images in an epoch.")
@click.option(
    "--weights",
    default="none",
    show_default=True,
    help="As in simulate; random ones cost the same.",
)
@format_option("text", "json")
def command(
    backbone: str,
    budget_mib: float | None,
    reserve_mib: float,
    method: str,
    max_blocks: int | None,
    min_batch_size: int,
    max_batch_size: int,
    image_size: int,
    num_classes: int,
    num_examples: int,
    weights: str,
    output_format: str,
) -> None:
    """Find the largest update plan that trains within a memory budget.

    Most blocks first, then the stash that rounds least, then the largest batch.
    Nothing is trained: candidates run on tensors without memory.
    """
    for name, value in (("budget-mib", budget_mib), ("num-examples", num_examples)):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{name} must be above 0 and finite, got {value}")
    if not 0 <= reserve_mib < math.inf:
        raise ConfigError(f"reserve-mib must be at least 0 and finite, got {reserve_mib}")
    if not 1 <= min_batch_size <= max_batch_size:
        raise ConfigError(
            f"batch sizes must be at least 1 and rise, got {min_batch_size} to {max_batch_size}"
        )
    from fleet.backbones import load_backbone
    from fleet.plan import make_plan
    from fleet.planner import afford, available_bytes, batch_sizes_between

    loaded = load_backbone(
        backbone, num_classes=num_classes, image_size=image_size, weights=weights
    )
    blocks = len(loaded.blocks) if max_blocks is None else max_blocks
    widest = make_plan(loaded, method=method, blocks=blocks)
    budget = available_bytes(reserve_mib * _MIB) if budget_mib is None else budget_mib * _MIB
    found = afford(
        loaded,
        widest,
        round(budget),
        batch_sizes=batch_sizes_between(min_batch_size, max_batch_size),
    )
    first, later = found.flops_an_epoch(num_examples)
    values = {
        "method": found.plan.method if found.plan.blocks else "head",
        "blocks": found.plan.blocks,
        "stash": found.stash,
        "batch_size": found.batch_size,
        "peak_bytes": found.peak_bytes,
        "flops_first_epoch": first,
        "flops_later_epochs": later,
        "payload_bytes": found.plan.nbytes,
        "why_not_larger": found.why_not_larger,
        "budget_bytes": round(budget),
    }
    if output_format == "json":
        click.echo(to_json(values, indent=2))
        return
    blocks = f"{found.plan.blocks} of {len(loaded.blocks)} blocks"
    lines = {
        "trains": f"{values['method']}, {blocks}, stash {found.stash}, batch {found.batch_size}",
        "predicted peak": f"{found.peak_bytes / _MIB:.1f} MiB, in {found.first.peak_in}",
        "budget": f"{budget / _MIB:.1f} MiB",
        f"{num_examples} images": f"{first / 1e9:.0f} GFLOP the first time, {later / 1e9:.0f} "
        f"GFLOP from the cache",
        "a round sends": f"{values['payload_bytes'] / _MIB:.2f} MiB in float32, either way",
        "not larger": found.why_not_larger or "there is nothing larger",
    }
    for noun, value in lines.items():
        click.echo(f"{noun:<15} {value}")
