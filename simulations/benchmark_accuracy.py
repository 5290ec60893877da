"""What each method reaches on CIFAR-10, and at which cost: learning rates tuned, three seeds.

python -m simulations.benchmark_accuracy --data PATH/TO/cifar10 --out cells.jsonl

Central training, as a single device does it. Every cell is a line of the output
as it ends; those that are there are not run again.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch

from fleet.backbones import Backbone, load_backbone
from fleet.baselines import contender
from fleet.config import FeatureConfig, LocalConfig
from fleet.data import ImageData, load_data, split_validation
from fleet.errors import UpdateError
from fleet.evaluation import evaluate
from fleet.features import FeatureSource
from fleet.measure import count_flops
from fleet.measure.comparison import commit
from fleet.mobiletl import TransferModel
from fleet.train import train_locally

EPOCHS, BATCH_SIZE = 3, 32
TRAIN, VALIDATION, TEST = 5000, 1000, 5000  # images
TUNING = 2000  # training images of a run that only compares learning rates
RATES = (0.003, 0.01, 0.03)


@dataclass(frozen=True)
class Contender:
    """A way to train, and the one whose learning rate it takes over, where it is not tuned."""

    method: str
    blocks: int = 0
    stash: str = ""
    views: int = 1
    rate_of: "Contender | None" = None

    @property
    def name(self) -> str:
        """As the table and the picture show it."""
        views = f"{self.views} views" if self.views > 1 else ""
        return " ".join(filter(None, (self.method, str(self.blocks or ""), self.stash, views)))


MOBILETL = Contender("mobiletl", 5, "recompute")
BLOCKS = Contender("blocks", 5)
CONTENDERS = (  # what the claims need first
    MOBILETL,
    BLOCKS,
    Contender("head"),
    Contender("mobiletl", 5, "float32", rate_of=MOBILETL),
    Contender("mobiletl", 5, "int8", rate_of=MOBILETL),
    Contender("mobiletl", 3, "recompute", rate_of=MOBILETL),
    Contender("mobiletl", 1, "recompute", rate_of=MOBILETL),
    Contender("shifts", 5),
    Contender("mobiletl", 5, "published", rate_of=MOBILETL),
    Contender("blocks+frozen-norms", 5),
    Contender("blocks", 3, rate_of=BLOCKS),
    Contender("blocks", 1, rate_of=BLOCKS),
    Contender("mobiletl", 16, "recompute", rate_of=MOBILETL),
    Contender("full", rate_of=BLOCKS),
    Contender("bias-only", rate_of=Contender("shifts", 5)),
    Contender("mobiletl", 5, "recompute", views=4, rate_of=MOBILETL),
)


@click.command()
@click.option("--data", required=True, help="CIFAR-10, as fleet simulate --data takes it")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="lines of JSON")
@click.option("--backbone", default="efficientnet_lite0")
@click.option("--image-size", default=128, help="pixels a side")
@click.option("--seeds", default=3, help="runs of each method")
@click.option("--only", multiple=True, help="names of methods, such as 'mobiletl 5 int8'")
def main(
    data: str, out: Path, backbone: str, image_size: int, seeds: int, only: tuple[str, ...]
) -> None:
    """Run every cell that is not in the output yet, the first seed of all before the second."""
    torch.set_num_threads(1)
    bench = Bench(data, out, backbone, image_size)
    chosen = [c for c in CONTENDERS if not only or c.name in only]
    for seed in range(seeds):
        for each in chosen:
            bench.run(each, bench.tuned_rate(each.rate_of or each), seed)


class Bench:
    """Data, settings and the cells so far."""

    def __init__(self, data: str, out: Path, backbone: str, image_size: int) -> None:
        pool = load_data(data, "train", limit=TRAIN + VALIDATION)
        self._train, self._validation = split_validation(pool, VALIDATION / len(pool), 0)
        self._test = load_data(data, "test", limit=TEST)
        self._backbone, self._image_size, self._out = backbone, image_size, out
        self._cells = list(read_cells(out)) if out.exists() else []
        self._commit = commit()

    def tuned_rate(self, of: Contender) -> float:
        """The learning rate with the best accuracy on validation images."""
        tried = {rate: self.run(of, rate, seed=0, tuning=True)["accuracy"] for rate in RATES}
        return max(tried, key=tried.get)

    def run(self, of: Contender, rate: float, seed: int, tuning: bool = False) -> dict:
        """One cell, from the output if it is there."""
        cell = {
            "backbone": self._backbone,
            "image_size": self._image_size,
            "method": of.method,
            "blocks": of.blocks,
            "stash": of.stash,
            "views": of.views,
            "learning_rate": rate,
            "seed": seed,
            "tuning": tuning,
        }
        for known in self._cells:
            if cell.items() <= known.items():
                return known
        train, test = self._train, self._test
        if tuning:
            train, _ = split_validation(train, 1 - TUNING / len(train), 0)
            test = self._validation
        cell |= self._train_and_test(of, rate, seed, train, test) | {"commit": self._commit}
        self._cells.append(cell)
        with self._out.open("a") as file:
            file.write(json.dumps(cell) + "\n")
        click.echo(f"{of.name:<24} rate {rate:<5} seed {seed}: {cell['accuracy']:.4f}", err=True)
        return cell

    def _train_and_test(
        self, of: Contender, rate: float, seed: int, train: ImageData, test: ImageData
    ) -> dict:
        backbone = load_backbone(
            self._backbone, num_classes=len(train.classes), image_size=self._image_size
        )
        model = contender(backbone, of.method, of.blocks, of.stash or "recompute")
        costs = training_flops(backbone, model, train, of.views)
        features = FeatureConfig(
            cache="float16",
            cache_mib=4096.0,
            cache_dir="",
            augmentation="flip+crop" if of.views > 1 else "none",
            views=of.views,
        )
        config = LocalConfig(
            epochs=EPOCHS,
            batch_size=BATCH_SIZE,
            sampler="shuffled",
            learning_rate=rate,
            schedule="cosine",
            momentum=0.9,
            momentum_dtype="float32",
            weight_decay=0.0,
            stash=of.stash or "recompute",
            device="cpu",
        )
        try:
            result = train_locally(model, train, backbone.preprocessing, config, seed, features)
        except UpdateError as error:
            return costs | {"accuracy": 0.0, "loss": None, "diverged": str(error)}
        tested = evaluate(model, test, backbone.preprocessing, features=features)
        return (
            costs
            | asdict(tested)
            | {
                "train_loss": result.loss,
                "peak_bytes": result.peak_bytes,
                "seconds": result.seconds,
            }
        )


def training_flops(
    backbone: Backbone, model: TransferModel, data: ImageData, views: int
) -> dict[str, int]:
    """Of the whole training, counted on one batch: a view passes the frozen half once."""
    source = FeatureSource(model, data.subset(range(BATCH_SIZE)), backbone.preprocessing)
    with count_flops() as prefix:
        ((x, labels),) = source.batches(BATCH_SIZE)
    statistics = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    with count_flops() as step:
        model.gradients(x, labels)
    model.zero_grad(set_to_none=True)
    model.model.load_state_dict(statistics)
    batches = len(data) / BATCH_SIZE
    drawn = views * (1 - (1 - 1 / views) ** EPOCHS)  # different views of an image, on average
    return {
        "flops": round(batches * (drawn * prefix.total + EPOCHS * step.total)),
        "trainable_bytes": model.plan.nbytes,
    }


def read_cells(path: Path) -> Iterator[dict]:
    """What was measured, a line a cell."""
    for line in path.read_text().splitlines():
        yield json.loads(line)


if __name__ == "__main__":
    main()
