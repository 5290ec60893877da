"""One round on one client, from the server's state to the client's update."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from clients.device import device_metrics
from clients.local_data import local_data, relabel
from fleet.backbones import Backbone, load_backbone
from fleet.codec import Payload, decode, encode
from fleet.config import LocalConfig, ModelConfig, RunConfig, Value, budget
from fleet.errors import ConfigError
from fleet.evaluation import Evaluation, evaluate
from fleet.message import Enrolment, Task
from fleet.mobiletl import TransferModel, first_trained_step
from fleet.plan import UpdatePlan, make_plan
from fleet.planner import (
    MIB,
    MIN_BATCH_SIZE,
    Affordable,
    afford,
    available_bytes,
    batch_sizes_between,
)
from fleet.state import TrainableState, capture, load
from fleet.train import pick_device, train_locally


@dataclass(frozen=True)
class Client:
    """Who trains, on what, and how much of the plan.

    Attributes:
        name: stable over rounds and restarts.
        node_config: what this device was started with. `name`, `data`,
            `blocks`, `budget-mib` and `weights` are its own; `partition-id` and
            `num-partitions` come from a simulation.
        config: the run's.
    """

    name: str
    node_config: Mapping[str, Value]
    config: RunConfig

    @classmethod
    def of(cls, node_id: int, node_config: Mapping[str, Value], config: RunConfig) -> "Client":
        """A client named by its configuration, its partition or, failing both, its node."""
        fallback = f"node-{node_id}"
        if "partition-id" in node_config:
            fallback = f"client-{int(node_config['partition-id']):04d}"
        return cls(str(node_config.get("name", fallback)), node_config, config)

    def blocks(self, widest: int) -> int:
        """How many of the plan's blocks this client trains."""
        if "blocks" in self.node_config:
            return min(_whole_number("blocks", self.node_config["blocks"]), widest)
        if "partition-id" in self.node_config:
            partition_id = int(self.node_config["partition-id"])
            return min(self.config.plan.blocks_of(partition_id), widest)
        return widest

    def budget_bytes(self) -> int | None:
        """Memory that this client's training may take; None: as much as it likes."""
        config = self.config.budget
        mib = config.of(int(self.node_config.get("partition-id", 0)))
        if "budget-mib" in self.node_config:
            mib = budget(self.node_config["budget-mib"])
        if mib == "auto":
            return available_bytes(round(config.reserve_mib * MIB))
        return None if mib == "off" else round(mib * MIB)


def enrol(client: Client) -> Enrolment:
    """Say who this is and which classes its images have."""
    training, _ = local_data(client.node_config, client.config.data, client.config.seed)
    return Enrolment(client.name, len(training), training.classes)


def train_task(client: Client, task: Task, payload: Payload) -> tuple[Payload, dict[str, Any]]:
    """Train from the server's state.

    Returns:
        The update (deltas, and statistics of trained norms as they are), and
        metrics: num-examples, blocks, loss, peak-bytes, seconds, and the
        device's own.

    Raises:
        FleetError: if plan, state or data do not fit this client.
    """
    config = client.config
    backbone, plan, state = _receive(client, task, payload)
    training, _ = local_data(client.node_config, config.data, config.seed)
    narrow, local, facts = _within_budget(client, backbone, plan)
    # Cut where the widest plan is: what lies above changes from round to round.
    cut = first_trained_step(backbone.steps, plan)
    round_seed = _round_seed(config.seed, task.server_round, client.name)
    result = train_locally(
        TransferModel(backbone, narrow, local.stash, cut),
        relabel(training, task.classes),
        backbone.preprocessing,
        local,
        seed=round_seed,
        features=config.features,
    )
    received = state.narrow(narrow).tensors
    update = {
        name: trained if narrow.by_name[name].is_statistic else trained - received[name]
        for name, trained in capture(backbone.model, narrow).tensors.items()
    }
    metrics = {
        "num-examples": result.num_examples,
        "blocks": narrow.blocks,
        "loss": result.loss,
        "peak-bytes": result.peak_bytes,
        "seconds": result.seconds,
    }
    payload = encode(update, narrow, config.federation.codec_up, round_seed)
    return payload, metrics | facts | device_metrics()


