"""One round on one client, from the server's state to the client's update."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clients.device import device_metrics
from clients.feedback import encode_update
from clients.local_data import local_data, relabel
from clients.memory import ClientMemory, state_directory
from clients.personal import (
    keep_gradients,
    keep_norms,
    load_norms,
    objective,
    pretrained_norms,
)
from fleet.backbones import Backbone, load_backbone
from fleet.codec import FULL_STATE, Download, Payload, decode, follow, parse_codec
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
from fleet.state import Arrays, TrainableState, capture, load
from fleet.train import pick_device, train_locally

SIMULATED_STATE = "clients"  # in the folder of the run


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

    def memory(self, run: str) -> ClientMemory:
        """What this client remembers of a run; a simulated one does so in the run's folder.

        Raises:
            UpdateError: if the run's id is none.
        """
        setting = self.config.state_dir
        if not setting and self.config.run_dir and "partition-id" in self.node_config:
            setting = str(Path(self.config.run_dir) / SIMULATED_STATE)
        return ClientMemory(state_directory(setting), run, self.name)


def enrol(client: Client) -> Enrolment:
    """Say who this is and which classes its images have."""
    training, _ = local_data(client.node_config, client.config.data, client.config.seed)
    return Enrolment(client.name, len(training), training.classes)


def train_task(client: Client, task: Task, download: Download) -> tuple[Payload, dict[str, Any]]:
    """Train from the server's state.

    Returns:
        The update (deltas, and statistics of trained norms as they are), and
        metrics: num-examples, blocks, loss, peak-bytes, seconds, and the
        device's own.

    Raises:
        FleetError: if plan, state or data do not fit this client.
    """
    config, memory = client.config, client.memory(task.run)
    backbone, plan, state = _receive(client, task, download)
    training, _ = local_data(client.node_config, config.data, config.seed)
    narrow, local, facts = _within_budget(client, backbone, plan)
    # Cut where the widest plan is: what lies above changes from round to round.
    cut = first_trained_step(backbone.steps, plan)
    round_seed = _round_seed(config.seed, task.server_round, client.name)
    received = state.narrow(narrow).tensors
    result = train_locally(
        TransferModel(backbone, narrow, local.stash, cut),
        relabel(training, task.classes),
        backbone.preprocessing,
        local,
        seed=round_seed,
        features=config.features,
        proximal=objective(config.federation, _parameters(received, narrow), plan, memory),
    )
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
    payload = encode_update(
        update,
        narrow,
        plan,
        config.federation.codec_up,
        round_seed,
        memory,
        task.server_round,
        task.acknowledged,
    )
    if narrow.local_specs:
        keep_norms(backbone.model, narrow, plan, memory)
    if config.federation.objective == "feddyn":
        sent = _parameters(decode(payload, narrow), narrow)
        keep_gradients(config.federation, sent, plan, memory)
    return payload, metrics | facts | device_metrics()


def evaluate_task(client: Client, task: Task, download: Download) -> Evaluation:
    """Evaluate the server's state on this client's validation images.

    Raises:
        FleetError: if plan, state or data do not fit this client.
    """
    backbone, plan, _ = _receive(client, task, download)
    _, validation = local_data(client.node_config, client.config.data, client.config.seed)
    return evaluate(
        TransferModel(backbone, plan),
        relabel(validation, task.classes),
        backbone.preprocessing,
        features=client.config.features,
    )


def _parameters(tensors: Arrays, plan: UpdatePlan) -> dict[str, np.ndarray]:
    """What is no statistic."""
    return {name: a for name, a in tensors.items() if not plan.by_name[name].is_statistic}


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
    cut = first_trained_step(backbone.steps, plan)
    pulled = client.config.federation.objective != "plain"
    found = _afford(backbone, own, budget_bytes, local, cut, pulled)
    facts = {"budget-bytes": budget_bytes, "planned-peak-bytes": found.peak_bytes}
    return found.plan, replace(local, stash=found.stash, batch_size=found.batch_size), facts


@lru_cache(maxsize=64)  # a simulated fleet's devices have few different budgets
def _afford(
    backbone: Backbone,
    plan: UpdatePlan,
    budget_bytes: int,
    local: LocalConfig,
    cut: int,
    proximal: bool,
) -> Affordable:
    return afford(
        backbone,
        plan,
        budget_bytes,
        batch_sizes=batch_sizes_between(MIN_BATCH_SIZE, local.batch_size),
        momentum=local.momentum,
        momentum_dtype=getattr(torch, local.momentum_dtype),
        proximal=proximal,
        cut=cut,
    )


def _receive(
    client: Client, task: Task, download: Download
) -> tuple[Backbone, UpdatePlan, TrainableState]:
    """Own backbone with the server's state and own norms in it, after both plans agreed."""
    config = client.config.model
    if "weights" in client.node_config:
        config = replace(config, weights=str(client.node_config["weights"]))
    own = _prepare(
        config,
        task.classes,
        client.config.seed,
        client.config.local.device,
        json.dumps(task.plan, sort_keys=True),
    )
    backbone, plan, memory = own.backbone, own.plan, client.memory(task.run)
    state = follow(download, plan, _held_states(memory, plan, own.initial))
    if parse_codec(client.config.federation.codec_down) != parse_codec(FULL_STATE):
        memory.write("version", state.tensors, {"plan": plan.digest})
    load(backbone.model, state)
    load_norms(backbone.model, plan, memory, own.norms)
    return backbone, plan, state


def _held_states(
    memory: ClientMemory, plan: UpdatePlan, initial: TrainableState
) -> Iterator[TrainableState]:
    """States that the server's steps may start from: the last received, the pretrained one."""
    remembered = memory.read("version")
    if remembered is not None and remembered.facts["plan"] == plan.digest:
        yield TrainableState(plan, remembered.tensors)
    yield initial


@dataclass(frozen=True)
class _Prepared:
    """A client's model before any training, and what the server wants of it."""

    backbone: Backbone
    plan: UpdatePlan
    initial: TrainableState
    norms: dict[str, np.ndarray]


# Whatever a client trains, the next task's state and norms overwrite: one model serves
# all clients of a process. Another plan may leave out what was trained: it gets a new one.
@lru_cache(maxsize=1)
def _prepare(
    config: ModelConfig, classes: tuple[str, ...], seed: int, device: str, asked: str
) -> _Prepared:
    """Load the backbone and derive the server's plan of it.

    Args:
        asked: summary of the server's plan, as JSON.

    Raises:
        PlanError: if the server's backbone is another.
    """
    backbone = load_backbone(
        config.backbone,
        num_classes=len(classes),
        classes=classes,
        image_size=config.image_size,
        weights=config.weights,
        seed=seed,
    )
    summary = json.loads(asked)
    plan = make_plan(
        backbone,
        method=str(summary.get("method")),
        blocks=int(summary.get("blocks", 0)),
        train_tail=bool(summary.get("train_tail")),
        local_norms=bool(summary.get("local_norms")),
    )
    plan.check_same(summary)
    initial = capture(backbone.model, plan)
    backbone.model.to(pick_device(device))
    return _Prepared(backbone, plan, initial, pretrained_norms(backbone.model))


def _whole_number(key: str, value: Value) -> int:
    if type(value) is not int or value < 0:
        raise ConfigError(
            f"{key} in this node's configuration must be a whole number from 0 on, got {value!r}"
        )
    return value


def _round_seed(seed: int, server_round: int, name: str) -> list[int]:
    """Words for NumPy's SeedSequence: every client and round its own stream."""
    return [seed, server_round, *name.encode()]
