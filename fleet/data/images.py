"""A labelled image set that holds labels in memory and decodes images on demand."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

from fleet.errors import ConfigError

# What Pillow raises for bytes that are no whole image, by format and by fault.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A labelled image set, decoded one image at a time.

    Attributes:
        name: the source it came from.
        classes: names; a label is a position in them.
        labels: (N,) int64, read-only.
        read: i → image i in RGB. Picklable, so that worker processes can have it.
    """

    name: str
    classes: tuple[str, ...]
    labels: np.ndarray
    read: Callable[[int], Image.Image]

    def __post_init__(self) -> None:
        labels = np.array(self.labels, dtype=np.int64)
        labels.setflags(write=False)
        object.__setattr__(self, "labels", labels)

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Sequence[int] | np.ndarray) -> "ImageData":
        """The examples at `indices`, in that order, with the same classes."""
        indices = np.array(indices, dtype=np.int64)
        read = partial(_read_position, self.read, indices)
        return replace(self, labels=self.labels[indices], read=read)


def decode(image: Path | bytes, where: str) -> Image.Image:
    """Decode a file or its bytes to RGB.

    Raises:
        ConfigError: if it is no whole image; `where` names it.
    """
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return opened.convert("RGB")
    except UNREADABLE as error:
        raise ConfigError(
            f"{where} cannot be decoded: {error}; remove it from the data or replace it"
        ) from error


def need(module: str, source: str, extra: str = "sim") -> ModuleType:
    """Import what only some sources need, so that a small device can do without.

    Raises:
        ConfigError: naming the extra that brings the module.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{source} needs {module}, which is not installed: pip install fleet-mobiletl[{extra}]"
        ) from error


def _read_position(read: Callable[[int], Image.Image], indices: np.ndarray, i: int) -> Image.Image:
    return read(int(indices[i]))
