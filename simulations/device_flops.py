"""Operations that training took on a device, from what it trained and a step's own count."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from clients.local_data import local_data
from fleet.backbones import Backbone, backbone_of
from fleet.config import DataConfig, LocalConfig, ModelConfig, PlanConfig, RunConfig
from fleet.measure import dry_run, weightless
from fleet.mobiletl import TransferModel, first_trained_step
from fleet.plan import make_plan
from fleet.planner import afford_locally
from fleet.records import ClientReport, RoundReport


def device_flops(config: RunConfig, rounds: Sequence[RoundReport]) -> float:
    """FLOPs of one client's training over a run, mean over the clients whose updates counted.

    A step's own code runs on tensors without storage and is counted
    (`fleet.measure.count_flops`); with the images a round and the rounds that is
    the training of a client by itself: with a cache the frozen part runs once
    for each image and view that it may meet, as on a device, though clients in
    a simulation may find what others left. Neither evaluation nor a head start
    is in it, nor work whose update did not count.
    """
    spent: dict[str, float] = defaultdict(float)
    passes: dict[str, int] = defaultdict(int)
    for report in rounds:
        for client in report.clients:
            step = _per_image(config, client)
            before = passes[client.name]
            passes[client.name] += config.local.epochs
            seen = passes[client.name] - before
            if step.cached:
                views = config.features.views
                seen = min(views, passes[client.name]) - min(views, before)
            trained = config.local.epochs * step.trained
            spent[client.name] += client.num_examples * (trained + seen * step.prefix)
    return sum(spent.values()) / len(spent) if spent else 0.0


@dataclass(frozen=True)
class _Step:
    """FLOPs an image: of the frozen part, and of the rest with its backward pass.

    Attributes:
        cached: whether the frozen part's output is kept.
    """

    prefix: float
    trained: float
    cached: bool


def _per_image(config: RunConfig, client: ClientReport) -> _Step:
    budget = client.metrics.get("budget-bytes")
    return _count(
        config.model,
        config.plan,
        config.local,
        _classes(config.data, config.federation.clients, config.seed),
        proximal=config.federation.objective != "plain",
        caches=config.features.cache != "off",
        blocks=client.blocks,
        budget_bytes=None if budget is None else round(budget),
    )


# Of all else a step's operations do not depend: rows of a comparison mostly share them.
@lru_cache(maxsize=256)
def _count(
    model: ModelConfig,
    plan: PlanConfig,
    local: LocalConfig,
    classes: tuple[str, ...],
    *,
    proximal: bool,
    caches: bool,
    blocks: int,
    budget_bytes: int | None,
) -> _Step:
    backbone = _load(model, classes)
    widest = make_plan(
        backbone,
        method=plan.method,
        blocks=max(plan.choices),
        train_tail=plan.train_tail,
        local_norms=plan.local_norms,
    )
    own = widest if plan.method in ("head", "full") else widest.narrow(blocks)
    cut = first_trained_step(backbone.steps, widest)
    stash, batch_size = local.stash, local.batch_size
    if budget_bytes is not None:  # the client left both to the planner
        found = afford_locally(backbone, own, budget_bytes, local, proximal=proximal, cut=cut)
        stash, batch_size = found.stash, found.batch_size
    cost = dry_run(
        backbone,
        own,
        stash,
        batch_size=batch_size,
        momentum=local.momentum,
        momentum_dtype=getattr(torch, local.momentum_dtype),
        proximal=proximal,
        cut=cut,
    )
    freezes = TransferModel(weightless(backbone), own, stash, cut).freezes_blocks
    return _Step(
        prefix=cost.flops_prefix / batch_size,
        trained=(cost.flops_forward + cost.flops_backward) / batch_size,
        cached=freezes and caches,
    )


@lru_cache(maxsize=2)
def _classes(data: DataConfig, clients: int, seed: int) -> tuple[str, ...]:
    training, _ = local_data({"partition-id": 0, "num-partitions": clients}, data, seed)
    return tuple(training.classes)


@lru_cache(maxsize=2)
def _load(model: ModelConfig, classes: tuple[str, ...]) -> Backbone:
    return backbone_of(model, classes, seed=0)
