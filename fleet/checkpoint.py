"""Checkpoints: all that decides how a run goes on, a file a round.

A checkpoint is a safetensors file, so any reader shows its arrays; what is no
array stands as JSON in its metadata, beside the SHA-256 of the whole file. It
is never changed: the next round's is written beside it, and of the two the
newer one that is whole counts.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from fleet.durable import PART, make_folder, write_durably
from fleet.errors import CheckpointError
from fleet.tree import flatten, unflatten

KEPT = 2  # the newest, and one to fall back on
FORMAT = "fleet checkpoint 1"

_NAME = re.compile(r"(\d{6,})\.safetensors")
_SHA256 = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_NO_SHA256 = "0" * 64  # in its own place while the file is hashed


class Checkpoints:
    """The checkpoints of one run: `FOLDER/000012.safetensors` is that of round 12.

    Args:
        folder: of this run alone; made as the first is saved.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, number: int, tree: Any) -> None:
        """Save a round; once this returns, no loss of power undoes it.

        Killed at any moment, or on a disk that fails, it leaves the checkpoints
        that there were. Of these the last one is kept too, older ones go.

        Args:
            number: of the round.
            tree: plain values and arrays, see `fleet.tree`.

        Raises:
            CheckpointError: if the tree holds anything else, naming it, or the
                file cannot be written.
        """
        parts = _encode(tree)
        path = self._path(number)
        try:
            make_folder(self.folder)
            write_durably(path, parts)
            self._keep(KEPT)
        except OSError as error:
            raise CheckpointError(
                f"cannot write checkpoint {path}: {error.strerror or error}; the one before it is "
                f"as it was: free space or give write permission there, then resume the run"
            ) from error

    def load(self) -> tuple[int, Any] | None:
        """The newest round that is whole, and its tree; None if there is no checkpoint.

        A damaged one is passed over, with one warning that names it.

        Raises:
            CheckpointError: if all that there are are damaged, or one was written
                by another version.
        """
        damaged = []
        for number, path in self._there():
            try:
                return number, _decode(_read(path))
            except _Damaged as error:
                damaged.append(f"{path}: {error}")
                _warn(f"checkpoint {path} is damaged ({error}); the one before it is used")
        if damaged:
            raise CheckpointError(
                f"no checkpoint of this run is whole ({'; '.join(damaged)}); put a copy in its "
                f"place, or begin the run anew in another run-dir"
            )
        return None

    def drop_older(self) -> None:
        """Keep the newest alone, as after a run that has ended well; or all, if none can go."""
        with suppress(OSError):
            self._keep(1)

    def __len__(self) -> int:
        """How many there are, damaged ones included."""
        return len(self._there())

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def _there(self) -> list[tuple[int, Path]]:
        """Rounds and their files, the newest first."""
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _unreadable(self.folder, error) from error
        found = (_NAME.fullmatch(name) for name in names)
        return sorted(((int(m[1]), self.folder / m[0]) for m in found if m), reverse=True)

    def _keep(self, count: int) -> None:
        for _, path in self._there()[count:]:
            os.unlink(path)
        for path in self.folder.glob(f"*{PART}"):  # of a writer that was killed
            path.unlink(missing_ok=True)


class _Damaged(Exception):
    """Bytes that are not those that were written, and how that shows."""


def _encode(tree: Any) -> Iterator[bytes | memoryview]:
    """The bytes of a checkpoint, in parts."""
    written, arrays = flatten(tree)
    # Not ascontiguousarray, which gives a scalar a dimension.
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    about = {"format": FORMAT, "tree": json.dumps(written), "sha256": _NO_SHA256}
    data = safetensors.numpy.save(arrays, about)
    header, body = _parted(data)
    (place,) = _SHA256.finditer(header)
    digest = hashlib.sha256(header)
    digest.update(body)
    start, end = place.span(1)
    return iter((header[:start] + digest.hexdigest().encode() + header[end:], body))


def _decode(data: bytes) -> Any:
    """The tree of a checkpoint's bytes.

    Raises:
        _Damaged: if any bit of them is not as it was written.
        CheckpointError: if they are whole, and another version's.
    """
    header, body = _parted(data)
    places = list(_SHA256.finditer(header))
    if len(places) != 1:
        raise _Damaged("its header is cut or overwritten")
    start, end = places[0].span(1)
    digest = hashlib.sha256(header[:start] + _NO_SHA256.encode() + header[end:])
    digest.update(body)
    if digest.hexdigest() != places[0][1].decode():
        raise _Damaged("its SHA-256 is not that of its content")
    about = _metadata(header)
    if about.get("format") != FORMAT:
        raise CheckpointError(
            f"a checkpoint is in the format {about.get('format')}, this version reads {FORMAT}; "
            f"resume the run with the version that began it"
        )
    return unflatten(json.loads(about["tree"]), _arrays(data))


def _parted(data: bytes) -> tuple[bytes, memoryview]:
    """Header, its length before it included, and what lies behind it."""
    end = 8 + int.from_bytes(data[:8], "little")
    return data[:end], memoryview(data)[end:]


def _metadata(header: bytes) -> Mapping[str, str]:
    return json.loads(header[8:])["__metadata__"]


def _arrays(data: bytes) -> dict[str, np.ndarray]:
    arrays = safetensors.numpy.load(data)
    # Whoever kept an array may have changed it in place from round to round.
    return {name: a if a.flags.writeable else a.copy() for name, a in arrays.items()}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"cannot read {path}: {error.strerror or error}; make it readable for this user"
    )


@cache  # once a process
def _warn(text: str) -> None:
    logging.getLogger(__name__).warning(text)