def evaluate_task(client: Client, task: Task, payload: Payload) -> Evaluation:
    """Evaluate the server's state on this client's validation images.

    Raises:
        FleetError: if plan, state or data do not fit this client.
    """
    backbone, plan, _ = _receive(client, task, payload)
    _, validation = local_data(client.node_config, client.config.data, client.config.seed)
    return evaluate(
        TransferModel(backbone, plan),
        relabel(validation, task.classes),
        backbone.preprocessing,
        features=client.config.features,
    )


def _within_budget(
    client: Client, backbone: Backbone, plan: UpdatePlan
) -> tuple[UpdatePlan, LocalConfig, dict[str, int]]:
    """The sub-plan that this client trains, and how, and what the planner says of it.

    Within a budget the run's batch size is the most, and the stash is the
    planner's choice.
    """
    local, own = client.config.local, plan
    if plan.method not in ("head", "full"):
        own = plan.narrow(client.blocks(plan.blocks))
    budget_bytes = client.budget_bytes()
    if budget_bytes is None:
        return own, local, {}
    found = _afford(backbone, own, budget_bytes, local, first_trained_step(backbone.steps, plan))
    facts = {"budget-bytes": budget_bytes, "planned-peak-bytes": found.peak_bytes}
    return found.plan, replace(local, stash=found.stash, batch_size=found.batch_size), facts


@lru_cache(maxsize=64)  # a simulated fleet's devices have few different budgets
def _afford(
    backbone: Backbone, plan: UpdatePlan, budget_bytes: int, local: LocalConfig, cut: int
) -> Affordable:
    return afford(
        backbone,
        plan,
        budget_bytes,
        batch_sizes=batch_sizes_between(MIN_BATCH_SIZE, local.batch_size),
        momentum=local.momentum,
        momentum_dtype=getattr(torch, local.momentum_dtype),
        cut=cut,
    )


def agreed_plan(client: Client, task: Task, purpose: str = "") -> tuple[Backbone, UpdatePlan]:
    """Own backbone and the widest plan, after both sides' plans agreed.

    The backbone is one that tasks of the same plan and purpose have in common.

    Raises:
        FleetError: if the server's plan is not that of this backbone.
    """
    config = client.config.model
    if "weights" in client.node_config:
        config = replace(config, weights=str(client.node_config["weights"]))
    asked = task.plan
    local = client.config.local
    use = f"{asked.get('digest')} {purpose}"
    backbone = _backbone(config, task.classes, client.config.seed, local.device, use)
    plan = make_plan(
        backbone,
        method=str(asked.get("method")),
        blocks=int(asked.get("blocks", 0)),
        train_tail=bool(asked.get("train_tail")),
    )
    plan.check_same(asked)
    return backbone, plan


def _receive(
    client: Client, task: Task, payload: Payload
) -> tuple[Backbone, UpdatePlan, TrainableState]:
    """Own backbone with the server's state in it, after both sides' plans agreed."""
    backbone, plan = agreed_plan(client, task)
    state = TrainableState(plan, decode(payload, plan))
    load(backbone.model, state)
    return backbone, plan, state


# Whatever a client trains, the next task's state overwrites: one model serves all
# clients of a process. Another plan may leave out what was trained: it gets a new one.
@lru_cache(maxsize=1)
def _backbone(
    config: ModelConfig, classes: tuple[str, ...], seed: int, device: str, use: str
) -> Backbone:
    backbone = load_backbone(
        config.backbone,
        num_classes=len(classes),
        classes=classes,
        image_size=config.image_size,
        weights=config.weights,
        seed=seed,
    )
    backbone.model.to(pick_device(device))
    return backbone


def _whole_number(key: str, value: Value) -> int:
    if type(value) is not int or value < 0:
        raise ConfigError(
            f"{key} in this node's configuration must be a whole number from 0 on, got {value!r}"
        )
    return value


def _round_seed(seed: int, server_round: int, name: str) -> list[int]:
    """Words for NumPy's SeedSequence: every client and round its own stream."""
    return [seed, server_round, *name.encode()]
