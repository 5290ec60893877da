"""Error feedback: what a codec leaves out of one update goes into the next."""

from collections.abc import Sequence

import numpy as np

from fleet.codec.names import parse_codec
from fleet.codec.payload import Payload, decode, encode
from fleet.plan import UpdatePlan
from fleet.state import Arrays


def encode_with_feedback(
    update: Arrays, residual: Arrays, plan: UpdatePlan, codec: str, seed: Sequence[int] = (0,)
) -> tuple[Payload, dict[str, np.ndarray]]:
    """Encode an update together with what earlier ones left out.

    Args:
        update: deltas of a plan, and running statistics as they are, float32.
        residual: left out so far; of tensors that it lacks, nothing was.
        plan: the update's.
        codec: without feedback the update is encoded as it is.
        seed: of stochastic rounding.

    Returns:
        The payload, and the residual: tensor → left out by now. Tensors that
        this plan does not train keep theirs; statistics have none.

    Raises:
        UpdateError: as `encode`.

    Source: Karimireddy et al., arXiv:1901.09847.
    """
    if not parse_codec(codec).feedback:
        return encode(update, plan, codec, seed), dict(residual)
    due = {
        name: array + residual[name]
        if name in residual and not plan.by_name[name].is_statistic
        else array
        for name, array in update.items()
    }
    payload = encode(due, plan, codec, seed)
    sent = decode(payload, plan)
    left = {s.name: due[s.name] - sent[s.name] for s in plan.specs if not s.is_statistic}
    return payload, {**residual, **left}
