"""One round on one client, from the server's state to the client's update."""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from clients.client import Client
from clients.device import device_metrics
from clients.feedback import encode_update
from clients.local_data import local_data, relabel
from clients.model import agree, receive
from clients.personal import keep_gradients, keep_norms, objective
from fleet.backbones import Backbone
from fleet.codec import Download, Payload, decode
from fleet.config import LocalConfig
from fleet.evaluation import Evaluation, evaluate
from fleet.message import Enrolment, Task
from fleet.mobiletl import first_trained_step
from fleet.plan import UpdatePlan
from fleet.planner import afford_locally
from fleet.state import Arrays, capture
from fleet.train import train_locally


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
    backbone, plan, state = receive(client, task, download)
    training, _ = local_data(client.node_config, config.data, config.seed)
    narrow, local, facts = _within_budget(client, backbone, plan)
    # Cut where the widest plan is: what lies above changes from round to round.
    cut = first_trained_step(backbone.steps, plan)
    round_seed = _round_seed(config.seed, task.server_round, client.name)
    received = state.narrow(narrow).tensors
    result = train_locally(
        agree(client, task).transfer(narrow, local.stash, cut),
        relabel(training, task.classes),
        backbone.preprocessing,
        local,
        seed=round_seed,
        features=config.features,
        proximal=objective(
            config.federation, _parameters(received, narrow), plan, memory, task.acknowledged
        ),
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
    codec = config.federation.codec_up
    payload = encode_update(update, narrow, plan, codec, round_seed, memory)
    if narrow.local_specs:
        keep_norms(backbone.model, narrow, plan, memory)
    if config.federation.objective == "feddyn":
        sent = _parameters(decode(payload, narrow), narrow)
        keep_gradients(config.federation, sent, plan, memory, task)
    return payload, metrics | facts | device_metrics()


def evaluate_task(client: Client, task: Task, download: Download) -> Evaluation:
    """Evaluate the server's state on this client's validation images.

    Raises:
        FleetError: if plan, state or data do not fit this client.
    """
    backbone, plan, _ = receive(client, task, download)
    _, validation = local_data(client.node_config, client.config.data, client.config.seed)
    return evaluate(
        agree(client, task).transfer(plan),
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
    found = _afford(backbone, own, budget_bytes, local, proximal=pulled, cut=cut)
    facts = {"budget-bytes": budget_bytes, "planned-peak-bytes": found.peak_bytes}
    return found.plan, replace(local, stash=found.stash, batch_size=found.batch_size), facts


# A simulated fleet's devices have few different budgets.
_afford = lru_cache(maxsize=64)(afford_locally)


def _round_seed(seed: int, server_round: int, name: str) -> list[int]:
    """Words for NumPy's SeedSequence: every client and round its own stream."""
    return [seed, server_round, *name.encode()]
