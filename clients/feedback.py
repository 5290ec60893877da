"""A client's updates with error feedback that survives lost replies and restarts."""

from collections.abc import Sequence

import numpy as np

from clients.memory import ClientMemory
from fleet.codec import Payload, decode, encode, encode_with_feedback, parse_codec
from fleet.errors import UpdateError
from fleet.plan import UpdatePlan
from fleet.state import Arrays

_PART = "feedback"
_LEFT = "left."  # prefix of the residual's tensors


def encode_update(
    update: Arrays,
    plan: UpdatePlan,
    widest: UpdatePlan,
    codec: str,
    seed: Sequence[int],
    memory: ClientMemory,
    server_round: int,
    acknowledged: int,
) -> Payload:
    """Encode an update, and remember what it leaves out.

    An update that the server did not admit counts as left out whole: its reply
    was lost, late or refused. So the next one carries it.

    Args:
        update: deltas of `plan`, and running statistics as they are.
        plan: what this client trains.
        widest: the server's plan, of which any earlier plan was a part.
        codec: of a codec without feedback nothing is remembered.
        seed: of stochastic rounding.
        memory: the client's of this run.
        server_round: that this update is for.
        acknowledged: round of the client's last update that the server admitted.

    Raises:
        UpdateError: if the update is not finite.
        ConfigError: if the memory cannot be written.
    """
    if not parse_codec(codec).feedback:
        return encode(update, plan, codec, seed)
    residual = _left_out(memory, widest, acknowledged)
    payload, residual = encode_with_feedback(update, residual, plan, codec, seed)
    memory.write(
        _PART,
        {_LEFT + name: array for name, array in residual.items()}
        | {"sent": np.frombuffer(payload.data, np.uint8)},
        {"round": str(server_round), "codec": codec, "plan": plan.digest},
    )
    return payload


def _left_out(memory: ClientMemory, widest: UpdatePlan, acknowledged: int) -> dict[str, np.ndarray]:
    """Residual of the last update, and that update itself if it was not admitted."""
    remembered = memory.read(_PART)
    if remembered is None:
        return {}
    facts = remembered.facts
    residual = {
        name.removeprefix(_LEFT): array
        for name, array in remembered.tensors.items()
        if name.startswith(_LEFT)
    }
    plan = widest.sub_plans.get(facts["plan"])
    if plan is None:  # the run has another plan by now: nothing fits any more
        return {}
    if facts["round"] == str(acknowledged):
        return residual
    sent = Payload(facts["codec"], plan.digest, remembered.tensors["sent"].tobytes())
    try:
        lost = decode(sent, plan)
    except UpdateError:  # written by another version of this program
        return residual
    return residual | {
        spec.name: residual[spec.name] + lost[spec.name]
        for spec in plan.specs
        if not spec.is_statistic
    }
