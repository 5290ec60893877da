"""Whether a disk has room for what is about to be written there."""

import shutil
from pathlib import Path

FULL_MIB = 32  # a round writes about as much: model and checkpoint


def want_of_room(folder: Path) -> str:
    """What a disk lacks, in words, with the way out; empty if it has room, or does not tell.

    Args:
        folder: on that disk; it need not be there yet.
    """
    try:
        there = next((path for path in (folder, *folder.parents) if path.exists()), Path("."))
        usage = shutil.disk_usage(there)
    except OSError:  # who writes there will be told why
        return ""
    free = usage.free / 2**20
    if free >= FULL_MIB:
        return ""
    return (
        f"the disk of {folder} is full, {free:.0f} MiB of {usage.total / 2**20:.0f} MiB are left "
        f"and {FULL_MIB} are needed; free space there"
    )
