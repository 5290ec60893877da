"""Server optimisers: the round's aggregated delta becomes a step of the model.

An optimiser is two pure functions, `init` and `update`, made from a rule for a
single tensor. Each tensor carries its own state and its own step count, so one
that nobody trained this round keeps value and state bit for bit, and resumes as
if the rounds between had not been.

The rules and their defaults are those of Flower's FedAvg, FedAvgM, FedAdam,
FedYogi and FedAdagrad, also where these depart from their papers; each
departure is named below. Running statistics do not belong here: they are
pooled, never stepped.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fleet.errors import ConfigError, UpdateError
from fleet.state import Arrays

TensorState = Mapping[str, np.ndarray | int]  # what an optimiser remembers of one tensor
OptState = Mapping[str, TensorState]  # tensor name → its state


@dataclass(frozen=True)
class ServerOptimizer:
    """A server optimiser as two pure functions.

    Attributes:
        init: params → state, before the first step.
        update: (delta, state, params, trainers) → (params, state). `trainers` tells
            how many clients trained each tensor, and may be left out; FedDyn takes
            all of the fleet then. `delta` may name some of
            the params only; the others, and their state, are returned untouched.
            Params are float32 in and out, all arithmetic and state are float64. A NaN
            in delta comes out as a NaN in params: refusing it is the gate's task.

    `update` raises UpdateError if delta names a tensor that params or state lack,
    or has another shape.
    """

    init: Callable[[Arrays], OptState]
    update: Callable[..., tuple[Arrays, OptState]]


def server_optimizer(
    name: str, *, learning_rate: float = 0.0, momentum: float, clients: int = 1
) -> ServerOptimizer:
    """The optimiser of a run's settings.

    Args:
        name: one of `SERVER_OPTIMIZERS`.
        learning_rate: 0 means the optimiser's own default.
        momentum: FedAvgM's; the others have none or keep Flower's beta_1.
        clients: of the whole fleet; FedDyn's.

    Raises:
        ConfigError: if the name is unknown, a value is out of range, or FedDyn
            is given a learning rate.
    """
    if name not in SERVER_OPTIMIZERS:
        raise ConfigError(
            f"unknown server optimiser {name!r}; known are {', '.join(SERVER_OPTIMIZERS)}"
        )
    settings = {} if learning_rate == 0 else {"learning_rate": learning_rate}
    if name == "fedavgm":
        settings["momentum"] = momentum
    if name == "feddyn":
        if settings:
            raise ConfigError(
                f"feddyn has no learning rate, and server-learning-rate is {learning_rate:g}; "
                f"set it to 0"
            )
        settings["clients"] = clients
    return SERVER_OPTIMIZERS[name](**settings)


def sgd(learning_rate: float = 1.0, momentum: float = 0.0) -> ServerOptimizer:
    """FedAvgM on client deltas; `sgd(1.0)` is FedAvg and remembers nothing.

    u ← momentum·u + delta; p ← p + learning_rate·u. Neither dampened nor Nesterov.

    Source: Hsu et al., arXiv:1909.06335.
    """
    _check_positive("learning rate", learning_rate)
    _check_fraction("momentum", momentum)

    def init(p: np.ndarray) -> TensorState:
        return {"velocity": _zeros(p)} if momentum else {}

    def step(d: np.ndarray, state: TensorState, _: int | None) -> tuple[np.ndarray, TensorState]:
        if not momentum:
            return learning_rate * d, state
        velocity = momentum * state["velocity"] + d
        return learning_rate * velocity, {"velocity": velocity}

    return _by_tensor(init, step)


def adam(
    learning_rate: float = 0.1, beta_1: float = 0.9, beta_2: float = 0.99, tau: float = 1e-3
) -> ServerOptimizer:
    """FedAdam, with Flower's bias correction.

    m ← β₁m + (1−β₁)d; v ← β₂v + (1−β₂)d²; p ← p + η_t·m/(√v + τ).

    Flower departs from the paper in two ways, which we follow: v starts at 0, not at
    τ², and the learning rate is corrected for bias. The correction is Kingma and Ba's,
    but takes the exponent t + 1 at step t = 1, 2, …: the first step is √(1−β₂²)/(1−β₁²)
    = 0.74 of the uncorrected one where theirs is √(1−β₂)/(1−β₁) = 1. Here t counts the
    tensor's own steps, which are Flower's rounds when every round trains it.

    Source: Reddi et al., arXiv:2003.00295, algorithm 2; Kingma and Ba, arXiv:1412.6980.
    """
    _check_positive("learning rate", learning_rate)
    _check_fraction("beta_1", beta_1)
    _check_fraction("beta_2", beta_2)
    _check_positive("tau", tau)

    def init(p: np.ndarray) -> TensorState:
        return {"steps": 0, "first_moment": _zeros(p), "second_moment": _zeros(p)}

    def step(d: np.ndarray, state: TensorState, _: int | None) -> tuple[np.ndarray, TensorState]:
        steps = state["steps"] + 1
        m = beta_1 * state["first_moment"] + (1 - beta_1) * d
        v = beta_2 * state["second_moment"] + (1 - beta_2) * d**2
        corrected = (
            learning_rate * math.sqrt(1 - beta_2 ** (steps + 1)) / (1 - beta_1 ** (steps + 1))
        )
        state = {"steps": steps, "first_moment": m, "second_moment": v}
        return corrected * m / (np.sqrt(v) + tau), state

    return _by_tensor(init, step)


def yogi(
    learning_rate: float = 0.01, beta_1: float = 0.9, beta_2: float = 0.99, tau: float = 1e-3
) -> ServerOptimizer:
    """FedYogi: Adam whose second moment moves by (1−β₂)d² at most.

    m ← β₁m + (1−β₁)d; v ← v − (1−β₂)d²·sign(v − d²); p ← p + η·m/(√v + τ).

    As in Flower, v starts at 0 where the paper asks for at least τ², and nothing is
    corrected for bias.

    Source: Reddi et al., arXiv:2003.00295, algorithm 2.
    """
    _check_positive("learning rate", learning_rate)
    _check_fraction("beta_1", beta_1)
    _check_fraction("beta_2", beta_2)
    _check_positive("tau", tau)

    def init(p: np.ndarray) -> TensorState:
        return {"first_moment": _zeros(p), "second_moment": _zeros(p)}

    def step(d: np.ndarray, state: TensorState, _: int | None) -> tuple[np.ndarray, TensorState]:
        m = beta_1 * state["first_moment"] + (1 - beta_1) * d
        v = state["second_moment"]
        v = v - (1 - beta_2) * d**2 * np.sign(v - d**2)
        return learning_rate * m / (np.sqrt(v) + tau), {"first_moment": m, "second_moment": v}

    return _by_tensor(init, step)


def adagrad(learning_rate: float = 0.1, tau: float = 1e-3) -> ServerOptimizer:
    """FedAdagrad: v ← v + d²; p ← p + η·d/(√v + τ).

    The paper's β₁ is 0 in Flower, and so is the first v, for which the paper asks at
    least τ².

    Source: Reddi et al., arXiv:2003.00295, algorithm 2.
    """
    _check_positive("learning rate", learning_rate)
    _check_positive("tau", tau)

    def init(p: np.ndarray) -> TensorState:
        return {"second_moment": _zeros(p)}

    def step(d: np.ndarray, state: TensorState, _: int | None) -> tuple[np.ndarray, TensorState]:
        v = state["second_moment"] + d**2
        return learning_rate * d / (np.sqrt(v) + tau), {"second_moment": v}

    return _by_tensor(init, step)


def feddyn(clients: int) -> ServerOptimizer:
    """FedDyn's server, for clients that train with `fleet.objective.feddyn`.

    g ← g + share·d; p ← p + d + g.

    The paper keeps h ← h − α·(1/m)·Σ (θ_k − θ) over the cohort P out of m clients
    and sets θ ← (1/|P|)·Σ θ_k − h/α. With d the cohort's mean delta and g = −h/α
    that is the above, free of α, and share is |P|/m: of each tensor, the clients
    whose updates of it count in this round, over all of the fleet. A client whose
    update was lost moves neither side. The paper's mean is plain; weighted by
    num_examples it finds the minimum of the loss over all images, if cohorts hold
    about as many as their share of clients.

    Of a tensor that only some clients train, the minimum is theirs.

    Args:
        clients: m, of the whole fleet.

    Raises:
        ConfigError: if there is none.

    Source: Acar et al., arXiv:2111.04263, algorithm 1.
    """
    if clients < 1:
        raise ConfigError(f"feddyn needs the number of the fleet's clients, got {clients}")

    def init(p: np.ndarray) -> TensorState:
        return {"drift": _zeros(p)}

    def step(
        d: np.ndarray, state: TensorState, trainers: int | None
    ) -> tuple[np.ndarray, TensorState]:
        share = 1.0 if trainers is None else min(1.0, trainers / clients)
        drift = state["drift"] + share * d
        return d + drift, {"drift": drift}

    return _by_tensor(init, step)


SERVER_OPTIMIZERS: Mapping[str, Callable[..., ServerOptimizer]] = {
    "fedavg": sgd,
    "fedavgm": sgd,
    "fedadam": adam,
    "fedyogi": yogi,
    "fedadagrad": adagrad,
    "feddyn": feddyn,
}

InitTensor = Callable[[np.ndarray], TensorState]
# float64 delta, the tensor's state, how many trained it → float64 step, state
StepTensor = Callable[[np.ndarray, TensorState, int | None], tuple[np.ndarray, TensorState]]


def _by_tensor(init_tensor: InitTensor, step_tensor: StepTensor) -> ServerOptimizer:
    """Lift a rule for one tensor, float64 delta → float64 step, to mappings of them."""

    def init(params: Arrays) -> OptState:
        return {name: init_tensor(p) for name, p in params.items()}

    def update(
        delta: Arrays, state: OptState, params: Arrays, trainers: Mapping[str, int] | None = None
    ) -> tuple[Arrays, OptState]:
        _check_delta(delta, state, params)
        params, state = dict(params), dict(state)
        for name, d in delta.items():
            d = np.asarray(d, dtype=np.float64)
            step, state[name] = step_tensor(d, state[name], (trainers or {}).get(name))
            params[name] = np.asarray(params[name] + step, dtype=np.float32)
        return params, state

    return ServerOptimizer(init, update)


def _check_delta(delta: Arrays, state: OptState, params: Arrays) -> None:
    for name, d in delta.items():
        if name not in params:
            raise UpdateError(
                f"delta names {name}, which is not among the {len(params)} params; "
                f"pass the params of the widest plan"
            )
        if name not in state:
            raise UpdateError(
                f"the optimiser's state knows no {name}; init it with the same params"
            )
        if d.shape != params[name].shape:
            raise UpdateError(
                f"delta of {name} has shape {d.shape}, the param {params[name].shape}; "
                f"check updates against their plan before aggregating"
            )


def _zeros(p: np.ndarray) -> np.ndarray:
    return np.zeros(p.shape, dtype=np.float64)


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"server {name} must be above 0 and finite, got {value}")


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"server {name} must be at least 0 and below 1, got {value}")
