"""What federated methods, codecs and rules reach on CIFAR-10, and for how many bytes.

python -m simulations.benchmark_federated --data PATH/TO/cifar10 --out cells.jsonl
python -m simulations.federated_tables cells.jsonl

Twenty clients under Dirichlet(0.3), ten sampled a round, one local epoch. Every
run is a line of the output as it ends, with all of its rounds; those that are
there are not run again. Several processes may write to one output: `--part 0/2`
and `--part 1/2` take every second run each.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import click
import torch

from fleet.config import Value
from fleet.measure.comparison import commit
from simulations.launch import simulate

SETTINGS: Mapping[str, Value] = {
    "partition": "dirichlet:0.3",
    "clients": 20,
    "sampled": 10,
    "rounds": 20,
    "train-examples": 5000,
    "test-examples": 2000,
    "validation-fraction": 0.0,
    "image-size": 128,
    "backbone": "efficientnet_lite0",
    "local-epochs": 1,
    "batch-size": 16,
    "learning-rate": 0.01,
    "momentum": 0.9,
    "cache-mib": 8192.0,
    "blocks": "3",
    "codec-up": "float32",
    "codec-down": "float32",
    "rule": "mean",
}
SEEDS = 3

FULL = {"method": "full", "cache": "off"}
SPARSE = "topk:0.02+int4"
LOSSY = {"rounds": 50, "blocks": "1"}


@dataclass(frozen=True)
class Run:
    """A line of the table.

    Attributes:
        group: the table that it is in.
        name: as the table shows it.
        settings: what differs from `SETTINGS`.
        adversity: `attack`, `hostile` and `drop` of `simulate`.
        seeds: how many.
        start_only: of the rounds, only what was there before any training counts.
    """

    group: str
    name: str
    settings: Mapping[str, Value] = field(default_factory=dict)
    adversity: Mapping[str, str | float] = field(default_factory=dict)
    seeds: int = SEEDS
    start_only: bool = False


ATTACKS = ("", "sign_flip:10", "alie:1.5", "ipm:0.5", "label_flip", "nan")
DEFAULT_RULE = "clipped_mean"
OTHER_RULES = ("trimmed_mean:0.2", "median", "geometric_median:2", "multi_krum:2")


def _both(codec: str) -> dict[str, Value]:
    return {"codec-up": codec, "codec-down": codec}


def _attacked(rule: str, attack: str, rounds: int = 12, seeds: int = SEEDS) -> Run:
    adversity = {"attack": attack, "hostile": 0.2} if attack else {}
    name = f"{rule}, {rounds} rounds / {attack or 'no attack'}"
    return Run("attacks", name, {"rule": rule, "rounds": rounds}, adversity, seeds)


RUNS = (  # what the claims need first
    Run("bytes", "mobiletl k=3, float32"),
    Run("bytes", f"mobiletl k=3, {SPARSE}", _both(SPARSE)),
    Run(
        "bytes",
        "closed-form head",
        {"method": "head", "head-start": True, "rounds": 1},
        start_only=True,
    ),
    _attacked("mean", ""),
    _attacked("mean", "sign_flip:10"),
    *(_attacked(DEFAULT_RULE, attack) for attack in ATTACKS),
    Run("bytes", "mobiletl k=3, int8", _both("int8")),
    Run("bytes", "mobiletl k=3, int4+feedback", _both("int4+feedback")),
    Run("plans", "k=1", {"blocks": "1"}),
    Run("plans", "k=1, 3, 5", {"blocks": "1,3,5"}),
    Run("bytes", "head, float32", {"method": "head"}),
    Run("drops", "none lost", LOSSY),
    Run("drops", "30 % lost", LOSSY, {"drop": 0.3}),
    Run("bytes", "mobiletl k=3, topk:0.005+int4", _both("topk:0.005+int4")),
    Run(
        "bytes",
        f"mobiletl k=3, head start, {SPARSE}",
        _both(SPARSE) | {"head-start": True, "learning-rate": 0.003},
    ),
    *(_attacked(DEFAULT_RULE, attack, rounds=20) for attack in ATTACKS[:2]),
    Run("bytes", "full, float32", FULL),
    *(_attacked(rule, attack, seeds=1) for rule in OTHER_RULES for attack in ATTACKS[:2]),
    Run("bytes", "mobiletl k=5, float32", {"blocks": "5"}, seeds=1),
)


@click.command()
@click.option("--data", required=True, help="CIFAR-10, as fleet simulate --data takes it")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="lines of JSON")
@click.option("--only", multiple=True, help="names of runs, such as 'full, float32'")
@click.option("--seeds", default=SEEDS, help="the first so many of each run's")
@click.option("--part", default="0/1", help="which of the runs: NUMBER/PARTS")
def main(data: str, out: Path, only: tuple[str, ...], seeds: int, part: str) -> None:
    """Run what is not in the output yet, the first seed of all before the second."""
    torch.set_num_threads(1)
    names = {run.name for run in RUNS}
    if unknown := [name for name in only if name not in names]:
        raise click.BadParameter(f"no run {unknown[0]}; there are: {'; '.join(sorted(names))}")
    try:
        number, parts = map(int, part.split("/"))
    except ValueError as error:
        raise click.BadParameter(f"part is NUMBER/PARTS, such as 0/2; got {part}") from error
    jobs = [
        (run, seed)
        for seed in range(seeds)
        for run in RUNS
        if seed < run.seeds and (not only or run.name in only)
    ]
    for run, seed in jobs[number::parts]:
        if not any(_is_of(cell, run, seed) for cell in read_cells(out)):
            cell = measure(run, data, seed)
            with out.open("a") as file:
                file.write(json.dumps(cell) + "\n")
            click.echo(
                f"{run.group}: {run.name}, seed {seed}: {cell['accuracy'][-1]:.4f}", err=True
            )


def measure(run: Run, data: str, seed: int) -> dict:
    """One run, all of its rounds."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {**SETTINGS, **run.settings, "data": data, "seed": seed}
        record = simulate(settings | {"run-dir": f"{folder}/run"}, **run.adversity)
        rounds = list(record.rounds())[: 1 if run.start_only else None]
    return {
        "group": run.group,
        "name": run.name,
        "seed": seed,
        "settings": {**run.settings, **run.adversity},
        "accuracy": [report.accuracy for report in rounds],
        "bytes_up": [report.bytes_up for report in rounds],
        "bytes_down": [report.bytes_down for report in rounds],
        "stepped": [report.stepped for report in rounds],
        "refused": [len(report.refused) for report in rounds],
        "commit": commit(),
    }


def read_cells(path: Path) -> list[dict]:
    """What was measured, a line a run."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _is_of(cell: dict, run: Run, seed: int) -> bool:
    return (cell["group"], cell["name"], cell["seed"]) == (run.group, run.name, seed)


if __name__ == "__main__":
    main()
