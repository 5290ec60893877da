"""Where the server is, by what the user gave: `--server`, or a bundle."""

from __future__ import annotations

import base64
import gzip
import io
import re
import stat
import sys
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from clients.doctor.findings import OK, PROBLEM, UNKNOWN, WARNING, Finding, problem
from fleet.device_files import check_key_mode
from fleet.errors import ConfigError

DEFAULT_PORT = 8000
SETTINGS_FILE, AUTHORITY_FILE, KEY_FILE = FILES = ("bundle.toml", "ca.crt", "device.key")

_MOST_BYTES = 2**20  # of a bundle; a real one has some 5 kB
_OPENSSH = b"openssh-key-v1\0"  # what a key in this format, the only one Flower reads, begins with
_NEW_BUNDLE = "copy the bundle from the server again"


@dataclass(frozen=True)
class Server:
    """A server to look at.

    Attributes:
        host: a DNS name or an IP address, without brackets.
        port: of TCP.
        authority: PEM text of what its certificate is verified against; None for the
            authorities that this machine trusts.
    """

    host: str
    port: int
    authority: str | None = None

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Bundle:
    """What a bundle holds, as far as it could be read.

    Attributes:
        path: its folder or archive.
        files: name → content.
        modes: permission bits of what holds the key: the archive, or the folder's key.
        owner: user id of that file's owner.
    """

    path: Path
    files: dict[str, bytes]
    mode: int
    owner: int


def parse_server(text: str, authority: str | None = None) -> Server:
    """Read `HOST`, `HOST:PORT`, or `[IPV6]:PORT`.

    Raises:
        ConfigError: for anything else.
    """
    found = re.fullmatch(r"(?:\[([^\[\]\s]+)\]|([^:\[\]\s/]+))(?::([0-9]{1,5}))?", text)
    port = int(found[3] or DEFAULT_PORT) if found else 0
    if not found or not 1 <= port <= 65535:
        raise ConfigError(
            f"server {text!r} is not HOST:PORT; give for example server.local:{DEFAULT_PORT}, "
            f"or [2001:db8::1]:{DEFAULT_PORT}"
        )
    return Server(found[1] or found[2], port, authority)


def read_authority(path: Path) -> str:
    """PEM text of a certificate file.

    Raises:
        ConfigError: if it cannot be read.
    """
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no PEM text"
        raise ConfigError(
            f"cannot read the authority's certificate {path}: {reason}; copy ca.crt from the server"
        ) from error


def read_bundle(path: Path) -> Bundle:
    """What is in a bundle, an archive or a folder; nothing is unpacked.

    Raises:
        ConfigError: if it is neither, a file is missing, or an archive holds anything else.
    """
    key_holder = path / KEY_FILE if path.is_dir() else path
    try:
        status = key_holder.stat()
        files = _folder_files(path) if path.is_dir() else _archive_files(path)
    except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read bundle {path}: {reason}; {_NEW_BUNDLE}") from error
    if missing := [name for name in FILES if name not in files]:
        raise ConfigError(f"bundle {path} lacks {', '.join(missing)}; {_NEW_BUNDLE}")
    return Bundle(path, files, stat.S_IMODE(status.st_mode), status.st_uid)


def bundle_server(bundle: Bundle) -> Server:
    """The server that a bundle's device connects to.

    Raises:
        ConfigError: if the bundle does not say, or this Python cannot read TOML.
    """
    try:
        import tomllib
    except ImportError:
        raise ConfigError(
            f"Python {sys.version_info[0]}.{sys.version_info[1]} cannot read bundles; "
            f"use 3.11 or later, or give --server HOST:PORT"
        ) from None
    try:
        settings = tomllib.loads(bundle.files[SETTINGS_FILE].decode())
        return parse_server(str(settings["server"]), bundle.files[AUTHORITY_FILE].decode("ascii"))
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"bundle {bundle.path}: {SETTINGS_FILE} or {AUTHORITY_FILE} is not what it should be "
            f"({error}); {_NEW_BUNDLE}"
        ) from error


def bundle_finding(bundle: Bundle, user: int) -> Finding:
    """Whether a bundle holds a key that nobody else can read, and its user can.

    Args:
        bundle: what was read.
        user: id of who runs this.
    """
    check, key = "bundle", bundle.files[KEY_FILE]
    holder = bundle.path / KEY_FILE if bundle.path.is_dir() else bundle.path
    if not _is_key(key):
        return Finding(check, PROBLEM, f"{KEY_FILE} of {bundle.path} is no key", _NEW_BUNDLE)
    try:
        check_key_mode(holder, bundle.mode)
    except ConfigError as error:
        if bundle.path.is_dir():
            return problem(check, error)
        return Finding(  # the client unpacks it for its own user alone
            check,
            WARNING,
            f"{holder} holds the device's key, and has permissions {bundle.mode:04o}",
            f"chmod 600 {holder}; if others use this machine, make a new key",
        )
    seen = f"{bundle.path} is whole, its key for its owner alone ({bundle.mode:04o})"
    if bundle.owner != user:
        return Finding(
            check,
            UNKNOWN,
            f"{seen}, who is not this user",
            "run this as the user that the client runs as",
        )
    return Finding(check, OK, seen)


def _is_key(content: bytes) -> bool:
    """Whether it has the form of an OpenSSH key; the standard library cannot load one."""
    found = re.fullmatch(
        rb"-----BEGIN OPENSSH PRIVATE KEY-----(.+)-----END OPENSSH PRIVATE KEY-----\s*",
        content,
        re.DOTALL,
    )
    if found is None:
        return False
    try:
        decoded = base64.b64decode(b"".join(found[1].split()), validate=True)
    except ValueError:
        return False
    return decoded.startswith(_OPENSSH)


def _folder_files(folder: Path) -> dict[str, bytes]:
    return {name: _read(folder / name) for name in FILES if (folder / name).exists()}


def _read(path: Path) -> bytes:
    """A file's content; a pipe or a device, which may never end, is not opened."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path.name} is no regular file")
    if status.st_size > _MOST_BYTES:
        raise ValueError(f"{path.name} has {status.st_size} bytes")
    return path.read_bytes()


def _archive_files(path: Path) -> dict[str, bytes]:
    """What is in an archive, which may hold the three files alone: the client takes no other."""
    with gzip.GzipFile(fileobj=io.BytesIO(_read(path))) as unzipped:
        plain = unzipped.read(_MOST_BYTES + 1)
    if len(plain) > _MOST_BYTES:
        raise ValueError(f"it is larger than {_MOST_BYTES} bytes once unpacked")
    files: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(plain), mode="r:") as archive:
        for member in archive:
            folder, _, name = member.name.rpartition("/")
            if member.isdir():
                continue
            outside = "/" in folder or folder in ("..", ".") or member.name.startswith("/")
            if not member.isreg() or name not in FILES or outside:
                raise ValueError(f"{member.name!r} in it is none of {', '.join(FILES)}")
            if name in files:
                raise ValueError(f"{name} is in it twice")
            files[name] = archive.extractfile(member).read()
    return files
