"""Fine-tune one model within a memory budget, without any federation."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from PIL import Image
from safetensors.numpy import load_file, save_file
from torch import Tensor

from fleet.backbones import Backbone, Preprocessing, load_backbone, preprocessing_of, read_backbone
from fleet.config import (
    FeatureConfig,
    LocalConfig,
    RunConfig,
    Value,
    budget,
    default_settings,
    read_config,
)
from fleet.data import ImageData, load_data, of_dataset, to_tensor
from fleet.errors import ConfigError, UpdateError
from fleet.mobiletl import TransferModel
from fleet.plan import UpdatePlan, make_plan
from fleet.planner import MIB, afford_locally, available_bytes
from fleet.state import TrainableState, capture, load
from fleet.train import pick_device, train_locally

_BLOCKS = 5  # that train if neither blocks nor a budget is given, as in the paper


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A model that was fine-tuned, and what it takes to use it.

    Attributes:
        model: the torchvision or timm model itself, in eval mode; its
            `state_dict` has the keys that it always had.
        backbone: its name, as `load_backbone` takes it; of a torchvision model that
            was given as an object, its class.
        classes: names of its outputs, in order.
        transform: RGB image → (3, S, S) float32, the model's input.
        preprocessing: what `transform` does.
        plan: what trained.
        stash: what was kept for backward.
        batch_size: images a step.
        losses: mean cross-entropy of each epoch, in nats.
        peak_bytes: as in `fleet.train.LocalResult`.
    """

    model: nn.Module
    backbone: str
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
    budget_mib: float | str | None = None,
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
            size, the setting being the most. `auto`: what is free here, less
            the setting reserve-mib. None: no limit.
        blocks: how many train at most; None: all that the budget allows, or
            five if there is none.
        image_size: pixels a side, unless `preprocessing` says.
        preprocessing: what the model expects of an image, for a model that
            does not tell; ImageNet's usual one if left out.
        settings: of `fleet simulate` that are of one device's training
            (learning-rate, schedule, batch-size, stash, cache, seed, …), where
            they should not be the defaults.
        on_epoch: is given each epoch's number, from 0 on, and its mean loss.

    Raises:
        ConfigError: for settings, data or a model that will not do, or a budget
            that is below the floor; the model is as it was.
        UpdateError: if the loss, or the model's output, is no longer finite; the
            model is as it was after the last epoch after which it was.
    """
    config = _config(model, epochs, image_size, settings or {})
    images = _images(data, config)
    with _unharmed(model):
        backbone = _backbone(model, images, preprocessing, config)
        plan, stash, batch_size = _affordable(backbone, config, budget_mib, blocks)
    flags = {p: p.requires_grad for p in model.parameters()} if backbone.model is model else {}
    local = replace(config.local, batch_size=batch_size, stash=stash)
    losses: list[float] = []
    with _LastGood(backbone, plan, images) as last_good:

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
            for parameter in backbone.model.parameters():
                parameter.requires_grad_(flags.get(parameter, True))
    return Fitted(
        model=backbone.model,
        backbone=backbone.name,
        classes=images.classes,
        transform=partial(to_tensor, preprocessing=backbone.preprocessing),
        preprocessing=backbone.preprocessing,
        plan=plan,
        stash=stash,
        batch_size=batch_size,
        losses=tuple(losses),
        peak_bytes=result.peak_bytes,
    )


_ARGUMENTS = {  # settings that have an argument of their own → which
    "backbone": "model",
    "data": "data",
    "local-epochs": "epochs",
    "budget-mib": "budget_mib",
    "blocks": "blocks",
    "image-size": "image_size",
}
_SETTINGS = {
    *(f.metadata["key"] for section in (LocalConfig, FeatureConfig) for f in fields(section)),
    *("method", "train-tail", "weights", "seed", "skip-unreadable", "reserve-mib"),
} - _ARGUMENTS.keys()


def _config(
    model: nn.Module | str, epochs: int, image_size: int, settings: Mapping[str, Value]
) -> RunConfig:
    for key in settings:
        if key in _ARGUMENTS:
            raise ConfigError(f"setting {key} is the argument {_ARGUMENTS[key]} of fit")
        if key not in _SETTINGS:
            raise ConfigError(
                f"fit has no use for a setting {key}; known: {', '.join(sorted(_SETTINGS))}"
            )
    own = {"local-epochs": epochs, "image-size": image_size}
    if isinstance(model, str):
        own["backbone"] = model
    elif not isinstance(model, nn.Module):
        raise ConfigError(
            f"model is a {type(model).__name__}, expected a torchvision or timm model, or the name "
            f"of one"
        )
    return read_config(default_settings() | own | dict(settings))


@contextmanager
def _unharmed(model: nn.Module | str) -> Iterator[None]:
    """A model that will not do is given back as it was: with its head, flags and mode."""
    if isinstance(model, str):
        yield
        return
    flags = {p: p.requires_grad for p in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    try:
        yield
    except Exception:
        for name, linear in linears[-1:]:
            model.set_submodule(name, linear)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode
        raise
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)


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
) -> Backbone:
    """The backbone, on its device."""
    if isinstance(model, str):
        backbone = load_backbone(
            model,
            num_classes=len(images.classes),
            classes=images.classes,
            image_size=config.model.image_size,
            weights=config.model.weights,
            seed=config.seed,
        )
    else:
        told = preprocessing or preprocessing_of(model, config.model.image_size)
        backbone = read_backbone(_name_of(model), model, told, len(images.classes))
    backbone.model.to(pick_device(config.local.device))
    return backbone


def _name_of(model: nn.Module) -> str:
    """timm's models tell their architecture, torchvision's their class alone."""
    told = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    return f"timm:{told}" if told else type(model).__name__


def _affordable(
    backbone: Backbone, config: RunConfig, budget_mib: float | str | None, blocks: int | None
) -> tuple[UpdatePlan, str, int]:
    """Plan, stash and batch size; what the budget does not decide is as set."""
    count, limit = len(backbone.blocks), budget("off" if budget_mib is None else budget_mib)
    if blocks is None:
        blocks = min(_BLOCKS, count) if limit == "off" else count
    elif type(blocks) is not int:
        raise ConfigError(f"blocks must be a whole number, got {blocks!r}")
    widest = make_plan(
        backbone, method=config.plan.method, blocks=blocks, train_tail=config.plan.train_tail
    )
    local = config.local
    if limit == "off":
        return widest, local.stash, local.batch_size
    if limit == "auto":
        budget_bytes = available_bytes(round(config.budget.reserve_mib * MIB))
    else:
        budget_bytes = round(limit * MIB)
    found = afford_locally(backbone, widest, budget_bytes, local)
    return found.plan, found.stash, found.batch_size


class _LastGood:
    """What trains, as it was when it was last in order; on the disk, as memory is short."""

    def __init__(self, backbone: Backbone, plan: UpdatePlan, images: ImageData) -> None:
        self._model, self._plan, self._when = backbone.model, plan, ""
        few = [images.read(i) for i in range(min(2, len(images)))]
        self._probe = [to_tensor(image, backbone.preprocessing) for image in few]

    def __enter__(self) -> "_LastGood":
        self._folder = tempfile.TemporaryDirectory()
        self._file = Path(self._folder.name) / "state.safetensors"
        self._write("before training")
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def save(self, when: str) -> None:
        """Keep the state if the model's output is finite.

        Raises:
            UpdateError: if it is not.
        """
        if self._probe and not self._output().isfinite().all():
            raise UpdateError(f"the model's output is not finite {when}; lower learning-rate")
        self._write(when)

    def restore(self) -> str:
        """Put it back into the model; says of when it is."""
        load(self._model, TrainableState(self._plan, load_file(self._file)))
        return self._when

    def _write(self, when: str) -> None:
        save_file(dict(capture(self._model, self._plan).tensors), self._file)
        self._when = when

    def _output(self) -> Tensor:
        modes = {module: module.training for module in self._model.modules()}
        device = next(self._model.parameters()).device
        with torch.inference_mode():
            output = self._model.eval()(torch.stack(self._probe).to(device))
        for module, mode in modes.items():
            module.training = mode
        return output
