"""Rules that weigh clients by whole vectors: norms, distances, inner products.

Under unequal plans clients' vectors have different lengths and cannot be compared.
So the tensors are parted by the set of clients that trained them, and every part,
a group, is aggregated on its own over vectors of one length. With equal plans there
is one group, and what comes out is the published rule on the whole vector.

A group that is small gives less protection than the cohort: whatever the rule, a
client alone with a tensor decides it. The run's quorum sets how many there must be.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fleet.state import ClientUpdate
from strategies.aggregation.copies import Copies, blocks, in_order, trainers_of, weighted_sum
from strategies.aggregation.protocol import Aggregate
from strategies.aggregation.statistics import Pool, combine_statistics

Squares = Mapping[str, Mapping[str, float]]  # client → tensor → squared norm of its delta

_COLUMNS = 4096  # of float64 values multiplied at a time


@dataclass(frozen=True)
class Group:
    """Tensors that the same clients trained.

    Attributes:
        trainers: the clients, in order of their names.
        names: the tensors.
    """

    trainers: tuple[ClientUpdate, ...]
    names: tuple[str, ...]

    def copies(self, name: str) -> Copies:
        """The clients' copies of one of the tensors."""
        return Copies(name, self.trainers)

    def norms(self, squares: Squares) -> np.ndarray:
        """(n,) Euclidean norms of the clients' vectors."""
        sums = [sum(squares[update.client][n] for n in self.names) for update in self.trainers]
        return np.sqrt(np.array(sums))

    def products_with(self, weights: np.ndarray) -> np.ndarray:
        """(n,) inner products of the clients' vectors with Σ w·x, accumulated in float64."""
        products = np.zeros(len(self.trainers))
        for name in self.names:
            for part in _parts(self.copies(name)):
                products += part @ (weights @ part)
        return products

    def inner_products(self) -> np.ndarray:
        """(n, n) inner products of the clients' vectors, accumulated in float64."""
        products = np.zeros((len(self.trainers),) * 2)
        for name in self.names:
            for part in _parts(self.copies(name)):
                products += part @ part.T
        return products


def squared_norms(ordered: Sequence[ClientUpdate]) -> Squares:
    """The squared Euclidean norm of every tensor of every client, in float64."""
    squares = {update.client: {} for update in ordered}
    for name, trainers in trainers_of(ordered).items():
        for update, copy in zip(trainers, Copies(name, trainers), strict=True):
            flat = copy.reshape(-1).astype(np.float64)
            squares[update.client][name] = float(flat @ flat)
    return squares


def groups_of(ordered: Sequence[ClientUpdate]) -> list[Group]:
    """The updates' tensors, parted by who trained them."""
    names = {}
    by_client = {update.client: update for update in ordered}
    for name, trainers in trainers_of(ordered).items():
        names.setdefault(tuple(update.client for update in trainers), []).append(name)
    return [
        Group(tuple(by_client[client] for client in clients), tuple(of_group))
        for clients, of_group in names.items()
    ]


def combine_by_group(
    updates: Sequence[ClientUpdate], weigh: Callable[[Group], Sequence[float]], pool: Pool
) -> Aggregate:
    """Every tensor as Σ w·x, with the weights that `weigh` gives its group's clients.

    Args:
        updates: at most one per client, in any order.
        weigh: group → a weight for each of its clients; a client of weight 0 is not read.
        pool: combines the running statistics, over all who sent them.

    Raises:
        UpdateError: as `combine_by_tensor`.
    """
    ordered = in_order(updates)
    delta, coverage = {}, {}
    for group in groups_of(ordered):
        weights = weigh(group)
        for name in group.names:
            delta[name] = weighted_sum(group.copies(name), weights)
            coverage[name] = len(group.trainers)
    statistics, counted = combine_statistics(ordered, pool)
    return Aggregate(delta, statistics, coverage | counted)


def squared_distances(products: np.ndarray) -> np.ndarray:
    """‖x − y‖² of every pair, from inner products: (n, n) → (n, n).

    ‖x‖² + ‖y‖² − 2⟨x, y⟩ loses digits where vectors are long and lie close together. Here
    they are deltas, not whole models, and the products are in float64: two updates that
    share all but a thousandth of their length keep ten digits.
    """
    squares = np.diag(products)
    distances = squares[:, None] + squares[None, :] - 2 * products
    np.fill_diagonal(distances, 0.0)
    return np.maximum(distances, 0.0)


def _parts(copies: Copies) -> Iterator[np.ndarray]:
    """One tensor's copies side by side in float64, (n, at most `_COLUMNS`) at a time.

    A generator, so that a tensor's last block is gone before the next one's is made.
    """
    for _, block in blocks(copies):
        for start in range(0, block.shape[1], _COLUMNS):
            yield block[:, start : start + _COLUMNS].astype(np.float64)


def lower_median(values: np.ndarray) -> float:
    """The lower of the two middle values of an even number, the middle one of an odd.

    Halfway between the two, one of two clients could push the median as far as it likes.
    """
    middle = (len(values) - 1) // 2
    return float(np.partition(values, middle)[middle])


def clip_factors(norms: np.ndarray, bound: float) -> np.ndarray:
    """What vectors of these norms are multiplied by to be no longer than the bound."""
    factors = np.ones(len(norms))
    long = norms > bound
    factors[long] = bound / norms[long]
    return factors
