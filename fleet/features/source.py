"""A data set as the trained half of a model sees it: through the frozen half, or from a cache."""

import hashlib
import json
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fleet.backbones import Preprocessing, digest_of
from fleet.config import FeatureConfig
from fleet.data import ImageData, batch_positions, to_tensor, view_of
from fleet.data.images import identity_of
from fleet.features.cache import FeatureCache
from fleet.mobiletl import TransferModel
from fleet.mobiletl.chunks import chunks, room
from fleet.mobiletl.prefix import MICRO_BATCH
from fleet.paths import expanded

_FORMAT = 1  # raised when the same key would mean other features


class FeatureSource:
    """Batches of what a model's frozen half makes of images.

    Images are decoded and run a couple at a time: no batch of images is ever
    held, only their features. With a cache an image that was seen before is
    neither decoded nor run, and its features are rounded as the cache rounds
    them, whether they come from disk or not: a run's result does not depend on
    what is in the cache.

    Args:
        model: its `features` are what the batches hold; nothing is cached if
            no block is frozen.
        data: the images.
        preprocessing: the backbone's.
        config: cache and augmentation; None: neither.
    """

    def __init__(
        self,
        model: TransferModel,
        data: ImageData,
        preprocessing: Preprocessing,
        config: FeatureConfig | None = None,
    ) -> None:
        self._model = model
        self._data = data
        self._preprocessing = preprocessing
        self._config = config
        self._device = next(model.parameters()).device
        self._identities: dict[int, bytes] = {}  # position → identity, read once
        self._read: dict[int, Image.Image] = {}  # of this batch, to tell their identity

    def batches(
        self,
        batch_size: int,
        order: Sequence[int] | np.ndarray | None = None,
        views: np.ndarray | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Features and labels, batch after batch; batches differ by one example at most.

        Args:
            batch_size: examples.
            order: positions to visit, in order; None: all, as they come.
            views: (len(data),) which augmented view of each image; None: 0 of
                all, which is the image itself.

        Yields:
            (N, …) float32 and (N,) int64, both on the model's device.
        """
        views = np.zeros(len(self._data), np.int64) if views is None else views
        with self._open_cache() as cache:
            for positions in batch_positions(len(self._data), batch_size, order):
                labels = torch.from_numpy(self._data.labels[positions])
                yield self._batch(positions, views, cache), labels.to(self._device)

    @property
    def caches(self) -> bool:
        """Whether features are kept."""
        config = self._config
        return config is not None and config.cache != "off" and self._model.freezes_blocks

    def make_blank(self, length: int) -> None:
        """Make a couple of blank images' features, the way that missing ones take in a batch.

        What a batch takes in memory of which the cache holds nothing is measured so;
        nothing is kept of it. Only where `caches`.

        Args:
            length: images in the batch.
        """
        size = self._preprocessing.image_size
        with self._open_cache() as cache:
            x, found = cache.read([bytes(16)] * length)
            x = x.to(self._device)
            rows = np.flatnonzero(~found.numpy())[:MICRO_BATCH]
            images = torch.zeros(len(rows), 3, size, size)
            images = images.to(self._device, memory_format=torch.channels_last)
            x[rows] = cache.round_trip(self._model.features(images))

    def _batch(
        self, positions: np.ndarray, views: np.ndarray, cache: FeatureCache | None
    ) -> Tensor:
        if cache is None:
            return run_in_parts(
                self._model.features,
                len(positions),
                lambda part: self._images(positions[part], views),
            )
        ids = [self._row_id(int(position), int(views[position])) for position in positions]
        x, found = cache.read(ids)
        x = x.to(self._device)
        missing = np.flatnonzero(~found.numpy())
        for part in chunks(len(missing), MICRO_BATCH):
            rows = missing[part]
            made = self._model.features(self._images(positions[rows], views))
            cache.write([ids[row] for row in rows], made)
            x[rows] = cache.round_trip(made)
            del made  # before the next are
        self._read.clear()
        return x

    def _images(self, positions: np.ndarray, views: np.ndarray) -> Tensor:
        """Images (N, 3, S, S) in channels_last, on the model's device."""
        size = self._preprocessing.image_size
        images = torch.empty(len(positions), 3, size, size, memory_format=torch.channels_last)
        for row, position in enumerate(positions):
            images[row] = self._image(int(position), int(views[position]))
        return images.to(self._device)

    def _image(self, position: int, view: int) -> Tensor:
        image = self._read.pop(position, None) or self._data.read(position)
        if view:
            image = view_of(image, self._config.augmentation, self._identity(position), view)
        return to_tensor(image, self._preprocessing)

    def _row_id(self, position: int, view: int) -> bytes:
        identity = self._identity(position)
        if not view:
            return identity
        about = f"{self._config.augmentation} {view}".encode()
        return hashlib.blake2b(identity + about, digest_size=16).digest()

    def _identity(self, position: int) -> bytes:
        if position not in self._identities:
            if self._data.identify is None:
                # What is cached must be what was identified: a second reading may differ,
                # as of a data set that transforms at random.
                self._read[position] = self._data.read(position)
                self._identities[position] = identity_of(self._read[position])
            else:
                self._identities[position] = self._data.identity(position)
        return self._identities[position]

    def _open_cache(self) -> FeatureCache | nullcontext[None]:
        if not self.caches:
            return nullcontext()
        config = self._config
        shape = self._model.features_shape(self._preprocessing.image_size)
        limit = round(config.cache_mib * 2**20)
        return FeatureCache(cache_directory(config), self._key, shape, config.cache, limit)

    @cached_property
    def _key(self) -> str:
        return features_key(self._model, self._preprocessing)


def run_in_parts(
    features: Callable[[Tensor], Tensor], length: int, images: Callable[[slice], Tensor]
) -> Tensor:
    """A batch's features, its images asked for a couple at a time.

    Args:
        features: as `TransferModel.features`.
        length: N, images in the batch.
        images: a part of the batch → its images (n, 3, S, S).

    Returns:
        (N, …) as `features` gives them.
    """
    made = None
    for part in chunks(length, MICRO_BATCH):
        y = features(images(part))
        made = room(y, length) if made is None else made
        made[part] = y
    return made


def cache_directory(config: FeatureConfig) -> Path:
    """Where features lie: the setting, else $FLEET_CACHE, else the user's cache."""
    named = config.cache_dir or os.environ.get("FLEET_CACHE") or "~/.cache/fleet/features"
    return expanded(named, "cache-dir")


def features_key(model: TransferModel, preprocessing: Preprocessing) -> str:
    """SHA-256 over all that decides an image's features: weights as they are now, and structure.

    Weights are read again where PyTorch has counted a change of theirs since the last time;
    of one by way of `tensor.data` or NumPy it counts none.
    """
    steps = [
        (step.name, repr(step.module), _digest_now(step.module) if step.module else "")
        for step in model.frozen_steps
    ]
    facts = {"format": _FORMAT, "preprocessing": asdict(preprocessing), "steps": steps}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


# Step → its tensors as it was read, each with place and number of changes, and its digest. A
# simulation asks for that of one frozen half for every client and round.
_READ: weakref.WeakKeyDictionary[nn.Module, tuple[list[tuple], str]] = weakref.WeakKeyDictionary()


def _digest_now(module: nn.Module) -> str:
    tensors = list(module.state_dict(keep_vars=True).values())
    if any(tensor.is_inference() for tensor in tensors):  # whose changes are not counted
        return digest_of(module)
    if module not in _READ or not _unchanged(_READ[module][0], tensors):
        now = [(weakref.ref(t), t.data_ptr(), t._version) for t in tensors]
        _READ[module] = now, digest_of(module)
    return _READ[module][1]


def _unchanged(before: Sequence[tuple], tensors: Sequence[Tensor]) -> bool:
    return len(before) == len(tensors) and all(
        seen() is t and (place, changes) == (t.data_ptr(), t._version)
        for (seen, place, changes), t in zip(before, tensors, strict=True)
    )
