"""Which client holds which examples: Flower's partitioners, made safe for any run."""

import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from fleet.data.images import found, need
from fleet.errors import ConfigError

FORMS = "iid, dirichlet:ALPHA (as dirichlet:0.5), classes:N (as classes:2)"

_PARTITIONERS = "flwr_datasets.partitioner"
# Flower redraws a Dirichlet partition ten times, which leaves small alphas to luck.
DIRICHLET_SEEDS = 10


def partition(
    labels: Sequence[int] | np.ndarray, spec: str, num_partitions: int, seed: int
) -> list[np.ndarray]:
    """Deal the examples out to clients.

    Args:
        labels: (N,) int64.
        spec: `iid`: sizes differ by one at most. `dirichlet:ALPHA`: for each class,
            shares drawn from Dirichlet(ALPHA); every client gets a minimum, of 10
            where that is at most half the mean and the draw allows it, else down
            to 2. `classes:N`: each client holds N classes, in turn from a shuffled
            list; with too few clients for that to reach all classes, disjoint
            groups of at most N.

    Returns:
        `num_partitions` arrays of sorted int64 positions, none empty, each position
        in exactly one. The same arguments give the same arrays.

    Raises:
        ConfigError: for an unknown spec, a bad value, or one that these labels and
            this number of clients do not allow.
    """
    labels = np.asarray(labels, dtype=np.int64)
    if num_partitions < 1:
        raise ConfigError(f"clients must be at least 1, got {num_partitions}")
    if len(labels) < num_partitions:
        raise ConfigError(
            f"{len(labels)} examples cannot be dealt out to {num_partitions} clients; "
            f"use fewer clients or more examples"
        )
    kind, number = _read(spec)
    if kind == "iid":
        return _iid(labels, num_partitions, seed)
    if kind == "dirichlet":
        return _dirichlet(labels, number, num_partitions, seed)
    return _classes(labels, number, num_partitions, seed)


def check_partition(spec: str) -> None:
    """Refuse what is of no known form, whatever the data.

    Raises:
        ConfigError: naming the forms.
    """
    _read(spec)


def _read(spec: str) -> tuple[str, Any]:
    """The kind of a partition and its number; iid has none."""
    kind, _, value = spec.partition(":")
    if spec == "iid":
        return kind, None
    if kind == "dirichlet":
        return kind, _number(spec, value, float)
    if kind == "classes":
        return kind, _number(spec, value, int)
    raise ConfigError(f"partition {spec!r} is unknown; known: {FORMS}")


def _number(spec: str, value: str, kind: Callable[[str], Any]) -> Any:
    noun = "alpha, a number" if kind is float else "N, a whole number"
    try:
        number = kind(value)
    except ValueError:
        number = 0
    if not 0 < number < np.inf:
        raise ConfigError(f"partition {spec!r} needs {noun} above 0, got {value!r}; known: {FORMS}")
    return number


def _partitioners() -> ModuleType:
    """Flower's partitioners, without the rest of their package.

    That rest draws and measures partitions: with Matplotlib, seaborn, SciPy and pandas it takes
    longer to import than a small run takes. So while they are imported their package is one
    that has nothing in it; whoever asks for it afterwards gets the real one.
    """
    package, _, _ = _PARTITIONERS.partition(".")
    if package in sys.modules:
        return need(_PARTITIONERS, "a partition")
    empty = ModuleType(package)
    empty.__path__ = [str(found(package, "a partition"))]
    sys.modules[package] = empty
    try:
        return need(_PARTITIONERS, "a partition")
    finally:
        del sys.modules[package]


def _iid(labels: np.ndarray, num_partitions: int, seed: int) -> list[np.ndarray]:
    flower = _partitioners()
    # Flower's partitioner cuts the rows as they lie, and folders lie sorted by class.
    order = np.random.default_rng(seed).permutation(len(labels))
    return _deal(flower.IidPartitioner(num_partitions), order, labels[order])


