"""Memory and disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from clients.doctor.findings import OK, PROBLEM, UNKNOWN, WARNING, Finding
from clients.doctor.readings import GIB, MIB, read_text, size

# A SuperNode and its helper have some 260 MiB resident, a ClientApp with PyTorch 330 beside what it
# trains.
NEEDED_MEMORY = 600 * MIB
COMFORTABLE_MEMORY = 1700 * MIB  # what a Pi of 2 GB calls total
# 765 MiB of packages for aarch64 by constraints-pi.txt, and the wheels while pip unpacks them.
INSTALLATION = 1536 * MIB
STATE_NEEDED, STATE_COMFORTABLE = 256 * MIB, 1024 * MIB
CACHE_COMFORTABLE = 1536 * MIB  # the default of cache-mib, and some air


def meminfo(root: Path) -> dict[str, int]:
    """Bytes of every line of /proc/meminfo; empty where there is none."""
    lines = (read_text(root / "proc/meminfo") or "").splitlines()
    pairs = (line.replace(":", " ").split() for line in lines)
    return {pair[0]: int(pair[1]) * 1024 for pair in pairs if len(pair) > 2 and pair[2] == "kB"}


def memory_finding(memory: dict[str, int]) -> Finding:
    """Whether a client and PyTorch fit."""
    check = "memory"
    if not {"MemTotal", "MemAvailable"} <= memory.keys():
        return Finding(check, UNKNOWN, "there is no /proc/meminfo")
    total, free = memory["MemTotal"], memory["MemAvailable"]
    seen = f"{size(free)} free of {size(total)}"
    if total < NEEDED_MEMORY:
        return Finding(
            check, PROBLEM, seen, f"a client needs some {size(NEEDED_MEMORY)}; use a larger device"
        )
    if total < COMFORTABLE_MEMORY:
        return Finding(
            check, WARNING, seen, "2 GB and up are recommended; give the client --budget-mib 16"
        )
    if free < NEEDED_MEMORY:
        return Finding(
            check,
            WARNING,
            f"{seen}, a client needs some {size(NEEDED_MEMORY)}",
            "end other programs; on a Pi, boot without the desktop: "
            "sudo raspi-config nonint do_boot_behaviour B1",
        )
    return Finding(check, OK, seen)


def swap_finding(memory: dict[str, int], root: Path) -> Finding:
    """Whether a short peak has somewhere to go before something is killed."""
    check, swaps = "swap", (read_text(root / "proc/swaps") or "").splitlines()[1:]
    if "MemTotal" not in memory:
        return Finding(check, UNKNOWN, "there is no /proc/meminfo")
    if not swaps:
        if memory["MemTotal"] >= 4 * COMFORTABLE_MEMORY:
            return Finding(check, OK, "none, which so much memory can do without")
        return Finding(
            check,
            WARNING,
            "none: a short peak ends with a killed process",
            "sudo apt install zram-tools, which compresses memory and spares the SD card",
        )
    kinds = ", ".join(
        f"{'zram' if '/zram' in (name := line.split()[0]) else name}, "
        f"{size(int(line.split()[2]) * 1024)}"
        for line in swaps
    )
    return Finding(check, OK, kinds)


def disk_finding(
    check: str,
    path: Path,
    *,
    needed: int,
    comfortable: int,
    spare: str = "free space, or name a larger disk",
    writes: bool = True,
) -> Finding:
    """Whether there is room where files will lie.

    Args:
        check: what the finding is called.
        path: a folder; one that is not there is judged by the first above it that is.
        needed: bytes below which it blocks.
        comfortable: bytes below which it warns.
        spare: the remedy for too few bytes.
        writes: whether this user has to be able to write there.
    """
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        return Finding(check, PROBLEM, f"{there} is not a folder", "name another, or remove it")
    try:
        free = shutil.disk_usage(there).free
    except OSError as error:
        return Finding(check, UNKNOWN, f"{path}: {error.strerror}")
    seen = f"{size(free)} free for {path}"
    if writes and not os.access(there, os.W_OK | os.X_OK):
        return Finding(
            check,
            PROBLEM,
            f"{seen}, but {there} cannot be written",
            "run this as the client's user; give it write permission there, or make a read-only "
            "disk writable",
        )
    if free < needed:
        return Finding(check, PROBLEM, f"{seen}, {size(needed)} are needed", spare)
    if free < comfortable:
        return Finding(check, WARNING, f"{seen}, {size(comfortable)} are better", spare)
    return Finding(check, OK, seen)


def disk_findings(state: Path, cache: Path, installation: Path | None) -> list[Finding]:
    """Of the packages if they are still to come, of the client's state and its feature cache."""
    found = []
    if installation is not None:
        packages = disk_finding(
            "disk, packages",
            installation,
            needed=INSTALLATION,
            comfortable=2 * GIB,
            writes=False,  # an environment may be made elsewhere
        )
        found.append(packages)
    return [
        *found,
        disk_finding("disk, state", state, needed=STATE_NEEDED, comfortable=STATE_COMFORTABLE),
        disk_finding(
            "disk, cache",
            cache,
            needed=0,
            comfortable=CACHE_COMFORTABLE,
            spare="set cache-mib to half of it at most, or FLEET_CACHE to a larger disk",
        ),
    ]
