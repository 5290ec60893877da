"""A client's model: the server's plan of its backbone, and the server's state in it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from clients.client import Client
from clients.last_model import keep_model
from clients.personal import load_norms, pretrained_norms
from clients.round_memory import RoundMemory
from fleet.backbones import Backbone, backbone_of
from fleet.codec import FULL_STATE, Download, follow, parse_codec
from fleet.config import ModelConfig
from fleet.message import Task
from fleet.mobiletl import TransferModel
from fleet.plan import UpdatePlan, agreed_plan
from fleet.state import TrainableState, capture, load
from fleet.train import pick_device

_VERSION = "version"  # part of the memory: the state received last


@dataclass(frozen=True)
class Model:
    """A client's backbone, and what the server wants of it.

    Attributes:
        backbone: all tasks of a process have it in common.
        plan: the server's widest.
        initial: its state before any training.
        norms: all norms of the backbone, before any training.
    """

    backbone: Backbone
    plan: UpdatePlan
    initial: TrainableState
    norms: dict[str, np.ndarray]
    _transfers: dict[tuple, TransferModel] = field(default_factory=dict, repr=False, compare=False)

    def transfer(
        self, plan: UpdatePlan, stash: str = "recompute", cut: int | None = None
    ) -> TransferModel:
        """The backbone run as a plan trains it; arguments as of `TransferModel`.

        Made once: reading a model's structure takes longer than a small client's step.
        """
        key = plan.digest, stash, cut
        if key not in self._transfers:
            self._transfers[key] = TransferModel(self.backbone, plan, stash, cut)
        return self._transfers[key]

    def reset(self) -> None:
        """As pretrained again, whatever was trained since."""
        load(self.backbone.model, self.initial)
        load_norms(self.backbone.model, self.plan, None, self.norms)


def agree(client: Client, task: Task) -> Model:
    """The client's model, after both sides' plans agreed.

    Raises:
        FleetError: if the server's plan is not that of this backbone, naming what differs.
    """
    config = client.config.model
    if "weights" in client.node_config:
        config = replace(config, weights=str(client.node_config["weights"]))
    return _load(
        config,
        task.classes,
        client.config.seed,
        client.config.local.device,
        json.dumps(task.plan, sort_keys=True),
    )


def receive(
    client: Client, task: Task, download: Download, memory: RoundMemory
) -> tuple[Backbone, UpdatePlan, TrainableState]:
    """Own backbone with the server's state and own norms in it.

    Args:
        memory: the client's of this round, where the state is kept if later ones
            come as steps from it.

    Raises:
        FleetError: if the plans do not agree, or the state is none.
        UnknownVersion: if this client holds no version that the steps start from.
    """
    own = agree(client, task)
    state = follow(download, own.plan, _held(memory, own))
    if parse_codec(client.config.federation.codec_down) != parse_codec(FULL_STATE):
        _keep_version(state, download.versions[-1], memory)
    load(own.backbone.model, state)
    load_norms(own.backbone.model, own.plan, memory, own.norms)
    if state.first_not_finite() is None:
        keep_model(client, own.backbone, task.classes)
    return own.backbone, own.plan, state


def _held(memory: RoundMemory, own: Model) -> Iterator[TrainableState]:
    """States that the server's steps may start from: those received, the pretrained one."""
    for remembered in memory.history(_VERSION):
        if remembered.facts["plan"] == own.plan.digest:
            yield TrainableState(own.plan, remembered.tensors)
    yield own.initial


def _keep_version(state: TrainableState, version: str, memory: RoundMemory) -> None:
    """Remember a state, unless it is what was remembered last, as in a round without a step."""
    last = memory.read(_VERSION)
    facts = {"plan": state.plan.digest, "version": version}
    if last is None or last.facts != facts:
        memory.write(_VERSION, state.tensors, facts)


# Whatever a client trains, the next task's state and norms overwrite: one model serves
# all clients of a process. Another plan may leave out what was trained: it gets a new one.
@lru_cache(maxsize=1)
def _load(
    config: ModelConfig, classes: tuple[str, ...], seed: int, device: str, asked: str
) -> Model:
    """Load the backbone and derive the plan whose summary, as JSON, is `asked`."""
    backbone = backbone_of(config, classes, seed)
    plan = agreed_plan(backbone, json.loads(asked))
    initial = capture(backbone.model, plan)
    backbone.model.to(pick_device(device))
    return Model(backbone, plan, initial, pretrained_norms(backbone.model))
