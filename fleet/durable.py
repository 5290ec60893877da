"""Files that are on the disk whole or not at all, and waiting for a disk that is full."""

import errno
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")

FULL = (errno.ENOSPC, errno.EDQUOT)
PART = ".part"  # at the end of the name of what is being written

_patient = True


def write_durably(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file in place of what was there; it outlives a loss of power once this returns.

    Killed at any moment, or on a disk that fails, it leaves either what was
    there before or the new, and perhaps a file that ends in `.part`.

    Raises:
        OSError: if it cannot be written; what was there before still is.
    """
    part = path.with_name(path.name + PART)
    try:
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            for content in parts:
                _write(handle, content)
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(part, path)
    except OSError:
        with suppress(OSError):
            os.unlink(part)
        raise
    sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; all that are new outlive a loss of power.

    Raises:
        OSError: if one cannot be made.
    """
    absent = []
    while not folder.is_dir():
        absent.append(folder)
        folder = folder.parent
    for each in reversed(absent):
        each.mkdir(exist_ok=True)
        sync_folder(each.parent)


def sync_folder(folder: Path) -> None:
    """See to the disk which files are in a folder, under which names.

    Raises:
        OSError: if it cannot be done.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def without_waiting() -> Iterator[None]:
    """Let `waiting_for_room` try once until the block ends: for work that is cheaply done again."""
    global _patient
    before, _patient = _patient, False
    try:
        yield
    finally:
        _patient = before


def waiting_for_room(
    action: Callable[[], Result], seconds: float = 120.0, poll_seconds: float = 2.0
) -> Result:
    """Do something, again and again while the disk is full; once within `without_waiting`.

    Args:
        action: raises OSError, or another error with one as its cause, if there is
            no room, and may be done again then.
        seconds: after which what it raises is raised.
        poll_seconds: between two attempts.
    """
    deadline = time.monotonic() + (seconds if _patient else 0.0)
    told = False
    while True:
        try:
            return action()
        except Exception as error:
            if not is_full(error) or time.monotonic() >= deadline:
                raise
            if not told:
                logging.getLogger(__name__).warning(
                    "%s; waiting up to %g s for room", error, seconds
                )
                told = True
        time.sleep(poll_seconds)


def is_full(error: BaseException) -> bool:
    """Whether an error, or what it comes from, is that the disk is full."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in FULL:
            return True
        cause = cause.__cause__
    return False


def _write(handle: int, content: bytes | memoryview) -> None:
    left = memoryview(content).cast("B")
    while len(left):
        left = left[os.write(handle, left) :]
