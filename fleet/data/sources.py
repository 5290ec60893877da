"""What the setting `data` may name, and how each is opened."""

import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fleet.data.folders import digest_file, load_folder
from fleet.data.growing import load_growing
from fleet.data.images import ImageData, digest, found, need
from fleet.data.splits import Split, held_out, take_stratified
from fleet.data.tables import SUFFIXES, load_hugging_face, load_table, table_files
from fleet.errors import ConfigError
from fleet.paths import expanded

# Name → class in torchvision.datasets, files that it looks for below the root.
TORCHVISION = {
    "cifar10": ("CIFAR10", "cifar-10-python.tar.gz"),
    "cifar100": ("CIFAR100", "cifar-100-python.tar.gz"),
    "flowers102": (
        "Flowers102",
        "flowers-102/102flowers.tgz, flowers-102/imagelabels.mat and flowers-102/setid.mat",
    ),
    "food101": ("Food101", "food-101.tar.gz"),
}
BUILT_IN = ("digits", *TORCHVISION)
_DIGITS = Path("datasets", "data", "digits.csv.gz")  # in the package sklearn; 64 pixels, label
FORMS = (
    f"digits, {', '.join(TORCHVISION)}, hf:OWNER/NAME (Hugging Face), a parquet or arrow file or "
    f"a folder of them, or an ImageFolder directory (DIR/CLASS/image.jpg)"
)


def load_data(
    source: str, split: Split, *, limit: int = 0, skip_unreadable: bool = False, seed: int = 0
) -> ImageData:
    """Open a labelled image set.

    A source without a test part gives the same stratified 20 % of its examples
    as test in every run, whatever the seed.

    Args:
        source: a built-in name (`digits`, or a data set of torchvision, kept in
            $FLEET_DATA or ~/.cache/fleet/data), `hf:OWNER/NAME`, or a path.
        split: `train` or `test`; a validation part serves where there is no test.
        limit: a stratified subset of so many examples; 0 for all.
        skip_unreadable: leave unreadable images of an ImageFolder out, with a
            warning. Other sources name an unreadable image when it is read.
        seed: of the subset.

    Raises:
        ConfigError: for an unknown source, one that is not there or cannot be
            downloaded, bad contents, fewer than two classes, a limit above the
            number of examples, or a missing optional extra.
    """
    if limit < 0:
        raise ConfigError(f"a limit of examples must be 0, for all, or more; got {limit}")
    data = _open(source, split, skip_unreadable)
    _check(data, source, split)
    return take_stratified(data, limit, seed) if limit else data


def load_device_data(source: str) -> tuple[ImageData, ImageData]:
    """Training and held-out images of a device, as they are now.

    An ImageFolder may grow and shrink, and may lack classes of the task:
    `load_growing`. Other sources are as `load_data` opens them.

    Args:
        source: as `load_data` takes it.

    Raises:
        ConfigError: as `load_data` and `load_growing`.
    """
    path = expanded(source, "data")
    if source not in BUILT_IN and os.path.isdir(path) and not table_files(path):
        return load_growing(path)
    return load_data(source, "train"), load_data(source, "test")


def _check(data: ImageData, source: str, split: Split) -> None:
    if not len(data):
        raise ConfigError(f"{source} has no {split} examples; add images or use other data")
    present = np.unique(data.labels)
    if len(data.classes) < 2 or (split == "train" and len(present) < 2):
        raise ConfigError(
            f"{source} has {split} examples of only one class, {data.classes[present[0]]}; "
            f"training needs at least 2"
        )


def _open(source: str, split: Split, skip_unreadable: bool) -> ImageData:
    path = expanded(source, "data")
    if source == "digits":
        return _digits(split)
    if source in TORCHVISION:
        return _torchvision(source, split)
    if source.startswith("hf:"):
        return load_hugging_face(source.removeprefix("hf:"), split)
    if os.path.exists(path):  # Path's own raises for a name that is too long
        return _open_path(path, split, skip_unreadable)
    check_source(source)
    return load_hugging_face(source, split)  # the one form that is left


def check_source(source: str) -> None:
    """Refuse what is of no known form, or a path that is not there; nothing is read.

    Raises:
        ConfigError: naming the forms.
    """
    path = expanded(source, "data")
    if source in BUILT_IN or source.startswith("hf:") or os.path.exists(path):
        return
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) and path.suffix not in SUFFIXES:
        return  # of Hugging Face
    if "/" in source or os.sep in source or path.suffix:
        raise ConfigError(f"data {source} does not exist; known forms: {FORMS}")
    raise ConfigError(f"data {source!r} is neither a known name nor a path here; known: {FORMS}")


def _open_path(path: Path, split: Split, skip_unreadable: bool) -> ImageData:
    if table_files(path):
        return load_table(path, split)
    if path.is_dir():
        return load_folder(path, split, skip_unreadable=skip_unreadable)
    raise ConfigError(f"data {path} is a {path.suffix or 'plain'} file; known forms: {FORMS}")


def _digits(split: Split) -> ImageData:
    """scikit-learn's, whose file is read without it: to import it takes longer than a round."""
    path = found("sklearn", "data digits") / _DIGITS
    if not path.is_file():
        raise ConfigError(f"scikit-learn should hold {path} and does not; install it again")
    table = np.loadtxt(path, delimiter=",")
    pixels, target = table[:, :-1], table[:, -1].astype(np.int64)
    grey = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)  # stored as 0 to 16
    classes = tuple(str(name) for name in range(10))
    read, identify = partial(_read_grey, grey), partial(_digest_array, grey)
    return held_out(ImageData("digits", classes, target, read, identify), split)


def _read_grey(grey: np.ndarray, i: int) -> Image.Image:
    return Image.fromarray(grey[i]).convert("RGB")


def _torchvision(source: str, split: Split) -> ImageData:
    datasets = need("torchvision.datasets", f"data {source}")
    if source == "flowers102":
        need("scipy.io", f"data {source}")
    name, files = TORCHVISION[source]
    root = expanded(os.environ.get("FLEET_DATA") or "~/.cache/fleet/data", "FLEET_DATA")
    which = {"train": split == "train"} if name.startswith("CIFAR") else {"split": split}
    try:
        loaded = getattr(datasets, name)(root, download=True, **which)  # nothing if it is there
    except (OSError, RuntimeError) as error:  # no network is an OSError, a bad checksum is not
        raise ConfigError(
            f"{source} is not in {root} and could not be downloaded: {error}; connect to the "
            f"internet, or put {files} in that folder (FLEET_DATA names another), or give a local "
            f"parquet folder or an ImageFolder directory as data"
        ) from error
    labels = loaded.targets if hasattr(loaded, "targets") else loaded._labels
    read = partial(_read_item, loaded)
    if name.startswith("CIFAR"):
        identify = partial(_digest_array, loaded.data)
    else:
        identify = partial(digest_file, loaded._image_files)
    return ImageData(source, tuple(loaded.classes), labels, read, identify)


def _read_item(loaded: Any, i: int) -> Image.Image:
    return loaded[i][0].convert("RGB")


def _digest_array(images: np.ndarray, i: int) -> bytes:
    return digest(images[i])
