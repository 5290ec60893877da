"""A device's ImageFolder, to which images come and go between rounds."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fleet.data.folders import (
    IMAGE_SUFFIXES,
    digest_file,
    fault_of,
    image_files,
    read_file,
    subfolders,
    tell_skipped,
)
from fleet.data.images import ImageData, digest
from fleet.data.splits import HELD_OUT_FRACTION, TEST_NAMES
from fleet.errors import ConfigError

_IGNORED = (".", "~")  # hidden files, and what editors and copying programs leave half done


@dataclass(frozen=True)
class _File:
    path: Path
    label: str
    held_out: bool  # by its content


def load_growing(root: Path) -> tuple[ImageData, ImageData]:
    """Training and held-out images that are in a folder now.

    `root/<class>/…`, or `root/train/<class>/…` with test, validation or val
    beside it. Without such parts an image is held out if the digest of its bytes
    says so, one in five: it never changes sides, whatever comes and goes and
    wherever it is moved, and copies of it are on the same side.

    Nothing that is on its way stops a round: hidden files, and class folders
    without an image, are passed over; files that cannot be read are counted in
    `skipped` and named in a warning, and the next round looks again.

    Returns:
        Two sets with the same classes, those that have an image, in sorted order.

    Raises:
        ConfigError: if there is no image to train on, or the folder cannot be read.
    """
    try:
        return _load(root)
    except OSError as error:
        raise ConfigError(
            f"{root} cannot be read: {error.strerror or error}; make it readable for this user, or "
            f"mount it again"
        ) from error


def _load(root: Path) -> tuple[ImageData, ImageData]:
    parts = {name: root / name for name in ("train", *TEST_NAMES) if subfolders(root / name)}
    test_name = next((name for name in TEST_NAMES if name in parts), None)
    faults: list[tuple[Path, str]] = []
    files = _files(parts.get("train", root), faults)
    if "train" in parts and test_name:
        training, held_out = files, _files(parts[test_name], faults)
    else:
        training = [file for file in files if not file.held_out]
        held_out = [file for file in files if file.held_out]
    if faults:
        tell_skipped(root, faults)
    if not training:
        raise ConfigError(_nothing(root, len(held_out), len(faults)))
    classes = tuple(sorted({file.label for file in (*training, *held_out)}))
    sets = (_images(root, classes, side, len(faults)) for side in (training, held_out))
    return tuple(sets)


def _files(root: Path, faults: list[tuple[Path, str]]) -> list[_File]:
    """Readable images of all class folders; what cannot be read is added to `faults`."""
    found = []
    for label in subfolders(root):
        for path in image_files(root / label):
            if any(part.startswith(_IGNORED) for part in path.relative_to(root).parts):
                continue
            try:
                data = path.read_bytes()  # once: what is checked is what is held out or not
            except OSError as error:
                faults.append((path, error.strerror or str(error)))
                continue
            if fault := fault_of(io.BytesIO(data)):
                faults.append((path, fault))
            else:
                found.append(_File(path, label, _is_held_out(data)))
    return found


def _is_held_out(data: bytes) -> bool:
    return int.from_bytes(digest(data)[:8], "big") < HELD_OUT_FRACTION * 2**64


def _images(
    root: Path, classes: tuple[str, ...], files: Sequence[_File], skipped: int
) -> ImageData:
    paths = tuple(file.path for file in files)
    labels = [classes.index(file.label) for file in files]
    read, identify = partial(read_file, paths), partial(digest_file, paths)
    return ImageData(str(root), classes, labels, read, identify, skipped)


def _nothing(root: Path, held_out: int, unreadable: int) -> str:
    if held_out:
        return (
            f"{root} has no image to train on, only {held_out} that are held out; put more images "
            f"there"
        )
    return (
        f"{root} has no images ({', '.join(IMAGE_SUFFIXES)}) in class folders, and {unreadable} "
        f"files that cannot be read; put the images of each class in a folder of its own: "
        f"{root / 'CLASS' / 'image.jpg'}"
    )