def _dirichlet(
    labels: np.ndarray, alpha: float, num_partitions: int, seed: int
) -> list[np.ndarray]:
    flower = _partitioners()
    wanted = max(2, min(10, len(labels) // (2 * num_partitions)))
    for minimum in sorted({wanted, (wanted + 2) // 2, 2}, reverse=True):
        for attempt in range(DIRICHLET_SEEDS):
            partitioner = flower.DirichletPartitioner(
                num_partitions,
                "label",
                alpha,
                min_partition_size=minimum,
                seed=seed + (attempt << 32),  # the first draw is Flower's own for this seed
            )
            try:
                return _deal(partitioner, np.arange(len(labels)), labels)
            except ValueError as error:
                last = error
    raise ConfigError(
        f"dirichlet:{alpha:g} over {num_partitions} clients and {len(labels)} examples leaves a "
        f"client with fewer than 2 at every draw; raise alpha, or use fewer clients or more "
        f"examples"
    ) from last


def _classes(
    labels: np.ndarray, per_client: int, num_partitions: int, seed: int
) -> list[np.ndarray]:
    flower = _partitioners()
    names, sizes = np.unique(labels, return_counts=True)
    groups = _class_groups(len(names), per_client, num_partitions, seed)
    per_client = per_client if len(set(groups)) == len(names) else 1
    _check_enough(names, sizes, groups, per_client, num_partitions)
    # "deterministic" deals in turn and so reaches every class; Flower's default draws
    # at random and drops the examples of the classes that nobody drew.
    partitioner = flower.PathologicalPartitioner(
        num_partitions, "label", per_client, class_assignment_mode="deterministic", seed=seed
    )
    # In chance order: it cuts a class, or a group of them, as the rows lie.
    order = np.random.default_rng(seed).permutation(len(labels))
    return _deal(partitioner, order, groups[np.searchsorted(names, labels)][order])


def _class_groups(num_classes: int, per_client: int, num_partitions: int, seed: int) -> np.ndarray:
    """(C,) place of each class in the shuffled list, or its group when clients are too few."""
    if per_client > num_classes:
        raise ConfigError(
            f"partition classes:{per_client} asks for more classes than the {num_classes} of the "
            f"data; use classes:{num_classes} or fewer"
        )
    if per_client * num_partitions < num_classes:
        raise ConfigError(
            f"partition classes:{per_client} over {num_partitions} clients reaches at most "
            f"{per_client * num_partitions} of {num_classes} classes; use "
            f"classes:{-(-num_classes // num_partitions)} or more clients"
        )
    places = np.random.default_rng(seed).permutation(num_classes)
    # Client i holds places i to i + N - 1, so P clients reach P + N - 1 of them.
    if num_partitions + per_client - 1 >= num_classes:
        return places
    num_groups = -(-num_classes // per_client)
    return places * num_groups // num_classes


def _check_enough(
    names: np.ndarray,
    sizes: np.ndarray,
    groups: np.ndarray,
    per_client: int,
    num_partitions: int,
) -> None:
    num_groups = groups.max() + 1
    held = (np.arange(num_partitions)[:, None] + np.arange(per_client)) % num_groups
    holders = np.bincount(held.ravel(), minlength=num_groups)[groups]
    group_sizes = np.bincount(groups, weights=sizes).astype(int)[groups]
    short = np.flatnonzero(group_sizes < holders)
    if len(short):
        i = short[0]
        raise ConfigError(
            f"the {group_sizes[i]} examples of class {names[i]} cannot be shared by the "
            f"{holders[i]} clients that hold it; use fewer clients, fewer classes a client or "
            f"more examples"
        )


def _deal(partitioner: Any, order: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """Run a Flower partitioner over rows that carry a label and a position, no image."""
    datasets = need("datasets", "a partition")
    partitioner.dataset = datasets.Dataset.from_dict({"label": labels, "index": order})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it counts its own redraws aloud
        parts = [
            partitioner.load_partition(i)["index"][:] for i in range(partitioner.num_partitions)
        ]
    return [np.sort(np.array(part, dtype=np.int64)) for part in parts]
