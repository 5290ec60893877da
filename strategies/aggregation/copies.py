"""Reading what many clients sent: in one order, one tensor at a time, in blocks that fit."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from fleet.errors import UpdateError
from fleet.state import Arrays, ClientUpdate

_BLOCK_BYTES = 256 * 2**20  # of all clients' coordinates held at once
_CACHE_LINE = 16  # float32 values


class Copies(Sequence[np.ndarray]):
    """One tensor of several clients, each copy read when it is asked for.

    Args:
        name: the tensor's.
        trainers: the clients, in order of their names.
        arrays_of: where in an update the tensor is.

    Raises:
        UpdateError: on reading a copy of another shape than an earlier one; numpy would
            broadcast (3,) into (4, 3) silently.
    """

    def __init__(
        self,
        name: str,
        trainers: Sequence[ClientUpdate],
        arrays_of: Callable[[ClientUpdate], Arrays] = lambda update: update.delta,
    ) -> None:
        self._name = name
        self._trainers = trainers
        self._arrays_of = arrays_of
        self._seen: tuple[str, tuple[int, ...]] | None = None  # client and shape of the first

    def __len__(self) -> int:
        return len(self._trainers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Copies(self._name, self._trainers[index], self._arrays_of)
        update = self._trainers[index]
        copy = np.asarray(self._arrays_of(update)[self._name])
        client, shape = self._seen = self._seen or (update.client, copy.shape)
        if copy.shape != shape:
            raise UpdateError(
                f"{self._name} has shape {copy.shape} from client {update.client}, "
                f"{shape} from client {client}; check updates against their plan before aggregating"
            )
        return copy

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the copies read so far, which is that of all."""
        return self._seen[1] if self._seen else self[0].shape


def in_order(updates: Sequence[ClientUpdate]) -> list[ClientUpdate]:
    """The updates sorted by client name, each fit to be weighed.

    Raises:
        UpdateError: if there is no update, a client sent two, or num_examples is below 1.
    """
    if not updates:
        raise UpdateError("no updates to aggregate; keep the old state when a round brings none")
    ordered = sorted(updates, key=lambda update: update.client)
    for update, following in pairwise(ordered):
        if update.client == following.client:
            raise UpdateError(
                f"client {update.client} sent two updates in one round; pass on one of them"
            )
    for update in ordered:
        if not update.num_examples >= 1:  # also true of NaN, unlike < 1
            raise UpdateError(
                f"client {update.client} reports {update.num_examples} examples, "
                f"a weight needs at least 1; refuse its update"
            )
    return ordered


def trainers_of(
    ordered: Sequence[ClientUpdate],
    keys_of: Callable[[ClientUpdate], Any] = lambda update: update.delta,
) -> dict[Any, list[ClientUpdate]]:
    """What `keys_of` finds in an update → the updates in which it is found."""
    trainers = {}
    for update in ordered:
        for key in keys_of(update):
            trainers.setdefault(key, []).append(update)
    return trainers


def counts_of(trainers: Sequence[ClientUpdate]) -> list[int]:
    """The clients' num_examples."""
    return [update.num_examples for update in trainers]


def weighted_sum(copies: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Σ w·x as a running sum in float64, one further copy at a time.

    What weighs exactly 0 is not read, unless all do.
    """
    total = term = None
    for i, weight in enumerate(weights):
        if weight == 0 and (total is not None or any(weights)):
            continue
        copy = copies[i]
        if total is None:
            total, term = np.zeros(copy.shape), np.empty(copy.shape)
        # Through the scratch array: numpy would cast a float32 operand in small pieces.
        term[...] = copy
        term *= float(weight)
        total += term
    return total


def average(copies: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Weighted mean in float64; summing w·x and dividing once leaves a lone copy exact."""
    return np.asarray(weighted_sum(copies, weights) / float(sum(weights)))


def blocks(copies: Sequence[np.ndarray]) -> Iterator[tuple[slice, np.ndarray]]:
    """All copies of a tensor side by side, as many coordinates at a time as fit.

    A tensor is read once if all its copies together fit, else once a block.

    Args:
        copies: n arrays of one shape.

    Yields:
        Which coordinates of the flattened tensor, and their (n, w) values, float32 if all
        copies are. The array is used again for the next block.
    """
    buffer = None
    start, size = 0, None
    while size is None or start < size:
        for i, copy in enumerate(copies):
            flat = copy.reshape(-1)
            if buffer is None:
                size = flat.size
                buffer = _buffer(len(copies), size, np.result_type(flat.dtype, np.float32))
            elif not np.can_cast(flat.dtype, buffer.dtype):
                buffer = buffer.astype(np.float64)
            part = flat[start : start + buffer.shape[1]]
            buffer[i, : part.size] = part
        stop = min(start + buffer.shape[1], size)
        yield slice(start, stop), buffer[:, : stop - start]
        start = max(stop, 1)


def _buffer(rows: int, size: int, dtype: np.dtype) -> np.ndarray:
    """(rows, up to size) values of which a column is read fast.

    Rows lie an odd number of cache lines apart: at a power of two, the values of a column
    would all compete for the same few places in the processor's cache.
    """
    width = min(size, max(1, _BLOCK_BYTES // (rows * dtype.itemsize)))
    lines = -(-width // _CACHE_LINE)
    return np.empty((rows, (lines | 1) * _CACHE_LINE), dtype)[:, :width]
