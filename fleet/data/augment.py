"""Random views of an image that can be drawn again: a view is a number, not a chance."""

import math

import numpy as np
from PIL import Image

from fleet.config import AUGMENTATIONS
from fleet.errors import ConfigError

_AREA = (0.5, 1.0)  # share of the image's
_RATIO = (3 / 4, 4 / 3)  # width to height


def view_of(image: Image.Image, kinds: str, identity: bytes, view: int) -> Image.Image:
    """One view of an image, the same in every process and on every machine.

    View 0 is the image itself, and so is every view of kind `none`. The others
    are cropped at random, mirrored with probability 1/2, or both.

    Args:
        kinds: one of `AUGMENTATIONS`.
        identity: of the image; with `view` it decides every draw.

    Returns:
        An image of the crop's size: resizing is `to_tensor`'s.

    Raises:
        ConfigError: for an unknown kind.
    """
    if kinds not in AUGMENTATIONS:
        raise ConfigError(
            f"unknown augmentation {kinds}; known: {', '.join(map(repr, AUGMENTATIONS))}"
        )
    if view == 0 or kinds == "none":
        return image
    rng = np.random.default_rng((int.from_bytes(identity, "little"), view))
    if "crop" in kinds:
        image = image.crop(random_box(*image.size, rng))
    if "flip" in kinds and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def random_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """The box of a random resized crop, as torchvision picks it.

    Area uniform in [1/2, 1] of the image's, aspect ratio log-uniform in
    [3/4, 4/3]. If ten draws do not fit into the image, as where it is long and
    narrow, the largest box in its middle whose ratio is allowed.

    Returns:
        left, upper, right, lower in pixels.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*_AREA)
        ratio = math.exp(rng.uniform(*np.log(_RATIO)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = rng.integers((width - w + 1, height - h + 1)).tolist()
            return left, upper, left + w, upper + h
    w, h = min(width, round(height * _RATIO[1])), min(height, round(width / _RATIO[0]))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h
