"""A lock on a folder: of the processes that would work in it, one does."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from fleet.deploy import private_files
from fleet.errors import ConfigError

_FILE = "lock"
_RETRY_SECONDS = 0.05


@contextlib.contextmanager
def alone_in(
    folder: Path,
    what: str,
    *,
    option: str = "--state",
    file: str | None = _FILE,
    wait_seconds: float = 0.0,
) -> Iterator[None]:
    """Hold a folder until the end, however that comes.

    Args:
        folder: made if it is not there.
        what: works in it, for the message.
        option: that names the folder, for the message.
        file: of the lock, one for each way of working in the folder; None: the folder itself,
            which leaves no trace.
        wait_seconds: for another process to end.

    Raises:
        ConfigError: if another process holds it for that long.
    """
    private_files.make_private_folder(folder)
    try:
        handle = _open(folder, file)
    except OSError as error:
        raise ConfigError(
            f"cannot write in {folder}: {error.strerror}; give write permission there, or name "
            f"another folder with {option}"
        ) from error
    try:
        if not _lock_within(wait_seconds, handle):
            raise ConfigError(
                f"another {what} runs in {folder} already; end it first, or name another folder "
                f"with {option}"
            )
        yield
    finally:
        os.close(handle)


def somebody_in(folder: Path, file: str = _FILE) -> bool:
    """Whether a process holds a folder by the lock in `file`."""
    try:
        handle = os.open(folder / file, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:  # of another user's, who has made it
        return True
    try:
        return not _lock(handle, fcntl.LOCK_SH)
    finally:
        os.close(handle)


def _open(folder: Path, file: str | None) -> int:
    if file is None:
        return os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    return os.open(folder / file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _lock_within(seconds: float, handle: int) -> bool:
    until = time.monotonic() + seconds
    while not _lock(handle, fcntl.LOCK_EX):
        if time.monotonic() >= until:
            return False
        time.sleep(_RETRY_SECONDS)
    return True


def _lock(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
