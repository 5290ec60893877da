"""One round on one client, from the server's state to the client's update."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from clients.attempts import Attempt, Experience, attempting, recall, recover
from clients.client import Client
from clients.deadline import seconds_waited_for
from clients.device import Cooling, check_battery, device_metrics
from clients.feedback import encode_update
from clients.journal import note, noted
from clients.local_data import local_data, relabel
from clients.model import agree, receive
from clients.personal import keep_gradients, keep_norms, objective
from clients.share import LimitTooLow, Share, share_of
from fleet.backbones import Backbone
from fleet.codec import Download, Payload, decode
from fleet.errors import FleetError
from fleet.evaluation import Evaluation, evaluate
from fleet.heap import trim
from fleet.message import Enrolment, Task
from fleet.mobiletl import first_trained_step
from fleet.plan import UpdatePlan
from fleet.state import Arrays, capture
from fleet.train import train_locally


def enrol(client: Client) -> Enrolment:
    """Say who this is and which classes its images have.

    Raises:
        FleetError: if it has no images that can be read. Until it has introduced itself
            the server does not know its name, so the error begins with it.
    """
    try:
        training, _ = local_data(client.node_config, client.config.data, client.config.seed)
    except FleetError as error:
        raise type(error)(f"{client.name}: {error}") from error
    return Enrolment(client.name, len(training), training.classes)


def train_task(client: Client, task: Task, download: Download) -> tuple[Payload, dict[str, Any]]:
    """The update of a round: `train_once`, or what it made of this task before.

    A simulated client trains again, to the same end; it costs less than to keep
    every client's update.

    Raises:
        FleetError: as `train_once`.
    """
    if client.simulated:
        return train_once(client, task, download)
    memory = client.memory(task.run)
    before = noted(memory, task, download)
    if before is not None:
        return before[0], dict(before[1])
    payload, metrics = train_once(client, task, download)
    note(memory, task, download, payload, metrics)
    return payload, metrics


def train_once(client: Client, task: Task, download: Download) -> tuple[Payload, dict[str, Any]]:
    """Train from the server's state.

    Returns:
        The update (deltas, and statistics of trained norms as they are), and
        metrics: num-examples, blocks, loss, peak-bytes, seconds, and the
        device's own.

    Raises:
        FleetError: if plan, state or data do not fit this client, or its device
            declines.
    """
    holds_back = client.holds_back()
    check_battery(holds_back.least_battery)
    cooling = Cooling(holds_back.soft_temperature, client.config.federation.round_timeout)
    config, memory = client.config, client.round_memory(task)
    backbone, plan, state = receive(client, task, download, memory)
    training, _ = local_data(client.node_config, config.data, config.seed)
    share, learnt, marked = _plan_share(client, backbone, plan, task)
    narrow = share.plan
    # Cut where the widest plan is: what lies above changes from round to round.
    cut = first_trained_step(backbone.steps, plan)
    round_seed = _round_seed(config.seed, task.server_round, client.name)
    received = state.narrow(narrow).tensors
    proximal = objective(
        config.federation, _parameters(received, narrow), plan, memory, task.acknowledged
    )
    images = relabel(training, task.classes)
    trims = not client.simulated  # the next client of the same process needs the memory at once
    with marked:
        result = train_locally(
            agree(client, task).transfer(narrow, share.local.stash, cut),
            images,
            backbone.preprocessing,
            share.local,
            seed=round_seed,
            features=config.features,
            proximal=proximal,
            before_step=cooling,
            trims=trims,
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
    del received, state
    codec = config.federation.codec_up
    payload = encode_update(update, narrow, plan, codec, round_seed, memory)
    if narrow.local_specs:
        keep_norms(backbone.model, narrow, plan, memory)
    if config.federation.objective == "feddyn":
        sent = _parameters(decode(payload, narrow), narrow)
        keep_gradients(config.federation, sent, plan, memory, task)
    if training.skipped:
        metrics["skipped-images"] = training.skipped
    del update
    if trims:
        trim()  # the reply is what is held next
    told = share.metrics() | learnt.metrics() | cooling.metrics() | device_metrics()
    return payload, metrics | told


def evaluate_task(client: Client, task: Task, download: Download) -> Evaluation:
    """Evaluate the server's state on this client's validation images.

    Raises:
        FleetError: if plan, state or data do not fit this client.
    """
    memory = client.round_memory(task, evaluates=True)
    backbone, plan, _ = receive(client, task, download, memory)
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


def _plan_share(
    client: Client, backbone: Backbone, plan: UpdatePlan, task: Task
) -> tuple[Share, Experience, AbstractContextManager[None]]:
    """What this client trains, what it knows of its memory, and the mark while it trains."""
    if client.simulated:
        unmarked = Experience()
        return share_of(client, backbone, plan, unmarked), unmarked, nullcontext()
    memory = client.memory(task.run)  # of all rounds: a death is not undone by a repeated one
    learnt = recall(memory)
    try:
        share = share_of(client, backbone, plan, learnt, memory)
    except LimitTooLow:
        recover(memory, learnt)
        raise
    attempt = Attempt(
        server_round=task.server_round,
        blocks=share.plan.blocks,
        batch_size=share.local.batch_size,
        peak_bytes=share.peak_bytes,
    )
    return share, learnt, attempting(memory, learnt, attempt, seconds_waited_for(client))


def _round_seed(seed: int, server_round: int, name: str) -> list[int]:
    """Words for NumPy's SeedSequence: every client and round its own stream."""
    return [seed, server_round, *name.encode()]
