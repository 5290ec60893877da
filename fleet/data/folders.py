"""An ImageFolder directory: a folder for each class. Needs Pillow alone."""

import os
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from PIL import Image

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
    parts = {name: root / name for name in ("train", *TEST_NAMES) if _subfolders(root / name)}
    if "train" not in parts:
        classes = _classes(root)
        return held_out(_load(root, classes, skip_unreadable), split)
    classes = _classes(parts["train"])
    chosen, cut = choose_split(parts, split, str(root))
    strangers = sorted(set(_subfolders(chosen)) - set(classes))
    if strangers:
        raise ConfigError(
            f"{chosen} has classes that {parts['train']} lacks: {', '.join(strangers)}; "
            f"the folders of both must be the same classes"
        )
    data = _load(chosen, classes, skip_unreadable)
    return held_out(data, split) if cut else data


def _classes(root: Path) -> tuple[str, ...]:
    classes = tuple(_subfolders(root))
    if not classes:
        raise ConfigError(
            f"{root} has no class folders; put the images of each class in a folder of its own: "
            f"{root / 'CLASS' / 'image.jpg'}"
        )
    return classes


def _subfolders(root: Path) -> list[str]:
    if not root.is_dir():
        return []
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _load(root: Path, classes: tuple[str, ...], skip_unreadable: bool) -> ImageData:
    files, labels = [], []
    for label, name in enumerate(classes):
        if not (root / name).is_dir():  # the test part may lack a class
            continue
        found = _image_files(root / name)
        if not found:
            raise ConfigError(
                f"class folder {root / name} has no images ({', '.join(IMAGE_SUFFIXES)}); "
                f"fill it or remove it"
            )
        files += found
        labels += [label] * len(found)
    unreadable = {i: fault for i, file in enumerate(files) if (fault := _fault(file))}
    if unreadable:
        _report(root, [(files[i], fault) for i, fault in unreadable.items()], skip_unreadable)
    good = [i for i in range(len(files)) if i not in unreadable]
    kept = tuple(files[i] for i in good)
    read, identify = partial(_read_file, kept), partial(digest_file, kept)
    return ImageData(str(root), classes, [labels[i] for i in good], read, identify)


def _image_files(folder: Path) -> list[Path]:
    """All image files below `folder`, in torchvision's order."""
    return [
        Path(parent, file)
        for parent, _, names in sorted(os.walk(folder, followlinks=True))
        for file in sorted(names)
        if file.lower().endswith(IMAGE_SUFFIXES)
    ]


def _fault(file: Path) -> str | None:
    try:
        with Image.open(file) as image:
            image.verify()
        # An interrupted copy shows in the pixels, where `verify` looks for PNG alone.
        # `draft` reads a JPEG at an eighth of the size: about 0.1 ms for 224 px.
        with Image.open(file) as image:
            if image.format != "PNG":
                image.draft("RGB", (1, 1))
                image.load()
    except UNREADABLE as error:
        return str(error) or type(error).__name__
    return None


def _report(root: Path, faults: list[tuple[Path, str]], skip_unreadable: bool) -> None:
    named = "; ".join(f"{file.relative_to(root)} ({fault})" for file, fault in faults[:3])
    more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
    count = f"{len(faults)} unreadable image{'s' if len(faults) > 1 else ''} in {root}"
    if not skip_unreadable:
        raise ConfigError(
            f"{count}: {named}{more}; repair or remove them, or skip them "
            f"with skip-unreadable = true"
        )
    # A fixed place: shown as one line without source, and once a process for the same text.
    message = f"skipped {count}: {named}{more}"
    warnings.warn_explicit(message, UserWarning, "fleet.data", 1, registry=_SHOWN)


def _read_file(files: tuple[Path, ...], i: int) -> Image.Image:
    return decode(files[i], str(files[i]))


def digest_file(files: Sequence[Path], i: int) -> bytes:
    """The identity of image i of those that lie in files."""
    return digest(files[i], str(files[i]))
