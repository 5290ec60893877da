"""The machine and its Python."""

from __future__ import annotations

import importlib.util
import platform
import re
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

from clients.doctor.findings import OK, PROBLEM, UNKNOWN, WARNING, Finding
from clients.doctor.readings import read_text

WHEELS = ("aarch64", "arm64", "x86_64")  # what PyTorch and Flower have wheels for
KERNELS_32 = ("armv6l", "armv7l", "armv8l", "i686", "i386")
OLDEST_GLIBC = (2, 28)  # of manylinux_2_28, as which PyTorch's wheels are tagged
OLDEST_PYTHON, NEWEST_TESTED, NEWEST_PYTHON = (3, 11), (3, 13), (3, 14)

_FLASH = "flash the 64-bit image of Raspberry Pi OS (bookworm or later)"


@dataclass(frozen=True)
class Machine:
    """What this Python runs on.

    Attributes:
        system: `Linux`, `Darwin`, …
        kernel: the kernel's architecture, as `uname -m` prints it.
        bits: of a pointer in this Python.
        libc: name and version; both empty where it is not glibc.
        name: model and operating system, for people.
    """

    system: str
    kernel: str
    bits: int
    libc: tuple[str, str]
    name: str


def this_machine(root: Path) -> Machine:
    """The machine whose `/proc` and `/etc` lie below root."""
    model = read_text(root / "proc/device-tree/model")
    release = read_text(root / "etc/os-release") or ""
    pretty = re.search(r'^PRETTY_NAME="?([^"\n]*)', release, re.MULTILINE)
    names = [model, pretty[1] if pretty else platform.system()]
    return Machine(
        platform.system(),
        platform.machine(),
        struct.calcsize("P") * 8,
        platform.libc_ver(),
        ", ".join(name for name in names if name),
    )


def machine_finding(machine: Machine) -> Finding:
    """Whether there are packages for this machine: 64-bit kernel and user space, glibc."""
    check, seen = "64-bit", f"{machine.kernel} kernel, {machine.bits}-bit Python, {machine.name}"
    if machine.bits < 64 or machine.kernel in KERNELS_32:
        not_enough = "a 64-bit kernel alone does not do; " if machine.kernel in WHEELS else ""
        return Finding(check, PROBLEM, seen, f"{not_enough}{_FLASH}")
    if machine.kernel not in WHEELS:
        return Finding(
            check, PROBLEM, seen, f"PyTorch has no wheels for it; use one of {', '.join(WHEELS)}"
        )
    if machine.system != "Linux":
        return Finding(check, OK, seen)
    name, version = machine.libc
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if name != "glibc" or numbers < OLDEST_GLIBC:
        have = f"{name or 'no glibc'} {version}".strip()
        return Finding(
            check,
            PROBLEM,
            f"{seen}, {have}",
            "PyTorch's wheels need glibc 2.28 or later; use Debian 10 or later, not Alpine",
        )
    return Finding(check, OK, seen)


def python_finding(
    version: tuple[int, int, int], *, prefix: str, in_venv: bool, has_ensurepip: bool
) -> Finding:
    """Whether this Python has packages, and can have an environment of its own."""
    check, seen = "Python", f"{'.'.join(map(str, version))} in {prefix}"
    if version[:2] < OLDEST_PYTHON:
        return Finding(check, PROBLEM, seen, "needs 3.11 or later; Raspberry Pi OS bookworm has it")
    if version[:2] > NEWEST_PYTHON:
        return Finding(
            check, PROBLEM, seen, "constraints-pi.txt's PyTorch has no wheel for it; use 3.13"
        )
    if not (in_venv or has_ensurepip):
        return Finding(
            check,
            WARNING,
            f"{seen}, cannot make virtual environments",
            "sudo apt install python3-venv",
        )
    if version[:2] > NEWEST_TESTED:
        return Finding(check, WARNING, f"{seen}, which the tests have not seen", "prefer 3.13")
    return Finding(check, OK, seen)


def this_python() -> Finding:
    """Of the Python that runs this."""
    return python_finding(
        tuple(sys.version_info[:3]),
        prefix=sys.prefix,
        in_venv=sys.prefix != sys.base_prefix,
        has_ensurepip=importlib.util.find_spec("ensurepip") is not None,
    )


def cgroup_finding(root: Path) -> Finding:
    """Whether the kernel can limit a service's memory: Raspberry Pi OS turns that off."""
    check = "memory cgroup"
    controllers = read_text(root / "sys/fs/cgroup/cgroup.controllers")
    listed = read_text(root / "proc/cgroups")
    if controllers is not None:
        on, seen = "memory" in controllers.split(), f"cgroup v2 with {controllers or 'none'}"
    elif listed is not None:
        rows = [line.split() for line in listed.splitlines() if not line.startswith("#")]
        on = any(row[0] == "memory" and row[-1] == "1" for row in rows if row)
        seen = f"cgroup v1, memory {'on' if on else 'off'}"
    else:
        return Finding(check, UNKNOWN, "this kernel tells of no control groups")
    if on:
        return Finding(check, OK, seen)
    line = next(
        (f for f in ("boot/firmware/cmdline.txt", "boot/cmdline.txt") if (root / f).exists()),
        None,
    )
    where = f"to the one line of /{line}" if line else "to the kernel's command line"
    return Finding(
        check,
        WARNING,
        f"{seen}: MemoryMax= of a service has no effect",
        f"add cgroup_enable=memory cgroup_memory=1 {where} and reboot",
    )
