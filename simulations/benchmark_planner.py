"""What a dry run predicts of a training step's peak against what the step then takes.

python -m simulations.benchmark_planner
"""

import platform
import time
from collections.abc import Iterator

import click
import torch

from fleet.backbones import Backbone, load_backbone
from fleet.features import run_in_parts
from fleet.measure import allocator_peak, dry_run
from fleet.measure.comparison import commit
from fleet.mobiletl import TransferModel
from fleet.optim import SGD
from fleet.plan import STASHES, UpdatePlan, make_plan
from fleet.train import take_step

_MIB = 2**20
_BACKBONES = (
    "efficientnet_lite0",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mnasnet1_0",
    "mobilenetv4_conv_small",
    "fbnetc_100",
    "efficientnet_b0",
)
_COLUMNS = (
    "backbone", "method", "k", "stash", "batch", "px", "cached", "predicted, MiB", "measured, MiB",
    "ratio",
)  # fmt: skip

Case = tuple[str, int, str, int, int, bool]  # method, k (-1: all), stash, batch, pixels, cached


@click.command()
@click.option("--backbone", multiple=True, default=_BACKBONES)
@click.option("--dense", is_flag=True, help="every stash at every size, which takes a while")
def main(backbone: tuple[str, ...], dense: bool) -> None:
    """Print a Markdown table and its worst row; random weights serve."""
    torch.set_num_threads(1)
    print(f"One thread, torch {torch.__version__}, {platform.machine()}, commit {commit()}\n")
    print(f"| {' | '.join(_COLUMNS)} |")
    print(f"|{'---|' * len(_COLUMNS)}")
    rows, seconds = [], 0.0
    for i, name in enumerate(backbone):
        for case in _dense() if dense else _cases(i):
            method, k, stash, batch_size, size, cached = case
            loaded = load_backbone(name, num_classes=10, image_size=size, weights="none")
            k = len(loaded.blocks) if k < 0 else k
            plan = make_plan(loaded, method=method, blocks=k)
            started = time.process_time()
            cost = dry_run(loaded, plan, stash, batch_size=batch_size, cached=cached)
            seconds += time.process_time() - started
            measured = measure(loaded, plan, stash, batch_size, cached)
            ratio = cost.peak_bytes / measured
            stash = stash if method == "mobiletl" else "–"
            row = (
                f"| {name} | {method} | {plan.blocks} | {stash} | {batch_size} | {size} | "
                f"{'yes' if cached else 'no'} | {cost.peak_bytes / _MIB:.2f} | "
                f"{measured / _MIB:.2f} | {ratio:.3f} |"
            )
            rows.append((ratio, row))
            print(row, flush=True)
    off = sorted(max(ratio, 1 / ratio) - 1 for ratio, _ in rows)
    print(f"\n{len(rows)} rows; a dry run took {seconds / len(rows):.2f} CPU s on average.")
    print(f"Off by {off[len(off) // 2]:.1%} in the middle, {off[-1]:.1%} at worst:\n")
    print(max(rows, key=lambda row: max(row[0], 1 / row[0]))[1])


def measure(backbone: Backbone, plan: UpdatePlan, stash: str, batch_size: int, cached: bool) -> int:
    """Allocator peak in bytes of two training steps; from the second on there is momentum."""
    model = TransferModel(backbone, plan, stash)
    optimizer = SGD(model.trainable_parameters(), 0.01, momentum=0.9)
    size = backbone.preprocessing.image_size
    pixels = torch.randn(batch_size, 3, size, size).to(memory_format=torch.channels_last)
    labels = torch.arange(batch_size) % backbone.num_classes
    kept = model.features(pixels) if cached and model.freezes_blocks else None
    with allocator_peak() as peak:
        for _ in range(2):
            if kept is None:  # decoding an image makes a tensor, which the copy stands for
                x = run_in_parts(model.features, batch_size, lambda part: pixels[part].clone())
            else:
                x = kept.clone()
            take_step(model, optimizer, x, labels)
            del x
    return peak.bytes


def _cases(i: int) -> Iterator[Case]:
    """A spread: every value of every axis with every backbone, shifted from one to the next."""
    sizes, batches, depths = (64, 96, 160, 224), (2, 8, 32), (1, 3, 5, -1)
    for j, stash in enumerate(STASHES):
        for cached in (False, True):
            n = i + j + 2 * cached
            yield "mobiletl", depths[n % 4], stash, batches[n % 3], sizes[(n + j) % 4], cached
    yield "mobiletl", 5, "recompute", 32, 224, False
    yield "head", 0, "published", batches[i % 3], sizes[i % 4], bool(i % 2)
    yield "shifts", depths[i % 4], "published", batches[(i + 1) % 3], sizes[i % 4], bool(i % 2)
    yield "blocks", depths[i % 4], "published", batches[(i + 2) % 3], sizes[(i + 1) % 4], False
    yield "blocks", 3, "published", batches[i % 3], sizes[(i + 2) % 4], True
    yield "full", 0, "published", batches[i % 2], sizes[i % 4], False


def _dense() -> Iterator[Case]:
    for size in (64, 96, 160, 224):
        for batch in (2, 8, 32):
            for cached in (False, True):
                for depth in (1, 3, 5, -1):
                    for stash in STASHES:
                        yield "mobiletl", depth, stash, batch, size, cached
                    yield "shifts", depth, "published", batch, size, cached
                    if batch * size < 32 * 160:
                        yield "blocks", depth, "published", batch, size, cached
                yield "head", 0, "published", batch, size, cached
            if batch * size < 32 * 160:
                yield "full", 0, "published", batch, size, False


if __name__ == "__main__":
    main()
