"""Rules that pick clients whose updates lie close to many others: Krum and Multi-Krum."""

from collections.abc import Sequence

import numpy as np

from fleet.errors import ConfigError
from fleet.state import ClientUpdate
from strategies.aggregation.by_group import Group, combine_by_group, squared_distances
from strategies.aggregation.coordinatewise import median_statistics
from strategies.aggregation.protocol import Aggregate, Rule, stateless


def krum(hostile: int) -> Rule:
    """The one update whose nearest neighbours are nearest; Multi-Krum that selects one.

    Args:
        hostile: how many clients of a cohort may be hostile, the paper's f.

    Raises:
        ConfigError: if it is not a whole number of at least 0.

    Source: Blanchard et al., NeurIPS 2017 (arXiv:1703.02757), section 4.
    """
    return multi_krum(hostile, selected=1)


def multi_krum(hostile: int, *, selected: int | None = None) -> Rule:
    """Mean of the updates whose nearest neighbours are nearest.

    A client's score is the sum of squared distances to its n − f − 2 nearest others; the
    lowest scores are selected and averaged, one voice a client (Flower weighs the selected
    by examples). Ties go by name. The selection is made over each set of tensors that the
    same clients trained, see `by_group`. The statistics are all trainers' medians.

    The guarantee needs n ≥ 2f + 3, and a run that never has so many updates is refused.
    Where fewer trained a tensor, f is lowered to the most that their number allows,
    (n − 3)/2; a quorum of 2f + 3 leaves such tensors as they are.

    Args:
        hostile: how many clients of a cohort may be hostile, the paper's f.
        selected: how many to average; None takes n − f, as the paper's experiments do.

    Raises:
        ConfigError: if either is not a whole number, hostile of at least 0, selected of 1.

    Source: Blanchard et al., NeurIPS 2017 (arXiv:1703.02757), sections 4 and 5.
    """
    name = "krum" if selected == 1 else "multi_krum"
    if not isinstance(hostile, int) or hostile < 0:
        raise ConfigError(
            f"{name}'s number of hostile clients must be a whole number of at least 0, "
            f"got {hostile}"
        )
    if selected is not None and (not isinstance(selected, int) or selected < 1):
        raise ConfigError(f"multi_krum must select a whole number of clients, got {selected}")

    def weigh(group: Group) -> np.ndarray:
        n = len(group.trainers)
        if n == 1:
            return np.ones(1)
        f = min(hostile, max(0, (n - 3) // 2))
        scores = _scores(squared_distances(group.inner_products()), f)
        best = np.argsort(scores, kind="stable")[: selected or n - f]
        weights = np.zeros(n)
        weights[best] = 1 / len(best)
        return weights

    def aggregate(updates: Sequence[ClientUpdate]) -> Aggregate:
        return combine_by_group(updates, weigh, median_statistics)

    return stateless(aggregate, least_clients=2 * hostile + 3 if hostile else 1)


def _scores(distances: np.ndarray, f: int) -> np.ndarray:
    """(n,) sums of the n − f − 2 smallest squared distances to others, at least one."""
    n = len(distances)
    others = distances[~np.eye(n, dtype=bool)].reshape(n, n - 1)
    return np.sort(others, axis=1)[:, : max(1, n - f - 2)].sum(axis=1)
