"""What a device is given: its key, the authority's certificate, and where the server is.

A bundle is a folder, or the folder as one `.tar.gz`, of three files: `bundle.toml`,
`ca.crt` and `device.key`. An archive is never extracted as such: the three
files are read from it, whatever else it says, and written anew.
"""

import contextlib
import gzip
import hashlib
import io
import logging
import os
import shutil
import stat
import tarfile
import tomllib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import tomli_w

from fleet.deploy import private_files
from fleet.deploy.addresses import Address
from fleet.deploy.certificates import check_device_key, expiry, naming
from fleet.deploy.registry import check_name
from fleet.device_files import check_key_mode
from fleet.errors import ConfigError

SETTINGS_FILE, AUTHORITY_FILE, KEY_FILE = FILES = ("bundle.toml", "ca.crt", "device.key")
SUFFIX = ".tar.gz"
CURRENT = "device"  # in a client's state: the bundle that it uses

_VERSION = 1
_MOST_BYTES = 2**20  # of an archive, packed or not; a real one has some 5 kB
_NEW_ONE = "copy the bundle from the server again, or make one with: fleet provision --add NAME"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bundle:
    """A bundle that lies in a folder.

    Attributes:
        folder: of its three files.
        name: the device's.
        server: where its SuperNode connects to.
    """

    folder: Path
    name: str
    server: Address

    @property
    def authority_path(self) -> Path:
        """The certificate that the server's is verified against."""
        return self.folder / AUTHORITY_FILE

    @property
    def key_path(self) -> Path:
        """The device's private key."""
        return self.folder / KEY_FILE


def bundle_files(name: str, server: Address, authority: bytes, key: bytes) -> dict[str, bytes]:
    """File name → content of a new bundle."""
    settings = {"version": _VERSION, "name": name, "server": str(server)}
    return {
        SETTINGS_FILE: tomli_w.dumps(settings).encode(),
        AUTHORITY_FILE: authority,
        KEY_FILE: key,
    }


