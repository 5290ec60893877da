"""A lock on a folder: of the processes that would work in it, one does."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from fleet.deploy import private_files
from fleet.errors import ConfigError

_FILE = "lock"


@contextlib.contextmanager
def alone_in(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder until the end, however that comes.

    Args:
        folder: made if it is not there.
        what: works in it, for the message.

    Raises:
        ConfigError: if another process holds it.
    """
    private_files.make_private_folder(folder)
    try:
        handle = os.open(folder / _FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"cannot write in {folder}: {error.strerror}; give write permission there, or name "
            f"another folder with --state"
        ) from error
    try:
        if not _lock(handle, fcntl.LOCK_EX):
            raise ConfigError(
                f"another {what} runs in {folder} already; end it first, or name another folder "
                f"with --state"
            )
        yield
    finally:
        os.close(handle)


def somebody_in(folder: Path) -> bool:
    """Whether a process holds a folder."""
    try:
        handle = os.open(folder / _FILE, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:  # of another user's, who has made it
        return True
    try:
        return not _lock(handle, fcntl.LOCK_SH)
    finally:
        os.close(handle)


def _lock(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
