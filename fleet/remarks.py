"""What there is to say of a run right now, for whoever follows it.

Rounds go on record as they end. What keeps one from beginning, and why, is here: in a file of
the run's folder that is replaced whenever there is something else to say.
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_FILE = "remarks.json"

_log = logging.getLogger(__name__)


class Remarks:
    """The remarks of a run that goes on, by who makes them.

    Args:
        folder: of the run; made if it is not there. None: nobody follows.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = folder / _FILE if folder is not None else None
        self._said: dict[str, tuple[str, ...]] = {}

    def say(self, who: str, lines: Sequence[str]) -> None:
        """Say this in place of what the same one said before; no lines: nothing any more.

        A disk that is full costs the remark, not the run.
        """
        before = self._lines()
        self._said[who] = tuple(lines)
        if self._path is None or self._lines() == before:
            return
        part = self._path.with_name(f".{_FILE}.{os.getpid()}")
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(self._lines()))
            os.replace(part, self._path)
        except OSError as error:
            _log.warning("cannot write %s: %s", self._path, error.strerror)
            with suppress(OSError):
                part.unlink(missing_ok=True)

    @contextmanager
    def while_it_runs(self) -> Iterator[None]:
        """Nothing of an earlier process is said inside, and nothing after it."""
        self._remove()
        try:
            yield
        finally:
            self._remove()

    def _lines(self) -> list[str]:
        return [line for lines in self._said.values() for line in lines]

    def _remove(self) -> None:
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)


def read_remarks(folder: Path) -> tuple[str, ...]:
    """What there is to say of the run in a folder; nothing where nothing can be read."""
    try:
        lines = json.loads((folder / _FILE).read_text())
    except (OSError, ValueError):
        return ()
    return tuple(map(str, lines)) if isinstance(lines, list) else ()
