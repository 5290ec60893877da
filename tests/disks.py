"""Disks that are small, and full when a test wants them to be: mounts of tmpfs, by root alone."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

_BALLAST = "ballast"


@contextlib.contextmanager
def small_disk(folder: Path, mib: int) -> Iterator["Disk"]:
    """A disk of its own, of so many MiB, in a folder that is made for it."""
    folder.mkdir(parents=True)
    options = f"size={mib}m,mode=700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    try:
        yield Disk(folder)
    finally:
        # Lazily: what is still open there must not keep the folder.
        subprocess.run(["umount", "--lazy", folder], check=True)


class Disk:
    """A disk that can be filled and freed.

    Attributes:
        folder: where it is mounted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self) -> None:
        """Leave not a byte; also what was freed since the last time."""
        with (self.folder / _BALLAST).open("ab", buffering=0) as ballast:
            for size in (2**20, 4096, 1):
                with contextlib.suppress(OSError):
                    while ballast.write(bytes(size)):
                        pass

    def free(self) -> None:
        """Undo `fill`."""
        (self.folder / _BALLAST).unlink()


def disks_can_be_made(folder: Path) -> bool:
    """Whether this user may mount them."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    try:
        with small_disk(folder, 1):
            return True
    except subprocess.CalledProcessError:
        return False
