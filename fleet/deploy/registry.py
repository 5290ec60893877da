"""Who belongs to the fleet: devices' names and public keys, in the server's `devices.toml`."""

import datetime
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fleet.deploy import private_files
from fleet.deploy.certificates import fingerprint, public_pem
from fleet.errors import ConfigError

FILE_NAME = "devices.toml"

# Folder, file and node name at once; a leading dot or hyphen would hide it or be an option.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_TAKEN = {"authority", "server", "runs"}
_HEADER = "# Written by fleet provision; fleet server follows it while it runs.\n\n"


@dataclass(frozen=True)
class Device:
    """One device of the fleet.

    Attributes:
        name: its own.
        public_key: a line such as `ecdsa-sha2-nistp384 AAAA…`.
        added: when, in UTC.
        revoked: since when it may no longer take part; None: it may.
    """

    name: str
    public_key: str
    added: datetime.datetime
    revoked: datetime.datetime | None = None

    @property
    def fingerprint(self) -> str:
        """As `ssh-keygen -l` prints it."""
        return fingerprint(self.public_key)


def check_name(name: str) -> None:
    """Refuse what is no name of a device.

    Raises:
        ConfigError: for a name that is no folder's, or that the fleet uses itself.
    """
    if not _NAME.fullmatch(name) or name in _TAKEN:
        raise ConfigError(
            f"device name {name!r} cannot be used; take letters, digits, dots, hyphens and "
            f"underscores, at most 63, beginning with a letter or digit, and none of "
            f"{', '.join(sorted(_TAKEN))}"
        )


def read_devices(path: Path) -> dict[str, Device]:
    """Name → device, in the order in which they were added.

    Raises:
        ConfigError: if the file cannot be read or is not a registry.
    """
    content = private_files.read(
        path, "registry of devices", "make one with: fleet provision --host NAME --devices NAME …"
    )
    try:
        tables = tomllib.loads(content.decode())
        devices = {name: _device(name, entry) for name, entry in tables["devices"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise ConfigError(
            f"registry {path} cannot be read ({error}); mend it, or put it back from a backup"
        ) from error
    return devices


def write_devices(path: Path, devices: Mapping[str, Device]) -> None:
    """Replace the registry, whole or not at all.

    Raises:
        ConfigError: if it cannot be written.
    """
    tables = {device.name: _table(device) for device in devices.values()}
    private_files.replace(path, (_HEADER + tomli_w.dumps({"devices": tables})).encode())


def _device(name: str, entry: Mapping[str, Any]) -> Device:
    check_name(name)
    if unknown := entry.keys() - {"public-key", "added", "revoked"}:
        raise ValueError(f"device {name} has an unknown key {min(unknown)}")
    public_pem(entry["public-key"])
    for key in ("added", "revoked"):
        moment = entry.get(key)
        if key in entry and getattr(moment, "tzinfo", None) is None:
            raise ValueError(f"device {name}: {key} is no time with a zone, {moment!r}")
    return Device(name, entry["public-key"], entry["added"], entry.get("revoked"))


def _table(device: Device) -> dict[str, Any]:
    table: dict[str, Any] = {"public-key": device.public_key, "added": device.added}
    return table if device.revoked is None else table | {"revoked": device.revoked}
