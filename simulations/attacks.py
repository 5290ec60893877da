"""What hostile clients send in place of what they trained: attacks on arrays.

An attack knows what the whole cohort trained before any of it is sent. That
is more than a real one may know, so a rule that withstands it withstands that.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from fleet.errors import ConfigError
from fleet.plan import Role, UpdatePlan
from fleet.state import Arrays

FORMS = (
    "sign_flip:FACTOR (as sign_flip:10), alie (or alie:Z), ipm:EPSILON (as ipm:0.5), "
    "gaussian:SIGMA (as gaussian:0.1), nan, label_flip"
)


@dataclass(frozen=True)
class Trained:
    """What honest training made of one tensor: float64 deltas, a row a client.

    Attributes:
        own: (…) the attacker's.
        hostile: (m, …) of all m hostile clients that train the tensor, `own` among them.
        honest: (h, …) of the others that do.
    """

    own: np.ndarray
    hostile: np.ndarray
    honest: np.ndarray


@dataclass(frozen=True)
class Attack:
    """How a hostile client departs from the protocol.

    Attributes:
        delta: what it sends for a tensor's delta.
        statistic: what it sends for a running mean or variance, which travel as
            values.
        flips_labels: it trains on wrong labels, C − 1 − y for y.
    """

    delta: Callable[[Trained, np.random.Generator], np.ndarray] = lambda trained, rng: trained.own
    statistic: Callable[[np.ndarray, Role], np.ndarray] = lambda value, role: value
    flips_labels: bool = False


def read_attack(spec: str) -> Attack:
    """The attack that a name and its number stand for.

    Raises:
        ConfigError: for an unknown name, or a number that is missing, superfluous
            or not above 0 and finite.
    """
    name, colon, number = spec.partition(":")
    if name in _OF_A_NUMBER and colon:
        return _OF_A_NUMBER[name](_number(spec, number))
    if name in _PLAIN and not colon:
        return _PLAIN[name]
    if name in _OF_A_NUMBER or name in _PLAIN:
        wants = "needs a number" if name in _OF_A_NUMBER else "takes no number"
        raise ConfigError(f"attack {spec!r}: {name} {wants}; known: {FORMS}")
    raise ConfigError(f"unknown attack {spec!r}; known: {FORMS}")


def hostile_clients(clients: int, share: float, seed: int) -> frozenset[int]:
    """Numbers of the hostile clients: round(share · clients) of them, drawn by the seed.

    Those of a smaller share are among those of a larger one.
    """
    order = np.random.default_rng([seed, *b"hostile"]).permutation(clients)
    return frozenset(int(number) for number in order[: round(share * clients)])


def forge(
    attack: Attack,
    plan: UpdatePlan,
    own: Arrays,
    hostile: Sequence[Arrays],
    honest: Sequence[Arrays],
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    """What an attacker sends for every tensor of its plan, as float32.

    Args:
        plan: the attacker's; others may train other parts of the widest one.
        own: what the attacker's training gave: deltas, and statistics as values.
        hostile, honest: the same of the hostile clients, the attacker among them,
            and of the others.
    """
    forged = {}
    for name, array in own.items():
        spec = plan.by_name[name]
        if spec.is_statistic:
            forged[name] = attack.statistic(array, spec.role)
        else:
            stacks = (_stack(name, spec.shape, updates) for updates in (hostile, honest))
            forged[name] = attack.delta(Trained(array.astype(np.float64), *stacks), rng)
    return {name: array.astype(np.float32) for name, array in forged.items()}


def alie_z(workers: int, hostile: int) -> float:
    """How many standard deviations ALIE moves: as far as still hides it.

    With s = ⌊n/2 + 1⌋ − m honest workers beyond it, the m hostile ones of n are
    a majority: Φ(z) = (n − m − s)/(n − m). A majority without them is taken to
    need one more. Where even z = 0 does not hide them, as in small cohorts, it
    is 0: they send the mean.

    Source: Baruch et al., arXiv:1902.06156, algorithm 3.
    """
    honest = workers - hostile
    needed = max(workers // 2 + 1 - hostile, 1)
    return NormalDist().inv_cdf(1 - needed / honest) if 2 * needed < honest else 0.0


def _sign_flip(factor: float) -> Attack:
    """−factor times what was trained; running means change their sign."""
    return Attack(
        delta=lambda trained, rng: -factor * trained.own,
        statistic=lambda value, role: -value if role == "mean" else value,
    )


def _alie(z: float | None = None) -> Attack:
    """Mean − z standard deviations of the cohort's deltas, number by number.

    Source: Baruch et al., arXiv:1902.06156.
    """

    def delta(trained: Trained, rng: np.random.Generator) -> np.ndarray:
        cohort = np.concatenate([trained.honest, trained.hostile])
        far = alie_z(len(cohort), len(trained.hostile)) if z is None else z
        return cohort.mean(axis=0) - far * cohort.std(axis=0)

    return Attack(delta)


def _ipm(epsilon: float) -> Attack:
    """−ε times the honest clients' mean; of a tensor that none of them trains, the hostile ones'.

    Source: Xie et al., inner product manipulation, arXiv:1903.03936.
    """

    def delta(trained: Trained, rng: np.random.Generator) -> np.ndarray:
        seen = trained.honest if len(trained.honest) else trained.hostile
        return -epsilon * seen.mean(axis=0)

    return Attack(delta)


def _gaussian(sigma: float) -> Attack:
    """N(0, σ²) in place of every number of the delta.

    Source: Blanchard et al., NeurIPS 2017, arXiv:1703.02757.
    """
    return Attack(lambda trained, rng: rng.normal(0, sigma, trained.own.shape))


_OF_A_NUMBER: dict[str, Callable[[float], Attack]] = {
    "sign_flip": _sign_flip,
    "alie": _alie,
    "ipm": _ipm,
    "gaussian": _gaussian,
}
_PLAIN = {
    "alie": _alie(),
    "nan": Attack(
        delta=lambda trained, rng: np.full_like(trained.own, np.nan),
        statistic=lambda value, role: np.full_like(value, np.nan),
    ),
    "label_flip": Attack(flips_labels=True),
}


def _number(spec: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ConfigError(
            f"attack {spec!r} needs a number above 0 behind the colon, got {text!r}; known: {FORMS}"
        )
    return number


def _stack(name: str, shape: tuple[int, ...], updates: Sequence[Arrays]) -> np.ndarray:
    """(those that have the tensor, …) float64."""
    rows = [update[name] for update in updates if name in update]
    return np.array(rows, np.float64).reshape((len(rows), *shape))
