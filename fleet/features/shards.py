"""Files of the feature cache: written whole or not at all, listed while others change them."""

import io
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

FOLDER = re.compile(r"[0-9a-f]+-[a-z0-9]+")  # of one key and precision


def header_of(dtype: np.dtype, rows: int) -> bytes:
    """What `np.save` puts before `rows` rows."""
    header = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(dtype)
    about = {"descr": descr, "fortran_order": False, "shape": (rows,)}
    np.lib.format.write_array_header_1_0(header, about)
    return header.getvalue()


def write_whole(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file that is never seen in part, nor lost with the power once this returns."""
    part = path.with_suffix(".part")
    try:
        with part.open("xb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def folders_in(directory: Path) -> Iterator[Path]:
    """Folders of keys, and nothing else that may lie there."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if FOLDER.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                yield Path(entry.path)


def files_in(folder: Path) -> dict[str, tuple[int, int]]:
    """Shards, finished or not: name → bytes, and when it was written, in nanoseconds.

    Those that vanish meanwhile are left out.
    """
    files = {}
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith((".npy", ".part")) and entry.is_file(follow_symlinks=False):
                with suppress(FileNotFoundError):
                    about = entry.stat()
                    files[entry.name] = about.st_size, about.st_mtime_ns
    return files


def opened_at(folder: Path) -> int:
    """When a key was opened or written last, in nanoseconds; 0 if it is gone."""
    with suppress(FileNotFoundError):
        return folder.stat().st_mtime_ns
    return 0
