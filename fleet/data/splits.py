"""Stratified draws: held-out tests, validation sets and smaller runs."""

from collections.abc import Mapping
from typing import Literal, TypeVar

import numpy as np

from fleet.data.images import ImageData
from fleet.errors import ConfigError

Split = Literal["train", "test"]
TEST_NAMES = ("test", "validation", "valid", "val")  # the first that a source has

# Not the run's seed: all runs are measured on the same held-out images.
HELD_OUT_SEED = 20230207
HELD_OUT_FRACTION = 0.2

T = TypeVar("T")


def split_validation(data: ImageData, fraction: float, seed: int) -> tuple[ImageData, ImageData]:
    """Split into training and validation, stratified as far as it goes.

    Every class keeps an example for training, so a class of one, and with it a
    small data set, may give fewer to validation than `fraction`.

    Raises:
        ConfigError: for a fraction outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"validation-fraction must be in [0, 1), got {fraction}")
    count = round(fraction * len(data))
    chosen = draw_stratified(data.labels, count, seed, leave=1)
    return data.subset(_others(len(data), chosen)), data.subset(chosen)


def held_out(data: ImageData, split: Split) -> ImageData:
    """One side of the fixed 80 / 20 split of a source that has no test set."""
    train, test = split_validation(data, HELD_OUT_FRACTION, HELD_OUT_SEED)
    return train if split == "train" else test


def take_stratified(data: ImageData, count: int, seed: int) -> ImageData:
    """A stratified subset of `count` examples.

    Raises:
        ConfigError: if there are fewer.
    """
    if count > len(data):
        raise ConfigError(
            f"a limit of {count} examples exceeds the {len(data)} of {data.name}; "
            f"lower the limit, or set it to 0 for all"
        )
    return data.subset(draw_stratified(data.labels, count, seed))


def choose_split(splits: Mapping[str, T], split: Split, source: str) -> tuple[T, bool]:
    """The part of a source that serves as `split`.

    Args:
        splits: what the source has, by the names train, test, validation, …

    Returns:
        That part, and whether it still has to be cut into training and test.

    Raises:
        ConfigError: if the source has no training part.
    """
    if "train" not in splits:
        raise ConfigError(f"{source} has no split named train, only {', '.join(splits) or 'none'}")
    test = next((name for name in TEST_NAMES if name in splits), None)
    if test is None:
        return splits["train"], True
    return splits["train" if split == "train" else test], False


def draw_stratified(labels: np.ndarray, count: int, seed: int, leave: int = 0) -> np.ndarray:
    """Draw `count` positions in proportion to the classes, by largest remainder.

    Args:
        labels: (N,) int64.
        leave: at least so many of each class are not drawn; then fewer than
            `count` may come back.

    Returns:
        (count,) sorted positions.
    """
    rng = np.random.default_rng(seed)
    classes, sizes = np.unique(labels, return_counts=True)
    quotas, remainders = np.divmod(sizes * count, max(1, len(labels)))
    quotas = np.minimum(quotas, sizes - leave)
    ties = rng.permutation(len(classes))  # equal remainders: chance decides, not the class number
    by_remainder = ties[np.argsort(-remainders[ties], kind="stable")]
    open_classes = [c for c in by_remainder if quotas[c] < sizes[c] - leave and remainders[c]]
    quotas[open_classes[: count - quotas.sum()]] += 1
    drawn = [
        rng.permutation(np.flatnonzero(labels == label))[:quota]
        for label, quota in zip(classes, quotas, strict=True)
    ]
    return np.sort(np.concatenate([*drawn, np.empty(0, np.int64)])).astype(np.int64)


def _others(length: int, chosen: np.ndarray) -> np.ndarray:
    return np.setdiff1d(np.arange(length), chosen)
