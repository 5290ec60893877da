"""Files that hold secrets: readable for their owner alone, and never half written."""

import contextlib
import os
import stat
import tomllib
from pathlib import Path
from typing import Any
from uuid import uuid4

from fleet.durable import sync_folder
from fleet.errors import ConfigError

_FILE_MODE, _FOLDER_MODE = 0o600, 0o700


def make_private_folder(path: Path) -> None:
    """Make a folder, and those above it, that its owner alone can enter; one that is there stays.

    Raises:
        ConfigError: if it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=_FOLDER_MODE)
        if not path.is_dir():
            raise NotADirectoryError(None, "it is a file")
    except OSError as error:
        raise ConfigError(
            f"cannot make folder {path}: {error.strerror}; name another, or give write "
            f"permission there"
        ) from error


def write_new(path: Path, content: bytes) -> None:
    """Write a private file that was not there before; it is on the disk once this returns.

    Raises:
        ConfigError: if it is there already, or cannot be written.
    """
    if path.exists():
        raise ConfigError(f"{path} is there already, and keys are never overwritten; remove it")
    replace(path, content)


def replace(path: Path, content: bytes) -> None:
    """Write a private file in place of what was there: a reader finds the old one or the new.

    Raises:
        ConfigError: if it cannot be written; what was there before still is.
    """
    part = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _FILE_MODE)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}; free space or give write permission there"
        ) from error


def read(path: Path, what: str, way_out: str, most: int | None = None) -> bytes:
    """The content of a regular file that has to be there.

    Args:
        path: of the file.
        what: it is, for errors.
        way_out: of them.
        most: bytes that it may have; None: any number.

    Raises:
        ConfigError: if it is not there, is no regular file, has more bytes, or cannot be read.
    """
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"{path} is no regular file, and no {what}; {way_out}")
            if most is not None and status.st_size > most:
                raise ConfigError(f"{path} has {status.st_size} bytes, and is no {what}; {way_out}")
            return file.read()
    except FileNotFoundError as error:
        raise ConfigError(f"there is no {what}, {path}; {way_out}") from error
    except OSError as error:
        raise ConfigError(
            f"cannot read {what}, {path}: {error.strerror}; make it readable for this user"
        ) from error


def _without_waiting(path: str, flags: int) -> int:
    """Open even a pipe at once, which else waits for who writes into it."""
    return os.open(path, flags | os.O_NONBLOCK)


def read_toml(path: Path, what: str, way_out: str) -> dict[str, Any]:
    """The tables of a TOML file that has to be there.

    Raises:
        ConfigError: naming `what` it is and the `way_out`.
    """
    content = read(path, what, way_out)
    try:
        return tomllib.loads(content.decode())
    except ValueError as error:  # of TOML and of UTF-8 alike
        raise ConfigError(f"{what} {path} is not TOML: {error}; {way_out}") from error
