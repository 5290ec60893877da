"""What each method keeps, needs and sends, measured side by side in one run.

python -m simulations.benchmark_methods
"""

import platform
import subprocess
import time
from pathlib import Path

import click
import torch
import torch.nn.functional as F

from fleet.backbones import Backbone, load_backbone
from fleet.measure import allocator_peak, saved_for_backward
from fleet.mobiletl import TransferModel
from fleet.plan import make_plan

_MIB = 2**20
# method, k, stash
_METHODS = (
    ("full", 0, ""),
    ("blocks", 5, ""),
    ("mobiletl", 5, "published"),
    ("mobiletl", 5, "float32"),
    ("mobiletl", 5, "int8"),
    ("mobiletl", 5, "recompute"),
    ("mobiletl", 3, "recompute"),
    ("mobiletl", 1, "recompute"),
    ("shifts", 5, ""),
    ("head", 0, ""),
)


@click.command()
@click.option("--backbone", multiple=True, default=["efficientnet_lite0", "mobilenet_v3_large"])
@click.option("--image-size", default=224, help="pixels a side")
@click.option("--batch-size", default=32)
def main(backbone: tuple[str, ...], image_size: int, batch_size: int) -> None:
    """Print a Markdown table; random weights serve, as costs do not depend on them."""
    torch.set_num_threads(1)
    print(f"{image_size} px, batch {batch_size}, one thread, torch {torch.__version__},")
    print(f"{platform.machine()}, commit {_commit()}\n")
    columns = ("backbone", "method", "k", "stash", "kept, MiB", "peak, MiB", "CPU s", "sent, MiB")
    print(f"| {' | '.join(columns)} |")
    print(f"|{'---|' * len(columns)}")
    for name in backbone:
        model = load_backbone(name, num_classes=10, image_size=image_size, weights="none")
        for method, blocks, stash in _METHODS:
            kept, peak, seconds, sent = measure(model, method, blocks, stash, batch_size)
            k = blocks or "–"
            costs = f"{kept / _MIB:.1f} | {peak / _MIB:.1f} | {seconds:.2f} | {sent / _MIB:.2f}"
            print(f"| {name} | {method} | {k} | {stash or '–'} | {costs} |", flush=True)


def measure(
    backbone: Backbone, method: str, blocks: int, stash: str, batch_size: int
) -> tuple[int, int, float, int]:
    """Bytes kept, allocator peak in bytes, seconds of the fastest of three steps, bytes sent."""
    plan = make_plan(backbone, method=method, blocks=blocks)
    model = TransferModel(backbone, plan, stash or "published")
    size = backbone.preprocessing.image_size
    images = torch.randn(batch_size, 3, size, size).to(memory_format=torch.channels_last)
    labels = torch.arange(batch_size) % backbone.num_classes
    there = [images, *backbone.model.parameters(), *backbone.model.buffers()]
    with saved_for_backward(exclude=there) as kept:
        loss = F.cross_entropy(model(images), labels)
    del loss
    with allocator_peak() as peak:
        _step(model, images, labels)
    seconds = min(_timed(model, images, labels) for _ in range(3))
    return kept.total, peak.bytes, seconds, plan.nbytes


def _step(model: TransferModel, images: torch.Tensor, labels: torch.Tensor) -> None:
    F.cross_entropy(model(images), labels).backward()
    model.zero_grad(set_to_none=True)


def _timed(model: TransferModel, images: torch.Tensor, labels: torch.Tensor) -> float:
    started = time.process_time()
    _step(model, images, labels)
    return time.process_time() - started


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
