"""The local loop, shared by devices, simulations and library users."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fleet.backbones import Preprocessing
from fleet.config import LocalConfig
from fleet.data import ImageBatches, ImageData
from fleet.errors import ConfigError, UpdateError
from fleet.measure import AllocatorPeak, allocator_peak
from fleet.mobiletl import TransferModel
from fleet.optim import SGD


@dataclass(frozen=True)
class LocalResult:
    """What a local training came to.

    Attributes:
        num_examples: images in one epoch.
        loss: mean cross-entropy over all epochs, in nats.
        peak_bytes: allocator peak of the first step beyond model and batch.
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
) -> LocalResult:
    """Train what the model's plan trains; the parameters change in place.

    Args:
        model: on the CPU or any device; images follow it.
        data: at least one image.
        seed: of the order of the images, and of what dropout drops.

    Raises:
        ConfigError: if there is no image, or a single one in a batch that is
            too little for a norm's statistics.
        UpdateError: if the loss is no longer finite, with step and learning rate.
    """
    if not len(data):
        raise ConfigError(f"{data.name} has no training images for this client; give it some")
    model.train()
    optimizer = SGD(
        model.trainable_parameters(), config.learning_rate, config.momentum, config.weight_decay
    )
    device = next(model.parameters()).device
    started, total, peak = time.perf_counter(), 0.0, AllocatorPeak()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        for step, (images, labels) in enumerate(_epochs(data, preprocessing, config, seed)):
            batch = images.to(device), labels.to(device)
            with allocator_peak(device) if step == 0 else nullcontext(peak) as peak:
                loss = _step(model, optimizer, *batch)
            if not math.isfinite(loss):
                raise UpdateError(
                    f"loss is {loss} at step {step} with learning rate {config.learning_rate}; "
                    f"lower learning-rate"
                )
            total += loss * len(labels)
    return LocalResult(
        num_examples=len(data),
        loss=total / (len(data) * config.epochs),
        peak_bytes=peak.bytes,
        seconds=time.perf_counter() - started,
    )


def _step(model: TransferModel, optimizer: SGD, images: Tensor, labels: Tensor) -> float:
    """Forward, backward, update; returns the loss."""
    try:
        loss = F.cross_entropy(model(images), labels)
    except ValueError as error:  # of PyTorch's batch norm: one value a channel has no variance
        if len(labels) > 1:
            raise
        raise ConfigError(
            f"a batch of one image of {images.shape[-1]} pixels is too little to train on: "
            f"{error}; raise batch-size or image-size, or give the client more images"
        ) from error
    loss.backward()
    optimizer.step()
    return loss.item()


def _epochs(
    data: ImageData, preprocessing: Preprocessing, config: LocalConfig, seed: int | Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of all epochs, each in an order of its own."""
    rng = np.random.default_rng(seed)
    for _ in range(config.epochs):
        order = rng.permutation(len(data))
        yield from ImageBatches(data, preprocessing, config.batch_size, order)


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
