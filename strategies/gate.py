"""Validation of replies: what does not fit is refused with its reason, and nothing else happens.

The checks stand in the order of what they cost and of what they protect: size,
token, plan, the layout of the bytes, the values, the weight. Norms are clipped
by the rule, which sees the whole cohort.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from flwr.app import RecordDict

from fleet.codec import EncodedArrays, most_bytes, parse_codec
from fleet.errors import UpdateError
from fleet.evaluation import Evaluation
from fleet.message import read_bytes, read_metrics, read_token, read_update
from fleet.plan import UpdatePlan
from fleet.state import ClientUpdate

MAX_EXAMPLES = 10_000_000  # a client that claims more would outweigh any fleet
# Squares of such numbers, and sums of squares, are still finite float32. No weight or
# statistic of a model that works is anywhere near; a sum of larger ones could overflow.
MAX_MAGNITUDE = 1e15
_RECORD_BYTES = 64 * 1024  # room for all of a reply but its tensors
_MAX_METRICS = 64
_MAX_METRIC_NAME = 64  # characters; names go on record every round
_MAX_LOSS = 1e30  # nats; sums over a fleet's images stay finite
_MAX_BYTES = 2**53  # whole in every JSON reader
_MAX_SECONDS = 1e9

_OWN_FIELDS = ("num-examples", "blocks", "loss", "peak-bytes", "seconds")


@dataclass(frozen=True)
class Gate:
    """What a reply must be to count.

    Attributes:
        plan: the widest plan; an update must be of it or of a sub-plan.
        codec: that updates must be in.
        spend: (client, token) takes a reply's token, or raises UpdateError.
        keep: bytes → what slices to them; where admitted updates lie.
        equal_plans: whether an update must be of the widest plan itself.
    """

    plan: UpdatePlan
    codec: str
    spend: Callable[[str, str], None]
    keep: Callable[[bytes], bytes] = bytes
    equal_plans: bool = False

    def admit(self, content: RecordDict, client: str, nbytes: int) -> ClientUpdate:
        """Turn a reply into an update, if it is one.

        Args:
            content: of a reply to a train message.
            client: who was asked.
            nbytes: size of the content, as `content_bytes` counts it.

        Returns:
            The update, its tensors encoded as they came.

        Raises:
            UpdateError: with the reason why the reply does not count.
        """
        check_bytes(nbytes, most_bytes(self.plan, self.codec))
        self.spend(client, read_token(content))
        payload, metrics = read_update(content)
        narrow = self.plan.sub_plans.get(payload.plan_digest)
        if narrow is None:
            raise UpdateError(
                f"update is of plan {payload.plan_digest[:8]}, which is no sub-plan of "
                f"{self.plan.digest[:8]}; run the server's plan"
            )
        if self.equal_plans and narrow.digest != self.plan.digest:
            raise UpdateError(
                f"update is of {narrow.blocks} blocks, the run's strategy needs the same "
                f"{self.plan.blocks} of every client; leave blocks and budget-mib out of this "
                f"device's configuration"
            )
        tensors = EncodedArrays(payload, narrow)
        if parse_codec(payload.codec) != parse_codec(self.codec):
            raise UpdateError(
                f"update is in codec {payload.codec:.40}, the run's codec-up is {self.codec}; "
                f"run the server's settings"
            )
        _check_values(tensors, narrow)
        num_examples = _num_examples(metrics)
        _check_names(metrics)
        loss = _number(metrics, "loss", -_MAX_LOSS, _MAX_LOSS)
        peak_bytes = _number(metrics, "peak-bytes", 0, _MAX_BYTES)
        seconds = _number(metrics, "seconds", 0, _MAX_SECONDS)
        kept = replace(payload, data=self.keep(payload.data))
        statistics = {spec.name for spec in narrow.specs if spec.is_statistic}
        return ClientUpdate(
            client=client,
            plan=narrow,
            delta=EncodedArrays(kept, narrow, [n for n in tensors if n not in statistics]),
            statistics=EncodedArrays(kept, narrow, [n for n in tensors if n in statistics]),
            num_examples=num_examples,
            loss=loss,
            peak_bytes=int(peak_bytes),
            seconds=seconds,
            metrics={key: value for key, value in metrics.items() if key not in _OWN_FIELDS},
        )

    def admit_evaluation(self, content: RecordDict, client: str, nbytes: int) -> Evaluation:
        """Turn a reply to an evaluate message into its result, if it is one.

        Raises:
            UpdateError: with the reason why the reply does not count.
        """
        check_bytes(nbytes, 0)
        self.spend(client, read_token(content))
        metrics = read_metrics(content)
        _check_names(metrics)
        return Evaluation(
            _num_examples(metrics),
            _number(metrics, "loss", 0, _MAX_LOSS),
            _number(metrics, "accuracy", 0, 1),
        )

    def admit_bytes(self, content: RecordDict, client: str, nbytes: int, most: int) -> bytes:
        """The bytes of a reply that holds nothing else.

        Args:
            most: how many an honest one may have.

        Raises:
            UpdateError: with the reason why the reply does not count.
        """
        check_bytes(nbytes, most)
        self.spend(client, read_token(content))
        return read_bytes(content)


def check_bytes(nbytes: int, of_tensors: int) -> None:
    """Hold a reply's size against the most that an honest one may have.

    Args:
        nbytes: of the whole content.
        of_tensors: what its tensors may take.

    Raises:
        UpdateError: if it has more, the records beside the tensors included.
    """
    most = of_tensors + _RECORD_BYTES
    if nbytes > most:
        raise UpdateError(f"reply has {nbytes} bytes, no honest one has more than {most}; refused")


def _check_values(tensors: EncodedArrays, plan: UpdatePlan) -> None:
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise UpdateError(f"{name} holds NaN or infinity; lower the learning rate")
        if (largest := np.abs(array).max(initial=0)) > MAX_MAGNITUDE:
            raise UpdateError(
                f"{name} holds a number of magnitude {largest:.3g}, at most {MAX_MAGNITUDE:g} is "
                f"taken; lower the learning rate"
            )
        if plan.by_name[name].role == "var" and (array < 0).any():
            raise UpdateError(f"{name} holds a negative variance, {array.min()}")


def _num_examples(metrics: Mapping[str, int | float]) -> int:
    count = metrics.get("num-examples")
    if type(count) is not int or not 1 <= count <= MAX_EXAMPLES:
        raise UpdateError(
            f"num-examples must be a whole number from 1 to {MAX_EXAMPLES}, got {count!r}"
        )
    return count


def _check_names(metrics: Mapping[str, int | float]) -> None:
    if len(metrics) > _MAX_METRICS:
        raise UpdateError(f"reply has {len(metrics)} metrics, {_MAX_METRICS} at most are read")
    for name in metrics:
        if len(name) > _MAX_METRIC_NAME:
            raise UpdateError(
                f"metric {name[:_MAX_METRIC_NAME]} has a name of {len(name)} characters, "
                f"{_MAX_METRIC_NAME} at most are taken; shorten it"
            )
        if not name or not name.isprintable():  # a terminal would obey what it holds
            raise UpdateError(f"a metric is called {name!r}; name it in printable characters")


def _number(metrics: Mapping[str, int | float], key: str, least: float, most: float) -> float:
    value = metrics.get(key)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UpdateError(f"{key} must be a finite number, got {value!r}")
    if not least <= value <= most:
        raise UpdateError(f"{key} must be from {least:g} to {most:g}, got {value!r}")
    return float(value)
