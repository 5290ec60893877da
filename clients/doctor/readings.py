"""How checks read the machine: files below a root that tests can replace, and other programs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

GIB, MIB = 2**30, 2**20


def read_text(path: Path) -> str | None:
    """What a file says, without surrounding blanks and the NUL of the device tree's.

    Returns:
        None if it is not there or cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \n\t")
    except OSError:
        return None


def output_of(*command: str, seconds: float = 10) -> str | None:
    """What a program prints; None if it is not there, fails or takes longer."""
    executable = shutil.which(command[0])
    if executable is None:
        return None
    try:
        done = subprocess.run(
            [executable, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip()


def size(nbytes: float) -> str:
    """Bytes for people."""
    return f"{nbytes / GIB:.1f} GiB" if nbytes >= GIB else f"{nbytes / MIB:.0f} MiB"
