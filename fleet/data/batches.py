"""From images to the batches a model takes."""

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image

from fleet.data.images import ImageData
from fleet.errors import ConfigError


class Preprocessing(Protocol):
    """What the pretrained weights expect of an image."""

    image_size: int  # pixels, both sides
    mean: tuple[float, float, float]  # of channels in [0, 1]
    std: tuple[float, float, float]
    interpolation: Literal["bilinear", "bicubic"]


def to_tensor(image: Image.Image, preprocessing: Preprocessing) -> torch.Tensor:
    """Resize to the square, scale to [0, 1], subtract the mean, divide by the deviation.

    Returns:
        (3, S, S) float32.

    Raises:
        ConfigError: for an interpolation other than bilinear and bicubic.
    """
    if preprocessing.interpolation not in ("bilinear", "bicubic"):
        raise ConfigError(
            f"interpolation {preprocessing.interpolation!r} is unknown; use bilinear or bicubic"
        )
    resample = Image.Resampling[preprocessing.interpolation.upper()]
    size = (preprocessing.image_size, preprocessing.image_size)
    # A copy: PIL lends read-only memory, which torch warns about.
    pixels = np.array(image.convert("RGB").resize(size, resample))
    scaled = torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32).div_(255)
    mean = torch.tensor(preprocessing.mean).view(3, 1, 1)
    std = torch.tensor(preprocessing.std).view(3, 1, 1)
    return scaled.sub_(mean).div_(std)


class ImageBatches:
    """Batches of a data set, decoded as they are asked for.

    Each iteration yields (images, labels): (N, 3, S, S) float32 in channels_last
    and (N,) int64, in batches of `batch_positions`.

    Raises:
        ConfigError: for a batch size below 1.
    """

    def __init__(
        self,
        data: ImageData,
        preprocessing: Preprocessing,
        batch_size: int,
        order: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        self._data = data
        self._preprocessing = preprocessing
        self._parts = batch_positions(len(data), batch_size, order)

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for part in self._parts:
            yield self._batch(part)

    def _batch(self, part: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        size = self._preprocessing.image_size
        images = torch.empty(len(part), 3, size, size, memory_format=torch.channels_last)
        for row, position in enumerate(part):
            images[row] = to_tensor(self._data.read(int(position)), self._preprocessing)
        return images, torch.from_numpy(self._data.labels[part])


def batch_positions(
    length: int, batch_size: int, order: Sequence[int] | np.ndarray | None = None
) -> list[np.ndarray]:
    """Which examples make up each batch.

    Batches differ by one example at most, so that the last one does not spoil
    batch-norm statistics. None has a single example unless there is only one or
    `batch_size` is 1; for that, an odd number of examples at `batch_size` 2
    makes one batch of 3.

    Args:
        length: examples there are.
        batch_size: examples a batch.
        order: positions to visit, in order; None: all, as they come.

    Returns:
        (N,) int64 positions of each batch.

    Raises:
        ConfigError: for a batch size below 1.
    """
    if batch_size < 1:
        raise ConfigError(f"batch-size must be at least 1, got {batch_size}")
    order = np.arange(length) if order is None else np.array(order, dtype=np.int64)
    if not len(order):
        return []
    batches = -(-len(order) // batch_size)
    if batch_size > 1:
        batches = min(batches, max(1, len(order) // 2))
    return np.array_split(order, batches)


def visiting_order(labels: np.ndarray, sampler: str, rng: np.random.Generator) -> np.ndarray:
    """In which order an epoch visits the examples.

    Args:
        labels: (N,) of all examples.
        sampler: `shuffled` visits each once; `balanced` draws N with
            replacement, so that each class there is comes up equally likely,
            and so does each example of a class.
        rng: what is drawn from.

    Returns:
        (N,) int64 positions.
    """
    if sampler == "shuffled":
        return rng.permutation(len(labels))
    by_class = np.argsort(labels, kind="stable")
    _, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    classes = rng.integers(len(counts), size=len(labels))
    return by_class[starts[classes] + rng.integers(counts[classes])]
