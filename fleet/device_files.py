"""What a device brings along, checked alike by its client and by the doctor.

With the standard library alone, and any Python from 3.9 on, as the doctor is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from fleet.errors import ConfigError
from fleet.paths import expanded

# A service's `ProtectHome=tmpfs` and `PrivateTmp=yes` hide what lies here, unless it is bound in.
_HIDDEN = tuple(map(Path, ("/home", "/root", "/run/user", "/tmp", "/var/tmp")))


def image_folder(data: str) -> Path:
    """The folder of a device's own images, absolute; they may be still to come.

    Args:
        data: as `--data` names it; a built-in data set is none of a device's.

    Raises:
        ConfigError: if it is no folder.
    """
    folder = os.path.abspath(expanded(data, "--data"))
    if not os.path.isdir(folder):
        raise ConfigError(
            f"--data {folder} is no folder; name one that has a folder of images for each class: "
            f"DIR/CLASS/image.jpg"
        )
    return Path(folder)


def hidden(path: Path) -> bool:
    """Whether a service's sandbox hides a path unless it is bound in."""
    return any(path.is_relative_to(place) for place in _HIDDEN)


def dead_links(data: Path) -> list[Path]:
    """Links below a folder of images that lead to nothing that this process sees."""
    return [link for link in _links(data) if not link.exists()]


def links_lost_to_services(data: Path) -> list[Path]:
    """Links below a folder of images behind which a service, that sees the folder, sees nothing."""
    folder = data.resolve()

    def seen(target: Path) -> bool:
        return target.exists() and (target.is_relative_to(folder) or not hidden(target))

    # `resolve` raises of a link that leads to itself.
    return [link for link in _links(data) if not seen(Path(os.path.realpath(link)))]


def told_of_links(data: Path, links: list[Path]) -> tuple[str, str] | None:
    """What is wrong with links, and the way out; None if there are none."""
    if not links:
        return None
    many = len(links) > 1
    return (
        f"{len(links)} link{'s' if many else ''} in {data} lead{'' if many else 's'} to nothing, "
        f"or to what a service does not see, and what lies there takes no part; the first is "
        f"{links[0]}, to {os.readlink(links[0])}",
        f"copy the images into {data}",
    )


def _links(data: Path) -> Iterator[Path]:
    """In the order of their names, those to folders among them; hidden ones are no images."""
    for parent, folders, files in os.walk(data):
        folders.sort()
        for name in sorted([*folders, *files]):
            link = Path(parent, name)
            if not name.startswith(".") and link.is_symlink():
                yield link


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
