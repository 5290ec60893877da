"""Admitted updates while a round goes on: in memory as long as they are few, then in a file."""

import os
import tempfile
from dataclasses import dataclass

from fleet.errors import UpdateError

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
        return os.pread(self.file, max(0, stop - start), self.start + start)


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
        """Something that slices to the same bytes, until the spool is closed.

        Raises:
            UpdateError: if there is no place for them; those kept before stay.
        """
        if len(data) <= self._room:
            self._room -= len(data)
            return data
        try:
            if self._file is None:
                # Unbuffered: what could not be written must not be tried again at the end.
                self._file = tempfile.TemporaryFile(prefix="fleet-updates-", buffering=0)  # noqa: SIM115
            _write(self._file.fileno(), data, self._end)
        except OSError as error:
            raise UpdateError(
                f"no place on the server for this update of {len(data)} bytes ({error.strerror}); "
                f"free space in {tempfile.gettempdir()}, or set TMPDIR to a folder that has some"
            ) from error
        stored = _Stored(self._file.fileno(), self._end, len(data))
        self._end += len(data)
        return stored

    def close(self) -> None:
        """Give the file back; what was kept in it is gone."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _write(file: int, data: bytes, start: int) -> None:
    """All of it, from `start` on: over what a write that failed may have left there."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(file, rest, start)
        rest, start = rest[written:], start + written
