"""The local loop, shared by devices, simulations and library users."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from fleet.backbones import Preprocessing
from fleet.config import FeatureConfig, LocalConfig
from fleet.data import ImageData, batch_positions, visiting_order
from fleet.errors import ConfigError, UpdateError
from fleet.features import FeatureSource
from fleet.heap import reuse, trim
from fleet.measure import allocator_peak
from fleet.mobiletl import TransferModel
from fleet.objective import Proximal
from fleet.optim import SGD

# Model → (image size, cache, images in a batch) → bytes of `_filling_bytes`.
_FILLING: WeakKeyDictionary[TransferModel, dict[tuple[int, FeatureConfig | None, int], int]] = (
    WeakKeyDictionary()
)


@dataclass(frozen=True)
class LocalResult:
    """What a local training came to.

    Attributes:
        num_examples: images in one epoch.
        loss: mean cross-entropy over all epochs, in nats.
        peak_bytes: the most that PyTorch allocates at once, beyond the loaded
            model, in a training step whose images no cache holds yet; batch and
            momentum are among it, and the targets of a proximal term. Whether
            this step's images were cached makes no difference.
        seconds: wall time.
    """

    num_examples: int
    loss: float
    peak_bytes: int
    seconds: float


def train_locally(
    model: TransferModel,
    data: ImageData,
    preprocessing: Preprocessing,
    config: LocalConfig,
    seed: int | Sequence[int],
    features: FeatureConfig | None = None,
    on_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
    proximal: Proximal | None = None,
    before_step: Callable[[], None] = lambda: None,
    trims: bool = True,
) -> LocalResult:
    """Train what the model's plan trains; the parameters change in place.

    Args:
        model: on the CPU or any device; images follow it.
        data: at least one image.
        preprocessing: the backbone's.
        config: epochs, batch size and optimiser.
        seed: of the order of the images and their views, and of what dropout drops.
        features: cache and augmentation; None: neither.
        on_epoch: is given each epoch's number, from 0 on, and its mean loss.
        proximal: a term of the objective beside the loss; the loss that is
            reported is without it.
        before_step: is called before every step, where a device may pause; what it
            raises ends the training.
        trims: as of `take_step`, and once before the first.

    Raises:
        ConfigError: if there is no image, or a single one in a batch that is
            too little for a norm's statistics.
        UpdateError: if loss or a gradient is not finite, with step and learning
            rate. The loss's step does not touch the parameters any more, the
            gradient's may have begun to.
    """
    if not len(data):
        raise ConfigError(f"{data.name} has no training images for this client; give it some")
    model.train()
    reuse()
    if trims:
        trim()  # of what was held while the model and its state were read
    optimizer = SGD(
        model.trainable_parameters(),
        config.learning_rate,
        config.momentum,
        config.weight_decay,
        getattr(torch, config.momentum_dtype),
        **_proximal_term(model, proximal),
    )
    source = FeatureSource(model, data, preprocessing, features)
    views = features.views if features else 1
    started, losses, told = time.perf_counter(), [], 0.0

    largest, *_ = per_epoch = batch_positions(len(data), config.batch_size)
    steps = config.epochs * len(per_epoch)

    def train_on(batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        for x, labels in batches:
            before_step()
            if config.schedule == "cosine":
                optimizer.learning_rate = config.learning_rate * cosine(len(losses) / steps)
            try:
                loss = take_step(model, optimizer, x, labels, trims)
                losses.append(loss * len(labels))
            except UpdateError as error:
                raise UpdateError(
                    f"{error} at step {len(losses)} of {steps}, counted from 0, with learning rate "
                    f"{optimizer.learning_rate:.4g}; lower learning-rate"
                ) from error
            except ValueError as error:  # of batch norm: one value a channel has no variance
                if len(labels) > 1:
                    raise
                raise ConfigError(
                    f"a batch of one image of {preprocessing.image_size} pixels is too little to "
                    f"train on: {error}; raise batch-size or image-size, or give the client more "
                    f"images"
                ) from error
            del x, labels  # before the next batch is made

    def end_epoch(epoch: int) -> None:
        nonlocal told
        on_epoch(epoch, (sum(losses) - told) / len(data))
        told = sum(losses)

    # Whatever the caller has turned off, gradients are needed here.
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        batches = _epochs(source, data.labels, views, config, seed, end_epoch)
        if steps > 1:
            train_on(islice(batches, 1))
        held = optimizer.nbytes
        # One step, the first in which momentum is there: following the allocator takes a
        # few hundred bytes for every operation.
        with allocator_peak(next(model.parameters()).device) as peak:
            train_on(islice(batches, 1))
        if trims:
            trim()
        train_on(batches)
    return LocalResult(
        num_examples=len(data),
        loss=sum(losses) / (len(data) * config.epochs),
        peak_bytes=held
        + max(peak.bytes, _filling_bytes(source, model, preprocessing, features, len(largest))),
        seconds=time.perf_counter() - started,
    )


def _filling_bytes(
    source: FeatureSource,
    model: TransferModel,
    preprocessing: Preprocessing,
    features: FeatureConfig | None,
    length: int,
) -> int:
    """Allocator's peak while a batch is made of which the cache holds nothing; 0 without one.

    A device fills its cache once, in its first round. In a simulation another client or an
    earlier run has often done so, and the step that is followed only reads; so this is
    measured by itself, once for each model and size.
    """
    if not source.caches:
        return 0
    known = _FILLING.setdefault(model, {})
    about = preprocessing.image_size, features, length
    if about not in known:
        with allocator_peak(next(model.parameters()).device) as peak:
            source.make_blank(length)
        known[about] = peak.bytes
    return known[about]


def _proximal_term(model: TransferModel, proximal: Proximal | None) -> dict[str, Any]:
    """The term as the optimiser takes it; targets are its own copies, on the model's device."""
    if proximal is None:
        return {}
    targets = [
        torch.tensor(proximal.targets[name], device=parameter.device)
        if name in proximal.targets
        else None
        for name, parameter in model.trainable_by_name().items()
    ]
    return {"proximal": proximal.strength, "targets": targets}


