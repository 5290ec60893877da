"""The trainable state: the small tensors of a plan, and what a client makes of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from fleet.errors import UpdateError
from fleet.plan import UpdatePlan

if TYPE_CHECKING:
    import torch.nn as nn

Arrays = Mapping[str, np.ndarray]  # tensor name → array


def check_shapes(shapes: Mapping[str, tuple[int, ...]], plan: UpdatePlan) -> None:
    """Compare names and shapes with the plan's.

    Raises:
        UpdateError: naming the first tensor that does not fit, and both values.
    """
    expected = {spec.name: spec.shape for spec in plan.specs}
    where = f"plan {plan.digest[:8]}"
    if unknown := sorted(shapes.keys() - expected.keys()):
        raise UpdateError(
            f"unknown tensor {unknown[0]} (of {len(unknown)}), {where} has no such name; "
            f"run the server's plan"
        )
    if missing := sorted(expected.keys() - shapes.keys()):
        raise UpdateError(
            f"missing tensor {missing[0]} (of {len(missing)}), {where} needs it; "
            f"run the server's plan"
        )
    for name, shape in shapes.items():
        if shape != expected[name]:
            raise UpdateError(
                f"{name} has shape {shape}, {where} expects {expected[name]}; run the server's plan"
            )


def check_arrays(arrays: Arrays, plan: UpdatePlan) -> None:
    """Compare names, shapes and dtypes with the plan's.

    Raises:
        UpdateError: naming the first tensor that does not fit, and both values.
    """
    check_shapes({name: array.shape for name, array in arrays.items()}, plan)
    for name, array in arrays.items():
        wanted = plan.by_name[name].dtype
        if array.dtype != np.dtype(wanted):
            raise UpdateError(
                f"{name} has dtype {array.dtype}, plan {plan.digest[:8]} expects {wanted}; "
                f"convert it before it is sent"
            )


@dataclass(frozen=True)
class TrainableState:
    """Every tensor of a plan as float32; immutable, with + − ×.

    Raises:
        UpdateError: if a tensor's name, shape or dtype is not the plan's.
    """

    plan: UpdatePlan
    tensors: Arrays

    def __post_init__(self) -> None:
        check_arrays(self.tensors, self.plan)
        for array in self.tensors.values():
            array.flags.writeable = False

    def narrow(self, plan: UpdatePlan) -> "TrainableState":
        """The part of this state that a sub-plan trains.

        Raises:
            UpdateError: if it trains more than this state has.
        """
        absent = plan.by_name.keys() - self.tensors.keys()
        if absent:
            raise UpdateError(
                f"plan {plan.digest[:8]} trains {min(absent)}, which a state of plan "
                f"{self.plan.digest[:8]} does not hold; narrow to a sub-plan of it"
            )
        return TrainableState(plan, {name: self.tensors[name] for name in plan.by_name})

    def first_not_finite(self) -> str | None:
        """Name of the first tensor that holds NaN or infinity; None: none does."""
        return next((n for n, a in self.tensors.items() if not np.isfinite(a).all()), None)

    def __add__(self, other: "TrainableState") -> "TrainableState":
        return self._combine(other, np.add)

    def __sub__(self, other: "TrainableState") -> "TrainableState":
        return self._combine(other, np.subtract)

    def __mul__(self, factor: float) -> "TrainableState":
        scaled = {name: array * np.float32(factor) for name, array in self.tensors.items()}
        return TrainableState(self.plan, scaled)

    def _combine(self, other: "TrainableState", operation: Callable) -> "TrainableState":
        if self.plan.digest != other.plan.digest:
            raise UpdateError(
                f"states of different plans do not combine: {self.plan.digest[:8]} and "
                f"{other.plan.digest[:8]}; narrow the wider one first"
            )
        pairs = ((name, array, other.tensors[name]) for name, array in self.tensors.items())
        return TrainableState(self.plan, {name: operation(a, b) for name, a, b in pairs})


def capture(model: "nn.Module", plan: UpdatePlan) -> TrainableState:
    """Copy a plan's tensors out of a backbone's model."""
    own = model.state_dict()
    # A map that lies in channels_last is put into the order of its indices by the copy.
    tensors = {name: np.array(own[name].detach().cpu().numpy(), order="C") for name in plan.by_name}
    return TrainableState(plan, tensors)


def load(model: "nn.Module", state: TrainableState) -> None:
    """Copy a state's tensors into a backbone's model, in place."""
    import torch

    own = model.state_dict()
    with torch.no_grad():
        for name, array in state.tensors.items():
            # torch warns of read-only arrays; this one is only read
            own[name].copy_(torch.tensor(array))


@dataclass(frozen=True, kw_only=True)
class ClientUpdate:
    """What one client made of one round.

    Attributes:
        client: the client's name, stable over rounds.
        plan: the sub-plan that it trained.
        delta: trained minus received, for every tensor that is no statistic.
        statistics: running means and variances of the trained norms, as they are.
        num_examples: examples in one local epoch.
        loss: mean training loss over the local epochs.
        peak_bytes: as in `fleet.records.ClientReport`.
        seconds: wall time of the local update.
        metrics: further numbers for the record (temperature, resident memory, …).
    """

    client: str
    plan: UpdatePlan
    delta: Arrays
    statistics: Arrays
    num_examples: int
    loss: float
    peak_bytes: int
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)
