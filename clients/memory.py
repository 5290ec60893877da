"""What a client remembers of a run between messages, on its disk.

Flower starts a fresh process for every message, and its own state of a node is
lost as the node restarts. So residuals, versions and the like lie in files, one
a part, each written whole or not at all.
"""

import hashlib
import json
import logging
import os
import re
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from uuid import uuid4

import numpy as np
import safetensors.numpy

from fleet.durable import sync_folder
from fleet.errors import ConfigError, UpdateError
from fleet.paths import expanded
from fleet.state import Arrays

FORGOTTEN_SECONDS = 30 * 24 * 3600  # a run that nobody touched for so long goes
STALE_SECONDS = 3600  # after that, a file that was not finished never will be

_RUN = re.compile(r"[0-9a-f]{1,64}")
_PART = re.compile(r"[a-z0-9][a-z0-9-]*")
_SUFFIX = ".safetensors"
NO_FACTS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Remembered:
    """One part of a client's memory.

    Attributes:
        tensors: name → array, of any dtype; raw bytes are a uint8 array.
        facts: name → text.
    """

    tensors: dict[str, np.ndarray]
    facts: dict[str, str]


class ClientMemory:
    """What one client remembers of one run, in parts that have a name each.

    A part is a safetensors file, `DIRECTORY/RUN/CLIENT/PART.safetensors`. As a
    client writes for the first time in a run, runs below `directory` that were
    not touched for 30 days are removed, whosever they are.

    Args:
        directory: of all runs and clients, `state_directory`; made if it is not there.
        run: hexadecimal id of the run, at most 64 digits.
        client: name of the client, any text.

    Raises:
        UpdateError: for an id that is not hexadecimal: it would be a path.
    """

    def __init__(self, directory: Path, run: str, client: str) -> None:
        if not _RUN.fullmatch(run):
            raise UpdateError(
                f"a run's id is 1 to 64 digits from 0 to f, got {run[:80]!r}; "
                f"run the same version on server and client"
            )
        self._directory = Path(directory)
        self._run = self._directory / run
        self._folder = self._run / file_name(client)

    def read(self, part: str) -> Remembered | None:
        """What was written last; None if nothing was, or it is damaged.

        A damaged file is removed, with one warning.

        Raises:
            ConfigError: if the file is there and cannot be read.
        """
        path = self._path(part)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(
                f"cannot read {path}: {_reason(error)}; make it readable for this user, or set "
                f"state-dir to another folder"
            ) from error
        with suppress(OSError):
            os.utime(self._run)
        try:
            return _decode(data)
        except Exception as error:  # safetensors, JSON and NumPy raise a dozen kinds
            _warn(f"dropped {path}, which is damaged: {error}; this client starts it anew")
            self.forget(part)
            return None

    def write(self, part: str, tensors: Arrays, facts: Mapping[str, str] = NO_FACTS) -> None:
        """Remember a part in place of what it was; it is on the disk once this returns.

        Killed at any moment, it leaves either what was there before or the new.

        Args:
            part: small letters, digits and hyphens.
            tensors: of any shape; bool, whole numbers, float16, float32 or float64.
            facts: texts.

        Raises:
            ConfigError: if it cannot be written; what was there before still is.
        """
        path = self._path(part)
        # A name of its own: two processes that write a part do not mix their bytes.
        partial = path.with_name(f"{part}.{uuid4().hex}.part")
        try:
            self._make_folder()
            try:
                with partial.open("xb") as file:
                    file.write(_encode(tensors, facts))
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, path)
                sync_folder(path.parent)
            finally:
                with suppress(OSError):
                    partial.unlink(missing_ok=True)
            os.utime(self._run)
        except OSError as error:
            raise ConfigError(
                f"cannot write {path}: {_reason(error)}; free space or give write permission "
                f"there, or set state-dir to another folder"
            ) from error

    def forget(self, part: str) -> None:
        """Remove a part, if it is there.

        Raises:
            ConfigError: if it cannot be removed.
        """
        path = self._path(part)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot remove {path}: {_reason(error)}; give write permission there"
            ) from error

    def parts(self) -> list[str]:
        """Names of the parts that are there.

        Raises:
            ConfigError: if the folder cannot be read.
        """
        try:
            names = os.listdir(self._folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ConfigError(
                f"cannot read {self._folder}: {_reason(error)}; make it readable for this user, "
                f"or set state-dir to another folder"
            ) from error
        return [n.removesuffix(_SUFFIX) for n in names if n.endswith(_SUFFIX)]

    def _path(self, part: str) -> Path:
        if not _PART.fullmatch(part):
            raise ValueError(f"a part's name is of small letters, digits and hyphens, got {part!r}")
        return self._folder / f"{part}{_SUFFIX}"

    def _make_folder(self) -> None:
        if not self._run.is_dir():
            _forget_old_runs(self._directory)
        self._folder.mkdir(parents=True, exist_ok=True)
        _remove_files(self._folder, "*.part", time.time() - STALE_SECONDS)


def state_directory(setting: str) -> Path:
    """Where clients' memories lie: the setting, else $FLEET_STATE, else ~/.local/state/fleet."""
    where = setting or os.environ.get("FLEET_STATE") or "~/.local/state/fleet"
    return expanded(where, "state-dir")


def file_name(client: str) -> str:
    """A name that every file system takes, and that no other client has.

    What can be read of it is for people; the digest tells clients apart, also
    where a disk ignores case.
    """
    readable = re.sub(r"[^a-z0-9]+", "-", client.lower())[:40].strip("-")
    digest = hashlib.sha256(client.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return f"{readable}-{digest}".lstrip("-")


def _encode(tensors: Arrays, facts: Mapping[str, str]) -> bytes:
    # Not ascontiguousarray, which gives a scalar a dimension.
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    written = json.dumps(dict(facts), sort_keys=True)
    about = {"facts": written, "checksum": _checksum(arrays, written)}
    return safetensors.numpy.save(arrays, about)


def _decode(data: bytes) -> Remembered:
    tensors = safetensors.numpy.load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    about = header["__metadata__"]
    # safetensors checks its header alone, not what the tensors hold.
    if _checksum(tensors, about["facts"]) != about["checksum"]:
        raise ValueError("its checksum is not that of its content")
    return Remembered(tensors, json.loads(about["facts"]))


def _checksum(arrays: Arrays, facts: str) -> str:
    crc = zlib.crc32(facts.encode())
    for name, array in sorted(arrays.items()):
        crc = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), crc)
        crc = zlib.crc32(array.reshape(-1).view(np.uint8), crc)
    return f"{crc:08x}"


def _forget_old_runs(directory: Path) -> None:
    """Remove runs that nobody touched for long; what is not a memory stays."""
    before = time.time() - FORGOTTEN_SECONDS
    for run in _folders(directory):
        with suppress(OSError):
            if not _RUN.fullmatch(run.name) or run.stat().st_mtime >= before:
                continue
            for client in _folders(run):
                _remove_files(client, "*.safetensors")
                _remove_files(client, "*.part")
                with suppress(OSError):  # it holds something else
                    client.rmdir()
            run.rmdir()


def _folders(directory: Path) -> Iterator[Path]:
    with suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield Path(entry.path)


def _remove_files(folder: Path, pattern: str, before: float = float("inf")) -> None:
    """Remove files that were written last before a moment, in seconds of the epoch."""
    for file in folder.glob(pattern):
        with suppress(OSError):
            if file.stat().st_mtime < before:
                file.unlink()


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


@cache  # once a process
def _warn(text: str) -> None:
    logging.getLogger(__name__).warning(text)
