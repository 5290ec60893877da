"""Apps that Flower sends, unpacked once and whole.

Flower 1.41 unpacks an app for every message, copies it file by file into its place, and takes
whatever lies there from then on for the app: a process that is killed meanwhile, a loss of
power or a full disk leaves half an app, of which no later message could be answered.
"""

import hashlib
import shutil
from pathlib import Path

from fleet.deploy.one_at_a_time import alone_in
from fleet.durable import sync_folder, write_durably

_APPS = "apps"  # Flower's folder of them, in its home
_LOCK, _UNPACKED = ".lock", ".unpacked"
_LOCK_SECONDS = 60.0  # for another process to install: it takes a second, on a slow card ten
_WHOLE = ".whole-"  # and an app's SHA-256: holds the name of its folder


def install_whole(bundle: bytes, skip_prompt: bool = True) -> Path:
    """The folder of an app, where Flower looks for it; in place of `install_from_fab`.

    Args:
        bundle: the app as Flower sends it (FAB).
        skip_prompt: as Flower calls it; nobody is asked either way.

    Raises:
        click.ClickException: if the bundle is damaged.
        OSError, ConfigError: if it cannot be written, as on a full disk, or another process
            takes too long; the next call tries again.
    """
    from flwr.cli.install import install_from_fab
    from flwr.supercore.utils import get_flwr_home

    apps = get_flwr_home() / _APPS
    whole = apps / f"{_WHOLE}{hashlib.sha256(bundle).hexdigest()}"
    waiting = {"option": "FLWR_HOME", "file": _LOCK, "wait_seconds": _LOCK_SECONDS}
    with alone_in(apps, "installation of an app", **waiting):
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
