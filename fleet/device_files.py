"""What a device brings along, checked alike by its client and by the doctor.

With the standard library alone, and any Python from 3.9 on, as the doctor is.
"""

from __future__ import annotations

import os
from pathlib import Path

from fleet.errors import ConfigError


def image_folder(data: str) -> Path:
    """The folder of a device's own images, absolute; they may be still to come.

    Args:
        data: as `--data` names it; a built-in data set is none of a device's.

    Raises:
        ConfigError: if it is no folder.
    """
    folder = os.path.abspath(os.path.expanduser(data))
    if not os.path.isdir(folder):
        raise ConfigError(
            f"--data {folder} is no folder; name one that has a folder of images for each class: "
            f"DIR/CLASS/image.jpg"
        )
    return Path(folder)


def check_key_mode(key: Path, mode: int) -> None:
    """Refuse a private key that lies open, as ssh does.

    Args:
        key: its file.
        mode: permission bits of it.

    Raises:
        ConfigError: if anybody but its owner may do anything with it.
    """
    if mode & 0o077:
        raise ConfigError(
            f"{key} is this device's private key, and its mode is {mode:04o}: others may use it; "
            f"chmod 600 {key} (on a disk without modes: take the .tar.gz), and if others use this "
            f"machine, make a new key"
        )
