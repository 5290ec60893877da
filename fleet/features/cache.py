"""What the frozen part of a network made of an image, kept on disk for later epochs and rounds.

A key's rows lie in shards that are written once, whole, under a name of their
own, and never changed. So several processes may share a key, and being killed
costs the rows of one shard. Nothing here is needed to train: whatever cannot be
written, is missing or is damaged is made anew by the caller.
"""

import logging
import mmap
import os
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Self
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from fleet.config import CACHES
from fleet.errors import ConfigError
from fleet.features.shards import FOLDER, files_in, folders_in, header_of, opened_at, write_whole
from fleet.mobiletl.stash import keep, restore

PRECISIONS = CACHES[1:]
SHARD_BYTES = 4 * 2**20  # at most, or one row: what is held back before it is written
STALE_SECONDS = 3600  # after that, a file that was not finished never will be
OPENED_SECONDS = 60  # a key that is in use is marked as opened no more often

_ID_BYTES = 16
_SETTLED_SECONDS = 1


class FeatureCache:
    """Rows of features on disk, by 16-byte ids; a context that writes what is left on exit.

    A row is 20 bytes (int8: 28) and its features. Feature maps lie as (H, W, C),
    so that a batch of them is channels_last as it is read.

    All keys below `directory` together stay within `max_bytes`; every further
    process that writes at the same moment may add a shard. For room, shards of
    other keys go, those of the key that was opened longest ago first. A key
    never loses rows to itself: training reads in cycles, in which the oldest
    row is the next to be used.

    Args:
        directory: of all keys; made if it is not there.
        key: hex digest of all that decides the features, but the image.
        shape: of one row: (C, H, W) or (C,).
        precision: one of `PRECISIONS`; int8 has a lowest value and a step a row.
        max_bytes: on disk.

    Raises:
        ConfigError: for an unknown precision.
        ValueError: for a key that is no hex digest.
    """

    def __init__(
        self, directory: Path, key: str, shape: tuple[int, ...], precision: str, max_bytes: int
    ) -> None:
        if precision not in PRECISIONS:
            raise ConfigError(
                f"unknown cache precision {precision}; known: {', '.join(PRECISIONS)}"
            )
        self._directory = Path(directory)
        self._folder = self._directory / f"{key}-{precision}"
        if not FOLDER.fullmatch(self._folder.name):
            raise ValueError(f"a cache key is a hex digest, got {key!r}")
        self._shape = tuple(shape)
        self._precision = precision
        self._max_bytes = max_bytes
        self._dtype = _row_dtype(self._shape, precision)
        self._seed = zlib.crc32(key.encode())
        self._known = _known_of(self._folder, self._dtype)
        self._index = self._known.rows
        self._buffer: dict[bytes, bytes] = {}  # rows to be written
        self._stores = True
        try:
            self._open()
        except (OSError, ValueError) as error:  # ValueError: no path at all
            self._stop_after(error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def __len__(self) -> int:
        """Rows that are there, as far as known without reading them."""
        return len(self._index) + len(self._buffer)

    def __contains__(self, row_id: bytes) -> bool:
        return row_id in self._index or row_id in self._buffer

    @property
    def nbytes(self) -> int:
        """Bytes of this key on disk."""
        with suppress(OSError):
            return sum(size for size, _ in files_in(self._folder).values())
        return 0

    def round_trip(self, x: Tensor) -> Tensor:
        """Rows as they would come back from disk, bit for bit.

        Beyond ±65504, float16 gives ±65504. What is not finite becomes NaN, at
        int8 the whole row with it, so that a check of the loss sees it.

        Args:
            x: (N, *shape) float32.

        Returns:
            (N, *shape) float32 on x's device, maps in channels_last.

        Raises:
            ValueError: for a wrong shape.
        """
        self._check(x)
        return self._decode(self._encode(x)).to(x.device)

    def read(self, ids: Sequence[bytes]) -> tuple[Tensor, Tensor]:
        """Rows by id, for the caller to fill in those that are not there.

        Returns:
            (N, *shape) float32, maps in channels_last, with NaN for absent and
            damaged rows; and (N,) bool, which rows were found.
        """
        raw = np.empty((len(ids), self._dtype.itemsize), np.uint8)
        found = torch.tensor([self._fetch(*pair) for pair in zip(ids, raw, strict=True)]).bool()
        x = self._decode(raw.view(self._dtype)[:, 0])
        if not found.all():
            x[~found] = torch.nan
        return x, found

    def write(self, ids: Sequence[bytes], x: Tensor) -> None:
        """Keep rows; left out are those that are there already or not finite.

        They are on disk when a shard is full and after `flush`. What cannot be
        written is dropped, with one warning.

        Args:
            x: (N, *shape) float32.

        Raises:
            ValueError: for a wrong shape, or ids that are not N of 16 bytes.
        """
        self._check(x)
        if len(ids) != len(x) or any(len(row_id) != _ID_BYTES for row_id in ids):
            raise ValueError(f"{len(x)} rows need as many ids of {_ID_BYTES} bytes")
        if not self._stores:
            return
        new = [n for n, row_id in enumerate(ids) if row_id not in self]
        rows = self._encode(x[new])
        finite = self._decode(rows).flatten(1).isfinite().all(1).tolist()
        for row_id, row, is_finite in zip([ids[n] for n in new], rows, finite, strict=True):
            if is_finite and self._stores and row_id not in self:
                self._buffer[row_id] = self._seal(row_id, row)
                if (len(self._buffer) + 1) * self._dtype.itemsize > SHARD_BYTES:
                    self.flush()

    def flush(self) -> None:
        """Write what is held back."""
        try:
            if self._buffer:
                self._write_shard()
        except OSError as error:
            self._stop_after(error)
        self._buffer.clear()

    # Rows

    def _check(self, x: Tensor) -> None:
        if x.shape[1:] != self._shape:
            raise ValueError(
                f"features have shape {tuple(x.shape)}, this cache holds (N, "
                f"{', '.join(map(str, self._shape))})"
            )

    def _encode(self, x: Tensor) -> np.ndarray:
        """(N, *shape) → (N,) rows that have neither id nor checksum yet."""
        x = x.detach().to("cpu", torch.float32)
        x = x.masked_fill(~x.isfinite(), torch.nan)
        if len(self._shape) == 3:
            x = x.permute(0, 2, 3, 1)
        rows = np.zeros(len(x), self._dtype)
        if self._precision == "float16":
            top = torch.finfo(torch.float16).max
            rows["features"] = x.clamp_(-top, top).half().numpy()
            return rows
        for n, image in enumerate(x):
            codes, lowest, step = keep(image, None, "int8")
            rows["features"][n] = codes.numpy()
            rows["lowest"][n], rows["step"][n] = lowest.item(), step.item()
        return rows

    def _decode(self, rows: np.ndarray) -> Tensor:
        features = torch.from_numpy(rows["features"])
        if self._precision == "float16":
            x = features.float()
        else:
            one_a_row = (-1,) + (1,) * len(self._shape)
            scale = (torch.from_numpy(rows[name].copy()) for name in ("lowest", "step"))
            x = restore([features, *(s.view(one_a_row) for s in scale)])
        return x.permute(0, 3, 1, 2) if len(self._shape) == 3 else x

    def _seal(self, row_id: bytes, row: np.void) -> bytes:
        payload = row.tobytes()[4 + _ID_BYTES :]
        return self._checksum(row_id, payload) + row_id + payload

    def _checksum(self, row_id: bytes, payload: bytes | np.ndarray) -> bytes:
        return zlib.crc32(payload, zlib.crc32(row_id, self._seed)).to_bytes(4, "little")

    def _fetch(self, row_id: bytes, raw: np.ndarray) -> bool:
        """Fill `raw`, (itemsize,) uint8, with the row; False if it is absent or damaged."""
        if row_id in self._buffer:
            raw[:] = np.frombuffer(self._buffer[row_id], np.uint8)
            return True
        if row_id not in self._index:
            return False
        shard, start = self._index[row_id]
        # Mapped for this row alone: a map that stays holds a file descriptor, of which
        # there are often 1024, and its pages count as resident.
        with suppress(OSError, ValueError), shard.open("rb") as file:
            end = start + len(raw)  # beyond the file's end: ValueError
            with mmap.mmap(file.fileno(), end, access=mmap.ACCESS_READ) as rows:
                raw[:] = np.frombuffer(rows[start:end], np.uint8)
            if raw[:4].tobytes() == self._checksum(row_id, raw[4 + _ID_BYTES :]):
                return True
        del self._index[row_id]  # so that it is written anew
        return False

    # Shards

    def _open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        now, changed = time.time_ns(), opened_at(self._folder)
        recently = now - changed < OPENED_SECONDS * 1e9
        if recently and self._known.seen == (changed, self._max_bytes):
            return
        self._known.seen = None
        self._read_shards()
        if not recently:
            os.utime(self._folder)
        # What is written within a tick of the disk's clock does not show in the folder's time.
        elif now - changed > _SETTLED_SECONDS * 1e9:
            self._known.seen = changed, self._max_bytes

    def _read_shards(self) -> None:
        """Learn of shards that were written or went since, and clear up."""
        files = {folder: files_in(folder) for folder in folders_in(self._directory)}
        shards = {
            n: facts for n, facts in files.get(self._folder, {}).items() if n.endswith(".npy")
        }
        known = self._known.shards
        if any(shards.get(name) != facts for name, facts in known.items()):
            known.clear()
            self._index.clear()
        for name in sorted(shards.keys() - known.keys()):  # by number: a later copy of a row wins
            shard = self._folder / name
            try:
                self._known.number = max(self._known.number, int(name.split("-")[0]))
                self._index |= self._rows_of(shard)
                known[name] = shards[name]
            except OSError:
                continue  # another process made room, or it cannot be read just now
            except Exception as error:  # NumPy's header parser raises a dozen kinds
                with suppress(OSError):
                    shard.unlink()
                _warn(f"feature cache: dropped {shard}, whose rows are made anew: {error}")
        self._clean(files)
        if sum(size for names in files.values() for size, _ in names.values()) > self._max_bytes:
            self._make_room(0)  # the limit is lower than it was

    def _rows_of(self, shard: Path) -> dict[bytes, tuple[Path, int]]:
        """Where the rows of a shard are; any exception: it is none."""
        # Read-only, and given up on return. Unlike `np.load` it takes no other format.
        rows = np.lib.format.open_memmap(shard, mode="r")
        end = rows.offset + rows.nbytes
        if rows.dtype != self._dtype or rows.ndim != 1 or not len(rows):
            raise ValueError(f"it holds {rows.shape} of other rows than {self._shape}")
        if shard.stat().st_size != end:
            raise ValueError(f"it has {shard.stat().st_size} bytes, not {end}")
        starts = range(rows.offset, end, self._dtype.itemsize)
        return {i.tobytes(): (shard, at) for i, at in zip(rows["id"], starts, strict=True)}

    def _write_shard(self) -> None:
        rows = list(self._buffer.items())
        header = header_of(self._dtype, len(rows))
        size = self._dtype.itemsize
        self._folder.mkdir(parents=True, exist_ok=True)
        room = self._make_room(len(header) + len(rows) * size)
        fitting = max(0, (room - len(header)) // size)
        if fitting < len(rows):
            rows = rows[:fitting]
            header = header_of(self._dtype, fitting)
            self._stop(
                f"feature cache {self._directory} is full at {self._max_bytes / 2**20:g} MiB "
                f"(cache-mib); the rest is computed each time, unless cache-mib is raised"
            )
        if rows:
            self._known.number += 1
            shard = self._folder / f"{self._known.number:08d}-{uuid4().hex}.npy"
            write_whole(shard, [header, *(row for _, row in rows)])
            with suppress(OSError):  # else it is read again
                about = shard.stat()
                self._known.shards[shard.name] = about.st_size, about.st_mtime_ns
            for n, (row_id, _) in enumerate(rows):
                self._index[row_id] = (shard, len(header) + n * size)

    def _make_room(self, need: int) -> int:
        """Remove other keys' shards until `need` bytes may be written; how many may be."""
        sizes = {folder: files_in(folder) for folder in folders_in(self._directory)}
        room = self._max_bytes - sum(size for names in sizes.values() for size, _ in names.values())
        sizes.pop(self._folder, None)
        opened = {folder: opened_at(folder) for folder in sizes}
        for folder in sorted(opened, key=opened.get):
            for name, (size, _) in sorted(sizes[folder].items()):
                if room >= need:
                    return room
                if name.endswith(".npy"):  # the others are being written
                    (folder / name).unlink(missing_ok=True)
                    room += size
                    with suppress(FileNotFoundError):  # removing made it look newly opened
                        os.utime(folder, ns=(opened[folder], opened[folder]))
        return room

    def _clean(self, files: dict[Path, dict[str, tuple[int, int]]]) -> None:
        """Remove what killed writers and removed shards of any key left behind."""
        before = (time.time() - STALE_SECONDS) * 1e9
        for folder, names in files.items():
            for name, (_, written) in names.items():
                if name.endswith(".part") and written < before:
                    with suppress(OSError):
                        (folder / name).unlink()
            with suppress(OSError):  # it holds something
                if opened_at(folder) < before:
                    folder.rmdir()

    def _stop_after(self, error: OSError | ValueError) -> None:
        self._stop(
            f"feature cache {self._folder} cannot be written: "
            f"{getattr(error, 'strerror', None) or error}; training goes on uncached"
        )

    def _stop(self, why: str) -> None:
        if self._stores:
            _warn(why)
        self._stores = False


@dataclass
class _Known:
    """What this process has read of a key's shards.

    Attributes:
        rows: id → shard, and where in it the row starts.
        shards: name → bytes, and when it was written, in nanoseconds.
        number: of the newest shard.
        seen: when the folder changed last, in nanoseconds, and the limit, if nothing is new
            for as long as both stay.
    """

    rows: dict[bytes, tuple[Path, int]] = field(default_factory=dict)
    shards: dict[str, tuple[int, int]] = field(default_factory=dict)
    number: int = 0
    seen: tuple[int, int] | None = None


# A simulation opens a key for each client and round: what others have written since is
# read, not all that there is, and the folder is looked through only if it has changed.
@lru_cache(maxsize=4)
def _known_of(folder: Path, dtype: np.dtype) -> _Known:
    return _Known()


@cache  # once a process: a simulation opens a cache for each client and round
def _warn(text: str) -> None:
    logging.getLogger(__name__).warning(text)


def _row_dtype(shape: tuple[int, ...], precision: str) -> np.dtype:
    channels_last = (*shape[1:], shape[0]) if len(shape) == 3 else shape
    scale = [("lowest", "<f4"), ("step", "<f4")] if precision == "int8" else []
    kind = "u1" if precision == "int8" else "<f2"
    row_id = ("id", "u1", (_ID_BYTES,))  # an "S16" would lose trailing zeros
    return np.dtype([("checksum", "<u4"), row_id, *scale, ("features", kind, channels_last)])
