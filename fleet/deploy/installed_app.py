"""Apps that Flower sends, unpacked once and whole.

Flower 1.41 unpacks an app for every message, copies it file by file into its place, and takes
whatever lies there from then on for the app: a process that is killed meanwhile, a loss of
power or a full disk leaves half an app, of which no later message could be answered.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fleet.durable import make_folder, sync_folder, write_durably

_APPS = "apps"  # Flower's folder of them, in its home
_LOCK, _UNPACKED = ".lock", ".unpacked"
_WHOLE = ".whole-"  # and an app's SHA-256: holds the name of its folder


def install_whole(bundle: bytes, skip_prompt: bool = True) -> Path:
    """The folder of an app, where Flower looks for it; in place of `install_from_fab`.

    Args:
        bundle: the app as Flower sends it (FAB).
        skip_prompt: as Flower calls it; nobody is asked either way.

    Raises:
        click.ClickException: if the bundle is damaged.
        OSError: if it cannot be written, as on a full disk; the next call tries again.
    """
    from flwr.cli.install import install_from_fab
    from flwr.supercore.utils import get_flwr_home

    apps = get_flwr_home() / _APPS
    make_folder(apps)
    whole = apps / f"{_WHOLE}{hashlib.sha256(bundle).hexdigest()}"
    with _alone_in(apps):
        if whole.is_file() and (folder := apps / whole.read_text()).is_dir():
            return folder
        unpacked = apps / _UNPACKED
        _remove(unpacked)  # of a process that was killed
        try:
            made = install_from_fab(bundle, unpacked, skip_prompt=True)
            _sync(made)
            folder = apps / made.name
            # What lies there is half an app, or another of the same first digits.
            _forget(folder)
            made.rename(folder)
        finally:
            _remove(unpacked)
        sync_folder(apps)
        write_durably(whole, [folder.name.encode()])
        return folder


def _forget(folder: Path) -> None:
    for whole in folder.parent.glob(f"{_WHOLE}*"):
        if whole.read_text() == folder.name:
            whole.unlink()
    _remove(folder)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _sync(folder: Path) -> None:
    """See to the disk all that a folder holds."""
    for path in (*folder.rglob("*"), folder):
        sync_folder(path)  # which does for a file too


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Let no other process install meanwhile."""
    handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
