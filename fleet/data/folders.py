"""An ImageFolder directory: a folder for each class. Needs Pillow alone."""

import os
import warnings
from collections.abc import Sequence
from functools import partial
from io import BytesIO
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from fleet.data.images import UNREADABLE, ImageData, decode, digest
from fleet.data.splits import TEST_NAMES, Split, choose_split, held_out
from fleet.errors import ConfigError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_SHOWN: dict = {}  # what `warnings` has shown


def load_folder(root: Path, split: Split, *, skip_unreadable: bool = False) -> ImageData:
    """Read `root/<class>/…` or `root/train/<class>/…` with test, validation or val beside it.

    Classes are the names of the training folders in sorted order, as in torchvision.

    Raises:
        ConfigError: for missing or empty class folders, for classes that only the
            test part has, and for unreadable images unless they are to be skipped.
    """
    parts = {name: root / name for name in ("train", *TEST_NAMES) if subfolders(root / name)}
    if "train" not in parts:
        classes = _classes(root)
        return held_out(_load(root, classes, skip_unreadable), split)
    classes = _classes(parts["train"])
    chosen, cut = choose_split(parts, split, str(root))
    strangers = sorted(set(subfolders(chosen)) - set(classes))
    if strangers:
        raise ConfigError(
            f"{chosen} has classes that {parts['train']} lacks: {', '.join(strangers)}; "
            f"the folders of both must be the same classes"
        )
    data = _load(chosen, classes, skip_unreadable)
    return held_out(data, split) if cut else data


def _classes(root: Path) -> tuple[str, ...]:
    classes = tuple(subfolders(root))
    if not classes:
        raise ConfigError(
            f"{root} has no class folders; put the images of each class in a folder of its own: "
            f"{root / 'CLASS' / 'image.jpg'}"
        )
    return classes


def subfolders(root: Path) -> list[str]:
    """Names of the folders in a folder, hidden ones left out; none if it is not there."""
    if not root.is_dir():
        return []
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _load(root: Path, classes: tuple[str, ...], skip_unreadable: bool) -> ImageData:
    files, labels = [], []
    for label, name in enumerate(classes):
        if not (root / name).is_dir():  # the test part may lack a class
            continue
        found = image_files(root / name)
        if not found:
            raise ConfigError(
                f"class folder {root / name} has no images ({', '.join(IMAGE_SUFFIXES)}); "
                f"fill it or remove it"
            )
        files += found
        labels += [label] * len(found)
    unreadable = {i: fault for i, file in enumerate(files) if (fault := fault_of(file))}
    faults = [(files[i], fault) for i, fault in unreadable.items()]
    if faults and not skip_unreadable:
        raise ConfigError(
            f"{_summary(root, faults)}; repair or remove them, or skip them "
            f"with skip-unreadable = true"
        )
    if faults:
        tell_skipped(root, faults)
    good = [i for i in range(len(files)) if i not in unreadable]
    kept = tuple(files[i] for i in good)
    read, identify = partial(read_file, kept), partial(digest_file, kept)
    labels = [labels[i] for i in good]
    return ImageData(str(root), classes, labels, read, identify, len(faults))


def image_files(folder: Path) -> list[Path]:
    """All image files below `folder`, in torchvision's order.

    A link to a folder that it lies in is not followed, and what is no regular file is left
    out: whoever opens a named pipe waits for ever.
    """
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not _leads_back(parent, name)]
        files = [Path(parent, name) for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
        found.append((parent, sorted(file for file in files if file.is_file())))
    return [file for _, files in sorted(found) for file in files]


def _leads_back(parent: str, name: str) -> bool:
    """Whether a folder is a link to one that it lies in."""
    link = Path(parent, name)
    return link.is_symlink() and Path(parent).resolve().is_relative_to(link.resolve())


def fault_of(file: Path | BytesIO) -> str | None:
    """Why a file is no whole image; None if it is one."""
    try:
        with Image.open(file) as image:
            image.verify()
        # An interrupted copy shows in the pixels, where `verify` looks for PNG alone.
        # `draft` reads a JPEG at an eighth of the size: about 0.1 ms for 224 px.
        if isinstance(file, BytesIO):
            file.seek(0)
        with Image.open(file) as image:
            if image.format != "PNG":
                image.draft("RGB", (1, 1))
                image.load()
    except UNREADABLE as error:
        if isinstance(error, UnidentifiedImageError):  # its text has the address of a BytesIO
            return "cannot identify image file"
        return str(error) or type(error).__name__
    return None


def tell_skipped(root: Path, faults: list[tuple[Path, str]]) -> None:
    """Warn of files that are left out, with the reason of the first."""
    # A fixed place: shown as one line without source, and once a process for the same text.
    message = f"skipped {_summary(root, faults)}"
    warnings.warn_explicit(message, UserWarning, "fleet.data", 1, registry=_SHOWN)


def _summary(root: Path, faults: list[tuple[Path, str]]) -> str:
    named = "; ".join(f"{file.relative_to(root)} ({fault})" for file, fault in faults[:3])
    more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
    count = f"{len(faults)} unreadable image{'s' if len(faults) > 1 else ''} in {root}"
    return f"{count}: {named}{more}"


def read_file(files: Sequence[Path], i: int) -> Image.Image:
    """Image i of those that lie in files, in RGB."""
    return decode(files[i], str(files[i]))


def digest_file(files: Sequence[Path], i: int) -> bytes:
    """The identity of image i of those that lie in files."""
    return digest(files[i], str(files[i]))
