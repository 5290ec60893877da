"""A finished update, kept until the next: asked for again, a round is not trained again.

A server that was killed and goes on repeats its last round. On a device a round
is minutes of training, so the update is kept and offered again. What counts is
that it is an update of the same state in the same round, so its name is made
of these; the token, which is new with every message, is not among them.
"""

import json
from collections.abc import Mapping

import numpy as np

from clients.memory import ClientMemory
from fleet.codec import Download, Payload
from fleet.message import Task

_PART = "journal"

Metrics = Mapping[str, int | float]


def noted(memory: ClientMemory, task: Task, download: Download) -> tuple[Payload, Metrics] | None:
    """The update that was made of this task before, and its metrics; None if none was.

    Raises:
        ConfigError: if the journal is there and cannot be read.
    """
    found = memory.read(_PART)
    if found is None or found.facts["of"] != _name(task, download):
        return None
    facts = found.facts
    payload = Payload(facts["codec"], facts["plan"], found.tensors["data"].tobytes())
    return payload, json.loads(facts["metrics"])


def note(
    memory: ClientMemory, task: Task, download: Download, payload: Payload, metrics: Metrics
) -> None:
    """Keep the update that was made of a task, in place of the last one.

    The last thing that a round writes: where it is, all that the round
    remembers is too.

    Raises:
        ConfigError: if it cannot be written.
    """
    facts = {
        "of": _name(task, download),
        "codec": payload.codec,
        "plan": payload.plan_digest,
        "metrics": json.dumps(dict(metrics)),
    }
    memory.write(_PART, {"data": np.frombuffer(payload.data, np.uint8)}, facts)


def _name(task: Task, download: Download) -> str:
    """What an update depends on, in its run."""
    return json.dumps(
        [task.server_round, task.plan.get("digest"), download.versions[-1], task.acknowledged]
    )
