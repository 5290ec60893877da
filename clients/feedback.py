"""A client's updates with error feedback that survives restarts of its process."""

from collections.abc import Sequence

from clients.round_memory import RoundMemory
from fleet.codec import Payload, encode, encode_with_feedback, parse_codec
from fleet.plan import UpdatePlan
from fleet.state import Arrays

_PART = "feedback"


def encode_update(
    update: Arrays,
    plan: UpdatePlan,
    widest: UpdatePlan,
    codec: str,
    seed: Sequence[int],
    memory: RoundMemory,
) -> Payload:
    """Encode an update, and remember what it leaves out.

    What is left out goes into the next update. An update whose reply is lost is
    lost, as without feedback: sent again, rounds later, it would pull the model
    back to where it was, and a device that is often late would send ever more.

    Args:
        update: deltas of `plan`, and running statistics as they are.
        plan: what this client trains.
        widest: the server's plan, of which any earlier plan was a part.
        codec: of a codec without feedback nothing is remembered.
        seed: of stochastic rounding.
        memory: the client's of this round.

    Raises:
        UpdateError: if the update is not finite.
        ConfigError: if the memory cannot be written.
    """
    if not parse_codec(codec).feedback:
        return encode(update, plan, codec, seed)
    payload, residual = encode_with_feedback(update, _left_out(memory, widest), plan, codec, seed)
    memory.write(_PART, residual, {"plan": widest.digest})
    return payload


def _left_out(memory: RoundMemory, widest: UpdatePlan) -> Arrays:
    """What earlier updates left out; nothing, if the run has another plan by now."""
    remembered = memory.read(_PART)
    if remembered is None or remembered.facts.get("plan") != widest.digest:
        return {}
    return remembered.tensors
