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
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    no_object_id_recompute,
)

from fleet.codec import Download, Payload, UnknownVersion
from fleet.errors import FleetError, UpdateError

# Codes of error replies in which a client says why it did not train.
REFUSED = 100
LOST_VERSION = 101  # it holds no version from which the steps that it was sent lead on

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
        token: of this client and message alone (`strategies.tokens`); the reply carries it.
        acknowledged: round of the client's last update that was admitted; 0: none.
    """

    plan: Mapping[str, Any]
    classes: tuple[str, ...]
    server_round: int
    run: str = ""
    token: str = ""
    acknowledged: int = 0


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


def write_state(download: Download) -> RecordDict:
    """What brings clients to the newest version, for many tasks to share."""
    header = {
        "codec": download.payloads[0].codec if download.payloads else "",
        "versions": list(download.versions),
        "sizes": [payload.nbytes for payload in download.payloads],
    }
    return RecordDict(
        {
            "tensors": _packed(b"".join(payload.data for payload in download.payloads)),
            "header": ConfigRecord(header),
        }
    )


def write_task(task: Task) -> RecordDict:
    """A task; the content of a message is it and, where the task needs one, a state."""
    config = {
        "plan": json.dumps(task.plan, sort_keys=True),
        "classes": list(task.classes),
        "server-round": task.server_round,
        "run": task.run,
        "token": task.token,
        "acknowledged": task.acknowledged,
    }
    return RecordDict({"task": ConfigRecord(config)})


def read_task(content: RecordDict) -> Task:
    """The task that `write_task` wrote.

    Raises:
        UpdateError: if the content is not a task.
    """
    try:
        config = content["task"]
        plan = json.loads(config["plan"])
        if not isinstance(plan, dict):
            raise TypeError(f"plan is a {type(plan).__name__}, not a table")
        return Task(
            plan=plan,
            classes=_texts(config["classes"]),
            server_round=int(config["server-round"]),
            run=str(config["run"]),
            token=str(config["token"]),
            acknowledged=int(config["acknowledged"]),
        )
    except _MALFORMED as error:
        raise _unreadable("message holds no readable task", error) from error


def read_state(content: RecordDict, plan_digest: str) -> Download:
    """The download that `write_state` wrote.

    Args:
        plan_digest: of the plan whose tensors it must hold.

    Raises:
        UpdateError: if the content holds none, or its sizes do not fit.
    """
    try:
        header, data = content["header"], _unpacked(content)
        sizes = [int(size) for size in header["sizes"]]
        versions = tuple(str(version) for version in header["versions"])
        if min(sizes, default=0) < 0 or sum(sizes) != len(data):
            raise ValueError(f"payloads take {sum(sizes)} bytes, there are {len(data)}")
        if len(versions) - len(sizes) not in ((0, 1) if len(sizes) == 1 else (1,)):
            raise ValueError(f"{len(versions)} versions for {len(sizes)} payloads")
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        payloads = tuple(
            Payload(str(header["codec"]), plan_digest, data[end - size : end])
            for size, end in zip(sizes, ends, strict=True)
        )
        return Download(versions, payloads)
    except Exception as error:
        raise _unreadable("message holds no readable state", error) from error


def write_update(
    payload: Payload, metrics: Mapping[str, int | float], token: str = ""
) -> RecordDict:
    """A client's update as the content of its reply."""
    header = {"codec": payload.codec, "plan-digest": payload.plan_digest, "token": token}
    return RecordDict(
        {
            "metrics": MetricRecord(dict(metrics)),
            "tensors": _packed(payload.data),
            "header": ConfigRecord(header),
        }
    )


def read_update(content: RecordDict) -> tuple[Payload, dict[str, int | float]]:
    """What `write_update` wrote, the token aside.

    Raises:
        UpdateError: if a part is missing, of the wrong kind or unknown.
    """
    try:
        header = content["header"]
        if unknown := sorted({*header} - {"codec", "plan-digest", "token"}):
            raise ValueError(f"unknown {unknown[0]} in the header")
        if unknown := sorted({*content} - {"metrics", "tensors", "header"}):
            raise ValueError(f"unknown record {unknown[0]}")
        payload = Payload(str(header["codec"]), str(header["plan-digest"]), _unpacked(content))
    except Exception as error:  # NumPy's header parser raises a dozen kinds for a damaged one
        raise _unreadable("message holds no readable payload", error) from error
    return payload, read_metrics(content)


