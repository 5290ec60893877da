"""The geometric median of updates, or of the means of small buckets of them."""

import hashlib
from collections.abc import Sequence

import numpy as np

from fleet.errors import ConfigError
from fleet.state import ClientUpdate
from strategies.aggregation.by_group import Group, combine_by_group
from strategies.aggregation.coordinatewise import median_statistics
from strategies.aggregation.protocol import Aggregate, Rule, RuleState


def geometric_median(
    bucket_size: int = 1,
    *,
    smoothing: float = 1e-6,
    iterations: int = 1000,
    tolerance: float = 1e-10,
    seed: int = 0,
) -> Rule:
    """The point whose distances to all updates sum up to the least.

    Found by smoothed Weiszfeld steps, z ← Σ x/max(ν, ‖x − z‖) / Σ 1/max(ν, ‖x − z‖), from
    z = 0, the model as it was, from which no client can draw it far. The paper starts at
    the mean and takes three steps, each of which costs its protocol a round of messages.
    Here z is always a mean of the updates with some weights, so that distances follow from
    inner products, and steps until it rests cost next to nothing: the updates are read
    twice, whatever the number of steps. One voice a client; the paper's are weighted by
    examples. It withstands less than half of the clients. The statistics are the clients'
    medians.

    **Buckets.** With a bucket size s above 1 clients are shuffled and the median is of the
    means of s of them each. Where clients' data differ, honest updates differ too, and
    robust rules mistake the rare ones for hostile; bucket means differ less. In return
    only 1/(2s) of the clients may be hostile. Where few train a tensor, s is lowered until
    there are three buckets. The shuffle depends on seed, round and the clients' names.

    Args:
        bucket_size: s; 1 shuffles nothing.
        smoothing: ν, a length: closer than that, x weighs no more.
        iterations: most steps that are taken.
        tolerance: most that weights move in the last step.
        seed: of the shuffles.

    Raises:
        ConfigError: if the bucket size is not a whole number of at least 1.

    State: `round`, how many rounds it has aggregated.

    Source: Pillutla et al., arXiv:1912.13445, algorithm 2; Karimireddy et al.,
    arXiv:2006.09365, algorithm 1.
    """
    if not isinstance(bucket_size, int) or bucket_size < 1:
        raise ConfigError(
            f"geometric_median's bucket size must be a whole number of at least 1, "
            f"got {bucket_size}"
        )

    def aggregate(updates: Sequence[ClientUpdate], state: RuleState) -> tuple[Aggregate, RuleState]:
        def weigh(group: Group) -> np.ndarray:
            names = [update.client for update in group.trainers]
            buckets = _buckets(names, bucket_size, seed, state["round"])
            products = buckets @ group.inner_products() @ buckets.T
            return weiszfeld(products, smoothing, iterations, tolerance) @ buckets

        return combine_by_group(updates, weigh, median_statistics), {"round": state["round"] + 1}

    return Rule(lambda: {"round": 0}, aggregate)


def weiszfeld(
    products: np.ndarray, smoothing: float, iterations: int, tolerance: float
) -> np.ndarray:
    """Weights whose mean of the vectors is their smoothed geometric median.

    Args:
        products: (n, n) inner products of the vectors.

    Returns:
        (n,) weights that sum up to 1.
    """
    squares, weights = np.diag(products), np.zeros(len(products))
    for _ in range(iterations):
        along = products @ weights
        distances = np.sqrt(np.maximum(squares - 2 * along + weights @ along, 0.0))
        closeness = 1 / np.maximum(distances, smoothing)
        before, weights = weights, closeness / closeness.sum()
        if np.abs(weights - before).max() <= tolerance:
            break
    return weights


def _buckets(names: Sequence[str], size: int, seed: int, server_round: int) -> np.ndarray:
    """(buckets, n) weights of which each row is the mean of one bucket.

    Clients are ordered by a hash of seed, round and name: an order that needs no more than
    the names, and is the same for those that two groups share.
    """
    n = len(names)
    size = max(1, min(size, n // 3))
    if size == 1:
        return np.eye(n)
    order = sorted(range(n), key=lambda i: _hash(f"{seed}/{server_round}/{names[i]}"))
    buckets = np.zeros((-(-n // size), n))
    for place, i in enumerate(order):
        buckets[place // size, i] = 1
    return buckets / buckets.sum(axis=1, keepdims=True)


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
