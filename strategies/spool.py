"""Admitted updates while a round goes on: in memory as long as they are few, then in a file."""

import os
import tempfile
from dataclasses import dataclass

_MEMORY_BYTES = 128 * 2**20


@dataclass(frozen=True)
class _Stored:
    """Bytes that lie in a file; slicing reads them."""

    file: int  # descriptor
    start: int
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self.length)
        return os.pread(self.file, stop - start, self.start + start)


class Spool:
    """Keeps the bytes of a round's updates; what does not fit in memory goes to a file.

    Args:
        memory_bytes: how much stays in memory.
    """

    def __init__(self, memory_bytes: int = _MEMORY_BYTES) -> None:
        self._room = memory_bytes
        self._file = None
        self._end = 0

    def keep(self, data: bytes) -> bytes | _Stored:
        """Something that slices to the same bytes, until the spool is closed."""
        if len(data) <= self._room:
            self._room -= len(data)
            return data
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="fleet-updates-")  # noqa: SIM115
        self._file.write(data)
        self._file.flush()
        stored = _Stored(self._file.fileno(), self._end, len(data))
        self._end += len(data)
        return stored

    def close(self) -> None:
        """Give the file back; what was kept in it is gone."""
        if self._file is not None:
            self._file.close()
            self._file = None
