"""What is a client's own: norms that stay on its device, and its part of the objective."""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn as nn

from clients.round_memory import RoundMemory
from fleet.config import FederationConfig
from fleet.message import Task
from fleet.objective import Proximal, feddyn, fedprox, next_gradients
from fleet.plan import TensorSpec, UpdatePlan
from fleet.state import Arrays

NORMS, DYNAMIC = "norms", "dynamic"  # parts of the memory
_BEFORE, _SENT = "before.", "sent."  # prefixes of the tensors of one


def load_norms(
    model: nn.Module, plan: UpdatePlan, memory: RoundMemory | None, pretrained: Arrays
) -> None:
    """Give a model the client's own norms, in place; without a memory the pretrained ones.

    Norms that this client has not trained in this run are the pretrained ones.

    Args:
        plan: the server's; its local norms are loaded.
        pretrained: name → value of these at least.

    Source: Li et al., FedBN, arXiv:2102.07623, where all of a norm stays; here,
    what the method trains of it, and the rest is the same everywhere.
    """
    if not plan.local_specs:
        return
    own = _remembered(memory, NORMS, plan.local_specs) if memory else {}
    tensors = model.state_dict()
    with torch.no_grad():
        for spec in plan.local_specs:
            tensors[spec.name].copy_(torch.tensor(own.get(spec.name, pretrained[spec.name])))


def keep_norms(
    model: nn.Module, trained: UpdatePlan, plan: UpdatePlan, memory: RoundMemory
) -> None:
    """Remember the norms that a client has trained; those of a wider round before stay.

    Args:
        trained: the client's sub-plan of this round.
        plan: the server's.

    Raises:
        ConfigError: if they cannot be written.
    """
    tensors = model.state_dict()
    now = {spec.name: _array(tensors[spec.name]) for spec in trained.local_specs}
    memory.write(NORMS, {**_remembered(memory, NORMS, plan.local_specs), **now})


def pretrained_norms(model: nn.Module) -> dict[str, np.ndarray]:
    """Copies of all tensors of all norms of a model."""
    norms = [name for name, part in model.named_modules() if hasattr(part, "running_var")]
    return {
        name: _array(tensor)
        for name, tensor in model.state_dict().items()
        if name.rpartition(".")[0] in norms
    }


def objective(
    config: FederationConfig,
    received: Arrays,
    plan: UpdatePlan,
    memory: RoundMemory,
    acknowledged: int,
) -> Proximal | None:
    """The term beside the loss; None for the loss alone.

    Args:
        received: parameters that this client trains, as the round began.
        plan: the server's.
        acknowledged: round of the client's last update that the server admitted.
    """
    strength = config.objective_strength
    if config.objective == "plain":
        return None
    if config.objective == "fedprox":
        return fedprox(received, strength)
    return feddyn(received, strength, _gradients(memory, plan, strength, acknowledged))


def keep_gradients(
    config: FederationConfig, sent: Arrays, plan: UpdatePlan, memory: RoundMemory, task: Task
) -> None:
    """Remember what FedDyn's next round needs: the gradients before this round, and its update.

    Whether the update moves them is known only as the server acknowledges it;
    one that was lost moves them on neither side.

    Args:
        sent: deltas of the trained parameters, as the server reads them.
        plan: the server's.
        task: of this round.

    Raises:
        ConfigError: if it cannot be written.
    """
    before = _gradients(memory, plan, config.objective_strength, task.acknowledged)
    tensors = {_BEFORE + n: a for n, a in before.items()} | {_SENT + n: a for n, a in sent.items()}
    memory.write(DYNAMIC, tensors, {"round": str(task.server_round)})


def _gradients(memory: RoundMemory, plan: UpdatePlan, strength: float, acknowledged: int) -> Arrays:
    """FedDyn's gradients after all updates that the server admitted."""
    found = memory.read(DYNAMIC)
    if found is None:
        return {}
    before, sent = (
        _fitting(
            {n.removeprefix(p): a for n, a in found.tensors.items() if n.startswith(p)}, plan.specs
        )
        for p in (_BEFORE, _SENT)
    )
    if found.facts["round"] != str(acknowledged):
        return before
    return next_gradients(before, strength, sent)


def _fitting(tensors: Arrays, specs: Iterable[TensorSpec]) -> dict[str, np.ndarray]:
    shapes = {spec.name: spec.shape for spec in specs}
    return {n: a for n, a in tensors.items() if shapes.get(n) == a.shape}


def _remembered(
    memory: RoundMemory, part: str, specs: Iterable[TensorSpec]
) -> dict[str, np.ndarray]:
    """Of a part, the tensors that are there and of the shape that the plan says."""
    found = memory.read(part)
    return {} if found is None else _fitting(found.tensors, specs)


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().numpy().copy()