def read_token(content: RecordDict) -> str:
    """The token of a reply; empty if it carries none."""
    header = content.get("header")
    token = header.get("token") if isinstance(header, ConfigRecord) else None
    return token if isinstance(token, str) else ""


def write_exponent(exponent: int) -> RecordDict:
    """What a task of round 0 says beside the task itself."""
    return RecordDict({"moments": ConfigRecord({"exponent": exponent})})


def read_exponent(content: RecordDict) -> int:
    """What `write_exponent` wrote.

    Raises:
        UpdateError: if there is none.
    """
    try:
        return int(content["moments"]["exponent"])
    except _MALFORMED as error:
        raise _unreadable("exponent", error) from error


def write_metrics(metrics: Mapping[str, int | float], token: str = "") -> RecordDict:
    """Numbers alone, as the content of a reply."""
    header = ConfigRecord({"token": token})
    return RecordDict({"metrics": MetricRecord(dict(metrics)), "header": header})


def write_bytes(data: bytes, token: str = "") -> RecordDict:
    """A run of bytes alone, as the content of a reply."""
    return RecordDict({"tensors": _packed(data), "header": ConfigRecord({"token": token})})


def read_bytes(content: RecordDict) -> bytes:
    """What `write_bytes` wrote, the token aside.

    Raises:
        UpdateError: if there is none.
    """
    try:
        return bytes(_unpacked(content))
    except Exception as error:
        raise _unreadable("message holds no readable payload", error) from error


def read_metrics(content: RecordDict) -> dict[str, int | float]:
    """The numbers of a reply.

    Raises:
        UpdateError: if there are none, or one is a list.
    """
    metrics = content.get("metrics")
    if not isinstance(metrics, MetricRecord):
        raise UpdateError("reply holds no metrics; run the same version on server and client")
    if lists := [key for key, value in metrics.items() if isinstance(value, list)]:
        raise UpdateError(f"metric {lists[0][:40]} is a list; a single number is expected")
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
        name, num_examples = record["name"], record["num-examples"]
        if not isinstance(name, str) or type(num_examples) is not int:
            raise TypeError(f"name is {name!r:.40}, num-examples {num_examples!r:.40}")
        return Enrolment(name, num_examples, _texts(record["classes"]))
    except _MALFORMED as error:
        raise _unreadable("reply holds no readable enrolment", error) from error


def refusal(reason: FleetError, message: Message) -> Message:
    """An error reply that carries the reason to the server."""
    code = LOST_VERSION if isinstance(reason, UnknownVersion) else REFUSED
    return Message(Error(code, str(reason)), reply_to=message)


def content_bytes(content: RecordDict) -> int:
    """Bytes of a content as Flower puts it on the wire, the headers of its records included.

    What the transport adds (message metadata, HTTP, TLS) is not counted.
    """
    with no_object_id_recompute():  # nothing changes here: each object is hashed once
        return sum(len(part.deflate()) for part in get_all_nested_objects(content).values())


def _unreadable(what: str, error: Exception) -> UpdateError:
    # Cut, as names in it may be as long as their sender likes.
    return UpdateError(f"{what} ({error!r:.200}); run the same version on server and client")


def _texts(values: Any) -> tuple[str, ...]:
    """A list of texts; a text alone would pass for the list of its letters."""
    if not isinstance(values, list):
        raise TypeError(f"a {type(values).__name__} is no list of texts")
    return tuple(map(str, values))


def _packed(data: bytes) -> ArrayRecord:
    return ArrayRecord({"packed": Array(np.frombuffer(data, np.uint8))})


def _unpacked(content: RecordDict) -> memoryview:
    """The row of bytes in a content, where it lies.

    `np.load` would allocate whatever its header claims.
    """
    record = content["tensors"]
    if not isinstance(record, ArrayRecord) or list(record) != ["packed"]:
        raise TypeError(f"tensors hold {list(record)[:3]}, not one array named packed")
    packed = record["packed"]
    if packed.dtype != "uint8" or len(packed.shape) != 1:
        raise TypeError(f"packed is {packed.dtype} of shape {packed.shape}, not a row of uint8")
    stream = BytesIO(packed.data)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"packed is .npy version {version}, not (1, 0)")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    row = memoryview(packed.data)[stream.tell() :]
    if dtype != np.uint8 or shape != (len(row),):
        raise ValueError(f"packed claims {dtype} of shape {shape} and holds {len(row)} bytes")
    return row