def pack(name: str, files: Mapping[str, bytes]) -> bytes:
    """A bundle as one archive; its files lie in a folder of the device's name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for file_name, content in files.items():
            member = tarfile.TarInfo(f"{name}/{file_name}")
            member.size, member.mode = len(content), 0o600
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def read_bundle(source: Path) -> Bundle:
    """A bundle as it lies in a folder, or in an archive, which then is its `folder`.

    Raises:
        ConfigError: if a file is missing or is not what it should be, or if others can use the
            key of a folder.
    """
    name, server = _check(_files_of(source), source)
    return Bundle(source, name, server)


def install_bundle(source: Path, state: Path) -> Bundle:
    """Put a bundle into a client's state, once, and make it the one in use.

    Args:
        source: a `.tar.gz` or a folder.
        state: the client's state folder; made if it is not there.

    Raises:
        ConfigError: if it is no bundle, if others can use the key of a folder, or if it cannot be
            written.
    """
    files = _files_of(source)
    _check(files, source)
    private_files.make_private_folder(state)
    digest = hashlib.sha256(b"\0".join(files[name] for name in FILES)).hexdigest()[:16]
    folder = state / "bundles" / digest
    if not folder.is_dir():
        _write_folder(folder, files)
    bundle = read_bundle(folder)  # before the one in use is left for it
    _point_to(folder, state / CURRENT)
    return bundle


def installed_bundle(state: Path) -> Bundle:
    """The bundle that a client has in use.

    Raises:
        ConfigError: if it has none.
    """
    folder = state / CURRENT
    if not folder.is_dir():
        raise ConfigError(
            f"no bundle was ever given to this device (none in {state}); start once with "
            f"--bundle NAME{SUFFIX}, which fleet provision made on the server"
        )
    return read_bundle(folder.resolve())


def bundle_to_use(source: Path | None, state: Path) -> Bundle:
    """Install the bundle that is given, or take the one in use if none is, or its copy was removed.

    Args:
        source: a `.tar.gz` or a folder, if one is given.
        state: the client's state folder.

    Raises:
        ConfigError: as `install_bundle` and `installed_bundle`.
    """
    if source is None:
        return installed_bundle(state)
    if _is_gone(source) and (state / CURRENT).is_dir():
        bundle = installed_bundle(state)
        _log.info(
            "there is no bundle %s any more; using the one of %s in the state folder",
            source,
            bundle.name,
        )
        return bundle
    return install_bundle(source, state)


def _is_gone(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # what is there and cannot be read is told when it is read
        return False
    return False


def _files_of(source: Path) -> dict[str, bytes]:
    if not source.is_dir():
        return _unpack(_read(source), source)
    files = {name: _read(source / name) for name in FILES}
    key = source / KEY_FILE
    check_key_mode(key, stat.S_IMODE(key.stat().st_mode))
    return files


def _read(path: Path) -> bytes:
    return private_files.read(path, "bundle", _NEW_ONE, most=_MOST_BYTES)


def _unpack(packed: bytes, source: Path) -> dict[str, bytes]:
    """The three files of an archive; what else is in it is refused, not written.

    Raises:
        ConfigError: if it is no archive of exactly these files.
    """
    files: dict[str, bytes] = {}
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as unzipped:
            plain = unzipped.read(_MOST_BYTES + 1)
        if len(plain) > _MOST_BYTES:
            raise ValueError(f"it is larger than {_MOST_BYTES} bytes once unpacked")
        with tarfile.open(fileobj=io.BytesIO(plain), mode="r:") as archive:
            for member in archive:
                _take(archive, member, files)
    except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as error:
        raise ConfigError(f"{source} is no bundle: {error}; {_NEW_ONE}") from error
    if missing := [name for name in FILES if name not in files]:
        raise ConfigError(f"{source} is no bundle: {missing[0]} is not in it; {_NEW_ONE}")
    return files


def _take(archive: tarfile.TarFile, member: tarfile.TarInfo, files: dict[str, bytes]) -> None:
    folder, _, name = member.name.rpartition("/")
    if member.isdir():
        return
    if not member.isreg():
        raise ValueError(f"{member.name!r} in it is not a regular file")
    if name not in FILES or "/" in folder or folder in ("..", ".") or member.name[0] == "/":
        raise ValueError(f"{member.name!r} in it is none of {', '.join(FILES)}")
    if name in files:
        raise ValueError(f"{name} is in it twice")
    files[name] = archive.extractfile(member).read()


def _check(files: Mapping[str, bytes], source: Path) -> tuple[str, Address]:
    """Name and server of a bundle whose files hold what they should."""
    try:
        settings = tomllib.loads(files[SETTINGS_FILE].decode())
        if settings.get("version") != _VERSION:
            raise ConfigError(
                f"it has version {settings.get('version')}, this program reads {_VERSION}"
            )
        name, server = str(settings["name"]), Address.parse(str(settings["server"]))
        check_name(name)
        for file, checked in ((AUTHORITY_FILE, expiry), (KEY_FILE, check_device_key)):
            with naming(file):
                checked(files[file])
    except (ValueError, KeyError, ConfigError) as error:
        raise ConfigError(f"{source} is no bundle: {error}; {_NEW_ONE}") from error
    return name, server


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder that is there whole or not at all."""
    private_files.make_private_folder(folder.parent)
    part = folder.with_name(f".{folder.name}.{uuid4().hex}")
    private_files.make_private_folder(part)
    try:
        for name, content in files.items():
            private_files.write_new(part / name, content)
        with contextlib.suppress(OSError):  # another process was quicker; it wrote the same
            os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _point_to(folder: Path, link: Path) -> None:
    part = link.with_name(f".{link.name}.{uuid4().hex}")
    try:
        part.symlink_to(folder.relative_to(link.parent), target_is_directory=True)
        os.replace(part, link)
    except OSError as error:
        raise ConfigError(
            f"cannot write {link}: {error.strerror}; free space or give write permission there, "
            f"or name another folder with --state"
        ) from error
