"""Local objectives: what a client minimises beside its own loss, so that unlike clients agree.

Clients whose images differ drift apart in a round of many steps. Both remedies
here are one proximal term, μ/2·‖p − target‖², which the optimiser adds to its
direction (`fleet.optim.SGD`); they differ in the target.

SCAFFOLD (Karimireddy et al., arXiv:1910.06378) corrects the same drift, but
sends a control variate with every state and every update: twice the bytes both
ways. FedDyn corrects it with what client and server keep for themselves.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fleet.state import Arrays

_NOTHING: Arrays = {}


@dataclass(frozen=True)
class Proximal:
    """μ/2·‖p − target‖², summed over tensors.

    Attributes:
        strength: μ, above 0.
        targets: tensor name → float32 target; a tensor that is not named, as a
            norm that stays on its device, has no such term.
    """

    strength: float
    targets: Arrays


def fedprox(received: Arrays, strength: float) -> Proximal:
    """Stay near the state that the round began with.

    Source: Li et al., Federated Optimization in Heterogeneous Networks,
    arXiv:1812.06127, algorithm 2.
    """
    return Proximal(strength, received)


def feddyn(received: Arrays, strength: float, gradients: Arrays = _NOTHING) -> Proximal:
    """Minimise the local loss less its own gradient where the client ended last time.

    The paper's objective, L(p) − ⟨h, p⟩ + μ/2·‖p − received‖², has the gradient
    ∇L(p) + μ·(p − (received + h/μ)). Where all clients stand still, each has
    ∇L = h at one p, and the server's optimiser (`strategies.server_opt.feddyn`)
    sees to it that the h cancel: p is a minimum of the mean loss, which FedAvg's
    and FedProx's resting points are not once clients take several steps.

    Args:
        received: the state that the round began with, parameters alone.
        strength: μ, the paper's α.
        gradients: h by name, `next_gradients` of the round before; 0 for a
            tensor that this client has not trained yet.

    Source: Acar et al., Federated Learning Based on Dynamic Regularization,
    arXiv:2111.04263, algorithm 1.
    """
    targets = {
        name: p + gradients[name] / np.float32(strength) if name in gradients else p
        for name, p in received.items()
    }
    return Proximal(strength, targets)


def next_gradients(
    gradients: Arrays, strength: float, delta: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """FedDyn's h after a round: h − μ·delta for tensors that trained, the old h for others.

    Args:
        gradients: h by name; 0 for a tensor that it does not name.
        strength: μ.
        delta: trained minus received, as the server reads it: what a codec
            rounds off must not count here either, or the h would not cancel.
    """
    stepped = {
        name: gradients.get(name, np.float32(0)) - np.float32(strength) * d
        for name, d in delta.items()
    }
    return {**gradients, **stepped}
