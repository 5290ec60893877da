"""A Raspberry Pi's power supply and heat, and who keeps its clock."""

from __future__ import annotations

import re
from pathlib import Path

from clients.doctor.findings import OK, UNKNOWN, WARNING, Finding
from clients.doctor.readings import output_of, read_text

# Bits of `vcgencmd get_throttled`; the same, 16 higher, say that it has happened since the start.
THROTTLED = ("under-voltage", "frequency capped", "throttled", "soft temperature limit")
UNDER_VOLTAGE, SOFT_LIMIT = THROTTLED[0], THROTTLED[3]
HOT_CELSIUS, TOO_HOT_CELSIUS = 70, 80  # a Pi slows down from 80 on; a Pi 3B+ from 60

_FIRMWARE = "sys/devices/platform/soc/soc:firmware/get_throttled"
_SUPPLY = "use the official power supply for this model, and a short thick cable"
_COOL = "give it a heat sink or a fan"


def decode_throttled(bits: int) -> tuple[list[str], list[str]]:
    """What is so now, and what has been since the start and is not now."""
    now = [name for i, name in enumerate(THROTTLED) if bits >> i & 1]
    been = [name for i, name in enumerate(THROTTLED) if bits >> (16 + i) & 1]
    return now, [name for name in been if name not in now]


def throttled_bits(root: Path, vcgencmd: str | None) -> int | None:
    """The firmware's word, from what `vcgencmd get_throttled` printed or else from the kernel.

    Returns:
        None where there is no such firmware.
    """
    told = re.search(r"throttled=0x([0-9a-fA-F]+)", vcgencmd or "")
    digits = told[1] if told else read_text(root / _FIRMWARE)
    try:
        return int(digits or "", 16)
    except ValueError:
        return None


def power_finding(bits: int | None) -> Finding:
    """Whether the firmware slows the processor down."""
    check = "power"
    if bits is None:
        return Finding(check, UNKNOWN, "no Raspberry Pi firmware to ask (vcgencmd get_throttled)")
    now, been = decode_throttled(bits)
    if not now and not been:
        return Finding(check, OK, "no under-voltage, no throttling since the start")
    seen = "; ".join(
        f"{when}: {', '.join(names)}"
        for when, names in (("now", now), ("since the start", been))
        if names
    )
    remedies = [_SUPPLY] if UNDER_VOLTAGE in now + been else []
    if UNDER_VOLTAGE not in now + been or SOFT_LIMIT in now + been:
        remedies.append(_COOL)
    return Finding(check, WARNING, f"{seen} ({bits:#x})", "; ".join(remedies))


def this_power(root: Path) -> Finding:
    """Of the machine that this runs on."""
    return power_finding(throttled_bits(root, output_of("vcgencmd", "get_throttled")))


def temperature_finding(root: Path) -> Finding:
    """Of the hottest of the kernel's thermal zones."""
    check, degrees = "temperature", []
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        told = read_text(zone / "temp")
        if told is not None and re.fullmatch(r"-?\d+", told):
            degrees.append(int(told) / 1000)
    if not degrees:
        return Finding(check, UNKNOWN, "this kernel has no thermal zones")
    seen = f"{max(degrees):.0f} °C"
    if max(degrees) >= TOO_HOT_CELSIUS:
        return Finding(check, WARNING, f"{seen}: the processor slows down", _COOL)
    if max(degrees) >= HOT_CELSIUS:
        return Finding(check, WARNING, f"{seen}, before any training", _COOL)
    return Finding(check, OK, seen)


def time_sync_finding(synchronised: bool | None) -> Finding:
    """Whether a time service has set the clock: a Pi has no clock of its own, up to the Pi 4."""
    check = "time service"
    if synchronised is None:
        return Finding(check, UNKNOWN, "no systemd to ask (timedatectl)")
    if synchronised:
        return Finding(check, OK, "the clock is synchronised")
    return Finding(
        check,
        WARNING,
        "the clock is not synchronised",
        "sudo timedatectl set-ntp true; without internet, name a time server of your network in "
        "/etc/systemd/timesyncd.conf",
    )


def this_time_sync() -> Finding:
    """Of the machine that this runs on."""
    told = output_of("timedatectl", "show", "--property=NTPSynchronized", "--value")
    return time_sync_finding({"yes": True, "no": False}.get(told or ""))
