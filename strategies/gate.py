"""Validation of replies: what does not fit is refused with its reason, and nothing else happens."""

import math
from collections.abc import Mapping

import numpy as np
from flwr.app import RecordDict

from fleet.codec import decode
from fleet.errors import UpdateError
from fleet.evaluation import Evaluation
from fleet.message import read_metrics, read_update
from fleet.plan import UpdatePlan
from fleet.state import ClientUpdate

MAX_EXAMPLES = 10_000_000  # a client that claims more would outweigh any fleet

_OWN_FIELDS = ("num-examples", "blocks", "loss", "peak-bytes", "seconds")


def admit(content: RecordDict, client: str, plan: UpdatePlan) -> ClientUpdate:
    """Turn a reply into an update, if it is one.

    Args:
        content: of a reply to a train message.
        client: who was asked.
        plan: the widest plan; the reply must be of it or of a sub-plan.

    Raises:
        UpdateError: with the reason why the reply does not count.
    """
    payload, metrics = read_update(content)
    narrow = plan.sub_plans.get(payload.plan_digest)
    if narrow is None:
        raise UpdateError(
            f"update is of plan {payload.plan_digest[:8]}, which is no sub-plan of "
            f"{plan.digest[:8]}; run the server's plan"
        )
    num_examples = _num_examples(metrics)
    loss, peak_bytes, seconds = (_number(metrics, key) for key in ("loss", "peak-bytes", "seconds"))
    tensors = decode(payload, narrow)
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise UpdateError(f"{name} holds NaN or infinity; lower the learning rate")
        if narrow.by_name[name].role == "var" and (array < 0).any():
            raise UpdateError(f"{name} holds a negative variance, {array.min()}")
    statistics = {name for name, spec in narrow.by_name.items() if spec.is_statistic}
    return ClientUpdate(
        client=client,
        plan=narrow,
        delta={name: array for name, array in tensors.items() if name not in statistics},
        statistics={name: array for name, array in tensors.items() if name in statistics},
        num_examples=num_examples,
        loss=loss,
        peak_bytes=int(peak_bytes),
        seconds=seconds,
        metrics={key: value for key, value in metrics.items() if key not in _OWN_FIELDS},
    )


def admit_evaluation(content: RecordDict) -> Evaluation:
    """Turn a reply to an evaluate message into its result, if it is one.

    Raises:
        UpdateError: with the reason why the reply does not count.
    """
    metrics = read_metrics(content)
    return Evaluation(
        _num_examples(metrics), _number(metrics, "loss"), _number(metrics, "accuracy")
    )


def _num_examples(metrics: Mapping[str, int | float]) -> int:
    count = metrics.get("num-examples")
    if type(count) is not int or not 1 <= count <= MAX_EXAMPLES:
        raise UpdateError(
            f"num-examples must be a whole number from 1 to {MAX_EXAMPLES}, got {count!r}"
        )
    return count


def _number(metrics: Mapping[str, int | float], key: str) -> float:
    value = metrics.get(key)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UpdateError(f"{key} must be a finite number, got {value!r}")
    return float(value)
