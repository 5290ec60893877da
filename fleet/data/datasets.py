"""Data sets that are Python objects already, such as torchvision's."""

from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from fleet.data.images import ImageData
from fleet.errors import ConfigError


def of_dataset(dataset: Any) -> ImageData:
    """A data set of (PIL image, label) pairs as labelled images.

    Args:
        dataset: has `len()` and `[i]`; labels are whole numbers from 0 on. Its
            `targets` or `labels`, if it has them, spare reading every image for
            its label, and its `classes` are the classes' names.

    Raises:
        ConfigError: if it holds something else, or fewer than two classes.
    """
    name = type(dataset).__name__
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ConfigError(
            f"data is a {name}, which has no length or no items; give a data set of (PIL image, "
            f"label) pairs, or the name of a source"
        )
    if not len(dataset):
        raise ConfigError(f"{name} has no examples; give it some")
    _read(dataset, 0)  # tells at once what it does not hold
    told = getattr(dataset, "targets", getattr(dataset, "labels", None))
    labels = np.array([dataset[i][1] for i in range(len(dataset))] if told is None else told)
    if labels.shape != (len(dataset),) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise ConfigError(
            f"labels of {name} are {labels.dtype} of shape {labels.shape}, expected "
            f"{len(dataset)} whole numbers from 0 on"
        )
    classes = getattr(dataset, "classes", None)
    if classes is None:
        if labels.max() >= len(dataset):
            raise ConfigError(
                f"{name} has {len(dataset)} examples and labels up to {labels.max()}; number the "
                f"classes from 0 on, or give the data set `classes`"
            )
        classes = range(labels.max() + 1)
    if len(classes) < max(2, labels.max() + 1):
        raise ConfigError(
            f"{name} has {len(classes)} classes and labels up to {labels.max()}; training needs "
            f"at least 2 classes, one for every label"
        )
    return ImageData(name, tuple(map(str, classes)), labels, partial(_read, dataset))


def _read(dataset: Any, i: int) -> Image.Image:
    item = dataset[i]
    image = item[0] if isinstance(item, tuple | list) and len(item) == 2 else None
    if not isinstance(image, Image.Image):
        raise ConfigError(
            f"item {i} of {type(dataset).__name__} is {_kind(item)}, expected a pair of PIL image "
            f"and label; leave out a transform that makes tensors"
        )
    return image.convert("RGB")


def _kind(item: Any) -> str:
    if isinstance(item, tuple | list):
        return f"({', '.join(type(part).__name__ for part in item)})"
    return f"a {type(item).__name__}"
