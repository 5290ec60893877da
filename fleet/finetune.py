"""Fine-tune one model within a memory budget, without any federation."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from PIL import Image
from safetensors.numpy import load_file, save_file
from torch import Tensor

from fleet.backbones import Backbone, Preprocessing, load_backbone, preprocessing_of, read_backbone
from fleet.config import RunConfig, Value, default_settings, read_config
from fleet.data import ImageData, load_data, of_dataset, to_tensor
from fleet.errors import UpdateError
from fleet.mobiletl import TransferModel
from fleet.plan import UpdatePlan, make_plan
from fleet.planner import MIB, MIN_BATCH_SIZE, afford, batch_sizes_between
from fleet.state import TrainableState, capture, load
from fleet.train import pick_device, train_locally

_BLOCKS = 5  # that train if neither blocks nor a budget is given, as in the paper


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A model that was fine-tuned, and what it takes to use it.

    Attributes:
        model: the torchvision or timm model itself, in eval mode; its
            `state_dict` has the keys that it always had.
        classes: names of its outputs, in order.
        transform: RGB image → (3, S, S) float32, the model's input.
        preprocessing: what `transform` does.
        plan: what trained.
        stash: what was kept for backward.
        batch_size: images a step.
        losses: mean cross-entropy of each epoch, in nats.
        peak_bytes: most that PyTorch allocated at once beyond the loaded model.
    """

    model: nn.Module
    classes: tuple[str, ...]
    transform: Callable[[Image.Image], Tensor]
    preprocessing: Preprocessing
    plan: UpdatePlan
    stash: str
    batch_size: int
    losses: tuple[float, ...]
    peak_bytes: int


def fit(
    model: nn.Module | str,
    data: Any,
    *,
    epochs: int = 3,
    budget_mib: float | None = None,
    blocks: int | None = None,
    image_size: int = 224,
    preprocessing: Preprocessing | None = None,
    settings: Mapping[str, Value] | None = None,
    on_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> Fitted:
    """Train the top blocks and a classifier of a pretrained mobile CNN on labelled images.

    Args:
        model: a torchvision or timm model, which trains in place; or a
            backbone's name, as `load_backbone` takes it. A classifier with
            another number of outputs than there are classes is replaced.
        data: what `load_data` takes, an `ImageData`, or a data set of (PIL
            image, label) pairs such as torchvision's `ImageFolder`.
        epochs: passes over the images.
        budget_mib: for what PyTorch allocates beyond the loaded model; decides
            how many blocks train, what is kept for backward, and the batch
            size, the setting being the most. None: no limit.
        blocks: how many train at most; None: all that the budget allows, or
            five if there is none.
        image_size: pixels a side.
        preprocessing: what the model expects of an image, for a model that
            does not tell; ImageNet's usual one if left out.
        settings: of `fleet simulate` (learning-rate, batch-size, stash, cache,
            seed, …), where they should not be the defaults.
        on_epoch: is given each epoch's number, from 0 on, and its mean loss.

    Raises:
        ConfigError: for settings, data or a model that will not do, or a budget
            that is below the floor.
        UpdateError: if the loss is no longer finite; the model is as it was
            after the last epoch.
    """
    config = _config(model, epochs, image_size, settings or {})
    images = _images(data, config)
    backbone, flags = _backbone(model, images, preprocessing, config)
    plan, stash, batch_size = _affordable(backbone, config, budget_mib, blocks)
    local = replace(config.local, batch_size=batch_size, stash=stash)
    losses: list[float] = []
    with _LastGood(backbone.model, plan) as last_good:

        def end_epoch(epoch: int, loss: float) -> None:
            last_good.save(f"after epoch {epoch}")
            losses.append(loss)
            on_epoch(epoch, loss)

        try:
            result = train_locally(
                TransferModel(backbone, plan, stash),
                images,
                backbone.preprocessing,
                local,
                config.seed,
                config.features,
                end_epoch,
            )
        except UpdateError as error:
            raise UpdateError(f"{error}; the model is as it was {last_good.restore()}") from error
        finally:
            backbone.model.eval()
            for name, parameter in backbone.model.named_parameters():
                parameter.requires_grad_(flags.get(name, True))
    return Fitted(
        model=backbone.model,
        classes=images.classes,
        transform=partial(to_tensor, preprocessing=backbone.preprocessing),
        preprocessing=backbone.preprocessing,
        plan=plan,
        stash=stash,
        batch_size=batch_size,
        losses=tuple(losses),
        peak_bytes=result.peak_bytes,
    )


def _config(
    model: nn.Module | str, epochs: int, image_size: int, settings: Mapping[str, Value]
) -> RunConfig:
    own = {"local-epochs": epochs, "image-size": image_size}
    if isinstance(model, str):
        own["backbone"] = model
    return read_config(default_settings() | own | dict(settings))


def _images(data: Any, config: RunConfig) -> ImageData:
    if isinstance(data, ImageData):
        return data
    if isinstance(data, str | Path):
        skip = config.data.skip_unreadable
        return load_data(str(data), "train", skip_unreadable=skip, seed=config.seed)
    return of_dataset(data)


def _backbone(
    model: nn.Module | str,
    images: ImageData,
    preprocessing: Preprocessing | None,
    config: RunConfig,
) -> tuple[Backbone, dict[str, bool]]:
    """The backbone, on its device, and which parameters of a given model required gradients."""
    if isinstance(model, str):
        backbone = load_backbone(
            model,
            num_classes=len(images.classes),
            classes=images.classes,
            image_size=config.model.image_size,
            weights=config.model.weights,
            seed=config.seed,
        )
        flags = {}
    else:
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        told = preprocessing or preprocessing_of(model, config.model.image_size)
        backbone = read_backbone(type(model).__name__, model, told, len(images.classes))
    backbone.model.to(pick_device(config.local.device))
    return backbone, flags


def _affordable(
    backbone: Backbone, config: RunConfig, budget_mib: float | None, blocks: int | None
) -> tuple[UpdatePlan, str, int]:
    """Plan, stash and batch size; what the budget does not decide is as set."""
    count = len(backbone.blocks)
    if blocks is None:
        blocks = count if budget_mib is not None else min(_BLOCKS, count)
    widest = make_plan(
        backbone, method=config.plan.method, blocks=blocks, train_tail=config.plan.train_tail
    )
    local = config.local
    if budget_mib is None:
        return widest, local.stash, local.batch_size
    found = afford(
        backbone,
        widest,
        round(budget_mib * MIB),
        batch_sizes=batch_sizes_between(MIN_BATCH_SIZE, local.batch_size),
        momentum=local.momentum,
        momentum_dtype=getattr(torch, local.momentum_dtype),
    )
    return found.plan, found.stash, found.batch_size


class _LastGood:
    """What trains, as it was when it was last in order; on the disk, as memory is short."""

    def __init__(self, model: nn.Module, plan: UpdatePlan) -> None:
        self._model, self._plan, self._when = model, plan, ""

    def __enter__(self) -> "_LastGood":
        self._folder = tempfile.TemporaryDirectory()
        self._file = Path(self._folder.name) / "state.safetensors"
        self.save("before training")
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def save(self, when: str) -> None:
        save_file(dict(capture(self._model, self._plan).tensors), self._file)
        self._when = when

    def restore(self) -> str:
        """Put it back into the model; says of when it is."""
        load(self._model, TrainableState(self._plan, load_file(self._file)))
        return self._when
