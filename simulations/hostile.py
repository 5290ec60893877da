"""Hostile clients of a simulated fleet, around a ClientApp that is what it always is."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MessageType

from clients import head_start, local_update
from fleet.backbones import backbone_of
from fleet.codec import Payload, decode, encode
from fleet.config import ModelConfig, RunConfig
from fleet.data import ImageData
from fleet.errors import UpdateError
from fleet.message import Task, read_task, read_update, write_update
from fleet.plan import UpdatePlan, agreed_plan
from fleet.state import Arrays
from simulations.attacks import Attack, forge
from simulations.local_clients import ClientFunction
from simulations.local_engine import Exchange, Interference


def forging(attack: Attack, hostile: frozenset[int], config: RunConfig) -> Interference:
    """Replace what the hostile clients trained by what the attack makes of the cohort's updates.

    All have trained honestly by then. A forged reply differs from the honest one
    in its tensors alone, so it is of the right plan and codec.

    Args:
        hostile: numbers of the clients.
        config: the run's.
    """

    def interfere(exchanges: Sequence[Exchange]) -> Sequence[Exchange]:
        trained = {}
        for exchange in exchanges:
            if exchange.message.metadata.message_type == MessageType.TRAIN:
                task = read_task(exchange.message.content)
                found = _update(exchange.reply, _widest(task, config))
                if found is not None:
                    trained[exchange.client] = (exchange.reply, task, *found)
        ours, others = (
            [arrays for client, (*_, arrays) in trained.items() if (client in hostile) is side]
            for side in (True, False)
        )
        for client in sorted(trained.keys() & hostile):
            reply, task, payload, plan, arrays = trained[client]
            seed = [config.seed, task.server_round, client, *b"attack"]
            forged = forge(attack, plan, arrays, ours, others, np.random.default_rng(seed))
            _replace_tensors(reply, _encode(forged, plan, payload, seed))
        return exchanges

    return interfere


def flipping_labels(client_app: ClientFunction, hostile: frozenset[int]) -> ClientFunction:
    """A ClientApp whose hostile clients train on the labels C − 1 − y.

    So are the labels of their moments, from which the first head is solved. Their
    validation images keep theirs.
    """

    def answer(message: Message, context: Context) -> Message:
        evaluates = message.metadata.message_type == MessageType.EVALUATE
        if evaluates or context.node_config["partition-id"] not in hostile:
            return client_app(message, context)
        with _flipped_labels():
            return client_app(message, context)

    return answer


@contextmanager
def _flipped_labels() -> Iterator[None]:
    """Put a flip behind the step that counts labels in the server's classes."""
    honest = local_update.relabel

    def relabel(images: ImageData, classes: tuple[str, ...]) -> ImageData:
        images = honest(images, classes)
        return replace(images, labels=len(classes) - 1 - images.labels)

    users = (local_update, head_start)
    for module in users:
        module.relabel = relabel
    try:
        yield
    finally:
        for module in users:
            module.relabel = honest


def _update(reply: Message, widest: UpdatePlan) -> tuple[Payload, UpdatePlan, Arrays] | None:
    """The update in a reply; None if there is none, or it is none that an attacker counts on."""
    if not reply.has_content():
        return None
    try:
        payload = read_update(reply.content)[0]
        plan = widest.sub_plans[payload.plan_digest]
        arrays = decode(payload, plan)
    except (UpdateError, KeyError):
        return None
    return (payload, plan, arrays) if _all_finite(arrays) else None


def _encode(arrays: Arrays, plan: UpdatePlan, like: Payload, seed: Sequence[int]) -> Payload:
    """In another payload's codec."""
    try:
        return encode(arrays, plan, like.codec, seed)
    except UpdateError:
        # Codecs that round refuse NaN. Where all bits are ones, nothing decodes as a number.
        return replace(like, data=b"\xff" * like.nbytes)


def _replace_tensors(reply: Message, payload: Payload) -> None:
    """Leave all else that the client wrote as it is."""
    for key, record in write_update(payload, {}).items():
        if isinstance(record, ArrayRecord):
            reply.content[key] = record


def _all_finite(arrays: Arrays) -> bool:
    return all(np.isfinite(array).all() for array in arrays.values())


def _widest(task: Task, config: RunConfig) -> UpdatePlan:
    """The server's plan, derived as clients derive it."""
    asked = json.dumps(task.plan, sort_keys=True)
    return _plan(config.model, task.classes, config.seed, asked)


@lru_cache(maxsize=2)
def _plan(model: ModelConfig, classes: tuple[str, ...], seed: int, asked: str) -> UpdatePlan:
    return agreed_plan(backbone_of(model, classes, seed), json.loads(asked))
