"""Payloads and tasks ↔ Flower records: the one file of the library that knows Flower.

All tensors of a payload travel packed in one uint8 array. Flower sends every
array, chunk and record as an object and a request of its own, so forty small
tensors unpacked would take three times their size.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fleet.codec import Payload
from fleet.errors import FleetError, UpdateError

REFUSED = 100  # code of an error reply in which a client says why it did not train

# What reading a record of the wrong kind or content raises; int(inf) overflows, and
# json.loads recurses.
_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Task:
    """What the server asks of a client, beside the state.

    Attributes:
        plan: summary of the server's widest plan.
        classes: names of the classes, in the order of the head's outputs.
        server_round: from 1 on.
        run: hexadecimal id of the run, under which clients remember.
    """

    plan: Mapping[str, Any]
    classes: tuple[str, ...]
    server_round: int
    run: str


@dataclass(frozen=True)
class Enrolment:
    """What a client says of itself when it joins.

    Attributes:
        name: stable over rounds and restarts.
        num_examples: its training images.
        classes: names of the classes that it has images of.
    """

    name: str
    num_examples: int
    classes: tuple[str, ...]


def write_task(task: Task, state: Payload) -> RecordDict:
    """Task and state as the content of a train or evaluate message."""
    config = {
        "plan": json.dumps(task.plan, sort_keys=True),
        "classes": list(task.classes),
        "server-round": task.server_round,
        "run": task.run,
    }
    return RecordDict({"task": ConfigRecord(config), **_write_payload(state)})


def read_task(content: RecordDict) -> tuple[Task, Payload]:
    """What `write_task` wrote.

    Raises:
        UpdateError: if the content is not a task.
    """
    try:
        config = content["task"]
        plan = json.loads(config["plan"])
        if not isinstance(plan, dict):
            raise TypeError(f"plan is a {type(plan).__name__}, not a table")
        task = Task(
            plan=plan,
            classes=tuple(config["classes"]),
            server_round=int(config["server-round"]),
            run=str(config["run"]),
        )
    except _MALFORMED as error:
        raise UpdateError(
            f"message holds no readable task ({error!r}); run the same version on server and client"
        ) from error
    return task, _read_payload(content)


def write_update(payload: Payload, metrics: Mapping[str, int | float]) -> RecordDict:
    """A client's update as the content of its reply."""
    return RecordDict({"metrics": MetricRecord(dict(metrics)), **_write_payload(payload)})


def read_update(content: RecordDict) -> tuple[Payload, dict[str, int | float]]:
    """What `write_update` wrote.

    Raises:
        UpdateError: if a part is missing or of the wrong kind.
    """
    return _read_payload(content), read_metrics(content)


def write_metrics(metrics: Mapping[str, int | float]) -> RecordDict:
    """Numbers alone, as the content of a reply."""
    return RecordDict({"metrics": MetricRecord(dict(metrics))})


def read_metrics(content: RecordDict) -> dict[str, int | float]:
    """The numbers of a reply.

    Raises:
        UpdateError: if there are none, or one is a list.
    """
    metrics = content.get("metrics")
    if not isinstance(metrics, MetricRecord):
        raise UpdateError("reply holds no metrics; run the same version on server and client")
    if lists := [key for key, value in metrics.items() if isinstance(value, list)]:
        raise UpdateError(f"metric {lists[0]} is a list; a single number is expected")
    return dict(metrics)


def write_enrolment(enrolment: Enrolment) -> RecordDict:
    """A client's introduction as the content of its reply."""
    record = ConfigRecord(
        {
            "name": enrolment.name,
            "num-examples": enrolment.num_examples,
            "classes": list(enrolment.classes),
        }
    )
    return RecordDict({"enrolment": record})


def read_enrolment(content: RecordDict) -> Enrolment:
    """What `write_enrolment` wrote.

    Raises:
        UpdateError: if the content is none.
    """
    try:
        record = content["enrolment"]
        return Enrolment(
            str(record["name"]),
            int(record["num-examples"]),
            tuple(str(name) for name in record["classes"]),
        )
    except _MALFORMED as error:
        raise UpdateError(
            f"reply holds no readable enrolment ({error!r}); "
            f"run the same version on server and client"
        ) from error


def refusal(reason: FleetError, message: Message) -> Message:
    """An error reply that carries the reason to the server."""
    return Message(Error(REFUSED, str(reason)), reply_to=message)


def content_bytes(content: RecordDict) -> int:
    """Bytes of a content as Flower puts it on the wire, the headers of its records included.

    What the transport adds (message metadata, HTTP, TLS) is not counted.
    """
    return sum(len(part.deflate()) for part in get_all_nested_objects(content).values())


def _write_payload(payload: Payload) -> dict[str, ArrayRecord | ConfigRecord]:
    packed = np.frombuffer(payload.data, np.uint8)
    layout = {
        "codec": payload.codec,
        "plan-digest": payload.plan_digest,
        "names": list(payload.names),
        "shapes": [json.dumps(shape) for shape in payload.shapes],
    }
    return {
        "tensors": ArrayRecord({"packed": Array(packed)}),
        "layout": ConfigRecord(layout),
    }


def _read_payload(content: RecordDict) -> Payload:
    try:
        layout = content["layout"]
        shapes = tuple(tuple(int(n) for n in json.loads(shape)) for shape in layout["shapes"])
        packed = content["tensors"]["packed"]
        if packed.dtype != "uint8" or len(packed.shape) != 1:
            raise TypeError(f"packed is {packed.dtype} of shape {packed.shape}, not a row of uint8")
        return Payload(
            codec=str(layout["codec"]),
            plan_digest=str(layout["plan-digest"]),
            names=tuple(str(name) for name in layout["names"]),
            shapes=shapes,
            data=_npy_bytes(packed.data),
        )
    except Exception as error:  # NumPy's header parser raises a dozen kinds for a damaged one
        raise UpdateError(
            f"message holds no readable payload ({error!r}); "
            f"run the same version on server and client"
        ) from error


def _npy_bytes(npy: bytes) -> bytes:
    """The row of bytes in an .npy blob; `np.load` would allocate whatever its header claims."""
    stream = BytesIO(npy)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"packed is .npy version {version}, not (1, 0)")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    row = npy[stream.tell() :]
    if dtype != np.uint8 or shape != (len(row),):
        raise ValueError(f"packed claims {dtype} of shape {shape} and holds {len(row)} bytes")
    return row
