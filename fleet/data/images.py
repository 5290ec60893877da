"""A labelled image set that holds labels in memory and decodes images on demand."""

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import numpy as np
from PIL import Image

from fleet.errors import ConfigError
from fleet.garbage import importing

# What Pillow raises for bytes that are no whole image, by format and by fault.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class ImageData:
    """A labelled image set, decoded one image at a time.

    Attributes:
        name: the source it came from.
        classes: names; a label is a position in them.
        labels: (N,) int64, read-only.
        read: i → image i in RGB. Picklable, so that worker processes can have it.
        identify: i → `identity(i)` without decoding, where the source can; picklable too.
        skipped: files of the source that are left out, as they cannot be read.
    """

    name: str
    classes: tuple[str, ...]
    labels: np.ndarray
    read: Callable[[int], Image.Image]
    identify: Callable[[int], bytes] | None = None
    skipped: int = 0

    def __post_init__(self) -> None:
        labels = np.array(self.labels, dtype=np.int64)
        labels.setflags(write=False)
        object.__setattr__(self, "labels", labels)

    def __len__(self) -> int:
        return len(self.labels)

    def identity(self, i: int) -> bytes:
        """16 bytes that stand for what image i shows, wherever it lies and whatever its name.

        The BLAKE2b digest of its encoded bytes or its array, which need no decoding;
        of size and RGB pixels where the source has neither.

        Raises:
            ConfigError: if it cannot be read.
        """
        if self.identify is not None:
            return self.identify(i)
        return identity_of(self.read(i))

    def subset(self, indices: Sequence[int] | np.ndarray) -> "ImageData":
        """The examples at `indices`, in that order, with the same classes."""
        indices = np.array(indices, dtype=np.int64)
        read = partial(_at, indices, self.read)
        identify = None if self.identify is None else partial(_at, indices, self.identify)
        return replace(self, labels=self.labels[indices], read=read, identify=identify)


def identity_of(image: Image.Image) -> bytes:
    """The 16-byte BLAKE2b digest of an RGB image's size and pixels."""
    return digest(b"%d x %d RGB" % image.size + image.tobytes())


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


def digest(image: Path | bytes | np.ndarray, where: str = "") -> bytes:
    """The 16-byte BLAKE2b digest of a file, of bytes or of an array's values.

    Raises:
        ConfigError: if the file cannot be read; `where` names it.
    """
    if not isinstance(image, Path):
        return hashlib.blake2b(image, digest_size=16).digest()
    try:
        with image.open("rb") as file:
            return hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).digest()
    except OSError as error:
        raise ConfigError(
            f"{where} cannot be read: {error}; remove it from the data or replace it"
        ) from error


def need(module: str, source: str, extra: str = "sim") -> ModuleType:
    """Import what only some sources need, so that a small device can do without.

    Raises:
        ConfigError: naming the extra that brings the module.
    """
    try:
        with importing():
            return import_module(module)
    except ImportError as error:
        raise _missing(module, source, extra) from error


def found(package: str, source: str, extra: str = "sim") -> Path:
    """Folder of an installed package that holds data, without importing it.

    Raises:
        ConfigError: naming the extra that brings the package.
    """
    try:
        spec = find_spec(package)
    except ValueError:  # of a module that is in `sys.modules` and has none
        spec = None
    if spec is None or spec.origin is None:
        raise _missing(package, source, extra)
    return Path(spec.origin).parent


def _missing(module: str, source: str, extra: str) -> ConfigError:
    return ConfigError(
        f"{source} needs {module}, which is not installed: pip install fleet-mobiletl[{extra}]"
    )


def _at(indices: np.ndarray, function: Callable[[int], T], i: int) -> T:
    return function(int(indices[i]))