def take_step(
    model: TransferModel, optimizer: SGD, x: Tensor, labels: Tensor, trims: bool = True
) -> float:
    """Forward, backward, update; returns the loss.

    Args:
        trims: whether memory that is free goes back to the system, which a small device
            needs; the next step takes longer for it.

    Raises:
        UpdateError: if loss or a gradient is not finite.
    """
    in_backward = nullcontext() if model.accumulates else optimizer.stepping_in_backward()
    with in_backward:
        loss = model.gradients(x, labels)
    if model.accumulates:
        optimizer.step()
    if trims:
        trim()
    return loss


def cosine(done: float) -> float:
    """Share of the learning rate when a share `done` of the steps is done: from 1 to 0.

    Source: Loshchilov and Hutter, SGDR, arXiv:1608.03983, without restarts.
    """
    return (1 + math.cos(math.pi * done)) / 2


def _epochs(
    source: FeatureSource,
    labels: np.ndarray,
    views: int,
    config: LocalConfig,
    seed: int | Sequence[int],
    on_epoch: Callable[[int], None],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of all epochs, each in an order and with views of its own."""
    rng = np.random.default_rng(seed)
    for epoch in range(config.epochs):
        order = visiting_order(labels, config.sampler, rng)
        drawn = rng.integers(views, size=len(labels)) if views > 1 else None
        yield from source.batches(config.batch_size, order, drawn)
        on_epoch(epoch)


def pick_device(name: str) -> torch.device:
    """The device that `name` means; `auto` takes CUDA, then MPS, then the CPU.

    Raises:
        ConfigError: if there is no such device, or not here.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((kind for kind, usable in there.items() if usable), "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {name}; use auto, cpu, cuda or mps") from error
    if not there.get(device.type, True):
        raise ConfigError(f'device {name} is not available here; use device = "auto" or "cpu"')
    return device
