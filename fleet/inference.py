"""Classes of images, by a trained model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from fleet.data.batches import to_tensor
from fleet.data.images import UNREADABLE
from fleet.errors import ConfigError
from fleet.trained import Source, TrainedModel, trained_model

BATCH_SIZE = 8  # images at a time; more are hardly faster on a CPU, and take memory


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model says of one image.

    Attributes:
        image: path of the file; of an image that is none, its place in the list.
        ranking: class and probability, 0…1, the most probable first.
        fault: why there is no ranking; None if there is one.
    """

    image: str
    ranking: tuple[tuple[str, float], ...]
    fault: str | None = None


def predict(
    source: Source, images: Sequence[str | Path | Image.Image], *, top: int = 1
) -> list[Prediction]:
    """Classify images, prepared as the model was trained on.

    Args:
        source: as `trained_model` takes it: a run's folder, a `.safetensors`
            file, or what `fit` returned.
        images: files, or images that are loaded already.
        top: classes of each image that are told, at most all.

    Returns:
        A prediction for each image, in order; one that cannot be read has a fault.

    Raises:
        ConfigError: if there is no model, or it is damaged, or `top` is below 1.
    """
    if top < 1:
        raise ConfigError(f"top must be at least 1, got {top}")
    trained = trained_model(source)
    found: list[Prediction] = []
    for start in range(0, len(images), BATCH_SIZE):
        found += _predict_batch(trained, start, images[start : start + BATCH_SIZE], top)
    return found


def _predict_batch(
    trained: TrainedModel, start: int, images: Sequence[str | Path | Image.Image], top: int
) -> Iterator[Prediction]:
    inputs, faults = {}, {}
    for i, image in enumerate(images):
        try:
            inputs[i] = _prepared(image, trained)
        except UNREADABLE as error:
            faults[i] = getattr(error, "strerror", None) or str(error) or type(error).__name__
    rows = {}
    if inputs:
        first = next(trained.model.parameters())
        x = torch.stack(list(inputs.values())).to(first.device)
        trained.model.eval()
        with torch.inference_mode():
            probabilities = trained.model(x).softmax(1).cpu()
        rows = dict(zip(inputs, probabilities, strict=True))
    for i, image in enumerate(images):
        name = str(start + i) if isinstance(image, Image.Image) else str(image)
        ranking = _ranking(rows[i], trained.classes, top) if i in rows else ()
        yield Prediction(image=name, ranking=ranking, fault=faults.get(i))


def _prepared(image: str | Path | Image.Image, trained: TrainedModel) -> torch.Tensor:
    if isinstance(image, Image.Image):
        return to_tensor(image, trained.preprocessing)
    with Image.open(image) as opened:
        return to_tensor(opened, trained.preprocessing)


def _ranking(
    probabilities: torch.Tensor, classes: tuple[str, ...], top: int
) -> tuple[tuple[str, float], ...]:
    values, places = probabilities.topk(min(top, len(classes)))
    return tuple(
        (classes[place], value)
        for place, value in zip(places.tolist(), values.tolist(), strict=True)
    )
