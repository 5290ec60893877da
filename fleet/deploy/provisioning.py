"""Who may talk to whom: an authority, a server and its devices, each in a folder of its own.

DIR/authority         the authority: whoever has its key can be the server
DIR/server            certificate, key, registry of devices; runs, once there are some
DIR/pi-01             a device's bundle, and the same as pi-01.tar.gz
"""

import contextlib
import datetime
import shutil
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from fleet.deploy import private_files
from fleet.deploy.addresses import Address
from fleet.deploy.bundle import SUFFIX, bundle_files, pack
from fleet.deploy.certificates import (
    Signed,
    check_authority_key,
    expiry,
    issue_server_certificate,
    make_authority,
    make_device_key,
    naming,
    server_names,
)
from fleet.deploy.one_at_a_time import alone_in, somebody_in
from fleet.deploy.registry import FILE_NAME as REGISTRY
from fleet.deploy.registry import Device, check_name, read_devices, write_devices
from fleet.errors import ConfigError

EXPIRES_SOON_DAYS = 30
_SERVER_LOCK = "server.lock"
_SERVING = "serving.toml"
_LOCK_SECONDS = 10.0  # for another fleet provision to end; it takes less than one


@dataclass(frozen=True)
class ServerFolder:
    """The folder of a server: what `fleet server` and `fleet run` work in."""

    path: Path

    @property
    def authority_path(self) -> Path:
        """The authority's certificate."""
        return self.path / "ca.crt"

    @property
    def certificate_path(self) -> Path:
        """The server's certificate."""
        return self.path / "server.pem"

    @property
    def key_path(self) -> Path:
        """The server's private key."""
        return self.path / "server.key"

    @property
    def registry_path(self) -> Path:
        """Names and public keys of the devices."""
        return self.path / REGISTRY

    @property
    def settings_path(self) -> Path:
        """Where the server is reached."""
        return self.path / "server.toml"

    @property
    def runs_path(self) -> Path:
        """Wishes for runs, and the runs."""
        return self.path / "runs"

    @property
    def state_path(self) -> Path:
        """Flower's database, locks and logs, unless they are put elsewhere."""
        return self.path / "state"

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Hold the folder for the one server that may work in it, wherever its state lies.

        Raises:
            ConfigError: if another one does.
        """
        return alone_in(self.path, "fleet server", option="--dir", file=_SERVER_LOCK)

    def has_server(self) -> bool:
        """Whether a server works in the folder now."""
        return somebody_in(self.path, _SERVER_LOCK)

    def note_serving(self, here: Address, insecure: bool) -> None:
        """Leave word of how the server of this folder serves; for the server alone.

        Raises:
            ConfigError: if it cannot be written.
        """
        told = {"address": str(here), "insecure": insecure}
        private_files.replace(self.path / _SERVING, tomli_w.dumps(told).encode())

    def insecure_address(self) -> Address | None:
        """Where the server that works here can be asked; None if it has keys, or has left no word.

        Raises:
            ConfigError: if the word cannot be read.
        """
        path, again = self.path / _SERVING, "end fleet server, and start it again"
        if not path.exists():
            return None
        told = private_files.read_toml(path, "word of the server", again)
        return Address.parse(str(told.get("address"))) if told.get("insecure") else None

    def hosts(self) -> list[Address]:
        """The addresses that devices know, of which their bundles hold the first.

        Raises:
            ConfigError: if the file cannot be read.
        """
        settings = private_files.read_toml(
            self.settings_path,
            "server's address",
            "write it with: fleet provision --renew --host NAME",
        )
        hosts = settings.get("hosts", [])
        if not isinstance(hosts, list):
            raise ConfigError(
                f"{self.settings_path} has hosts = {hosts!r}, which is no list of addresses; write "
                f"it with: fleet provision --renew --host NAME"
            )
        return [Address.parse(str(host)) for host in hosts]

    def certificate(self, way_out: str = "make it anew with: fleet provision --renew") -> bytes:
        """The server's certificate.

        Args:
            way_out: of one that is not there.

        Raises:
            ConfigError: if it is not there, or is none.
        """
        path = self.certificate_path
        certificate = private_files.read(path, "server's certificate", way_out)
        with naming(
            path, "make it anew with: fleet provision --renew; or put it back from a backup"
        ):
            expiry(certificate)
        return certificate

    def check_begun(self) -> None:
        """Refuse a folder in which no server was ever made, or has run.

        Raises:
            ConfigError: naming it.
        """
        if not any(
            map(Path.exists, (self.registry_path, self.runs_path, self.path / _SERVER_LOCK))
        ):
            raise ConfigError(
                f"{self.path} is no server's folder: neither {self.registry_path.name} nor "
                f"{self.runs_path.name} is in it; name the server's folder with --dir, or make one "
                f"with: fleet provision --host NAME --devices NAME …"
            )

    def check(self) -> None:
        """Refuse a folder that is no server's.

        Raises:
            ConfigError: naming the file that is missing, or what is damaged.
        """
        for path in (self.authority_path, self.certificate_path, self.key_path, self.registry_path):
            private_files.read(
                path,
                "server's key or certificate",
                "make them with: fleet provision --host NAME --devices NAME …; or name the "
                "server's folder with --dir",
            )
        try:
            tls = ssl.create_default_context(cafile=self.authority_path)
            tls.load_cert_chain(self.certificate_path, self.key_path)
        except (ssl.SSLError, ValueError) as error:
            raise ConfigError(
                f"{self.authority_path.name}, {self.certificate_path.name} and "
                f"{self.key_path.name} in {self.path} are damaged, or not of one another "
                f"({error}); make them anew: fleet provision --renew, or put them back from a "
                f"backup"
            ) from error


@dataclass(frozen=True)
class Provisioned:
    """What `fleet provision` has made, as it is now.

    Attributes:
        hosts: of the server, as devices reach it.
        names: DNS names and IP addresses that its certificate is good for.
        devices: in the order in which they were added.
        authority_expires, server_expires: in UTC.
    """

    hosts: tuple[Address, ...]
    names: tuple[str, ...]
    devices: tuple[Device, ...]
    authority_expires: datetime.datetime
    server_expires: datetime.datetime


class Provisioner:
    """Makes and changes what lies in one folder, `out`.

    Of several that change it at the same time each waits for its turn, so that no
    change is lost. One whose turn does not come raises a ConfigError.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.server = ServerFolder(out / "server")

    def begin(self, hosts: Sequence[Address], devices: Sequence[str]) -> None:
        """Make the authority, the server and the first devices.

        Args:
            hosts: where devices reach the server, the first as their bundles say.
            devices: names.

        Raises:
            ConfigError: if there is an authority already, or a name cannot be used.
        """
        for name in devices:  # before there is a folder
            check_name(name)
        _check_distinct(devices)
        private_files.make_private_folder(self.out)
        with self._alone():
            self._begin(hosts, devices)

    def add(self, names: Sequence[str]) -> None:
        """Give devices keys and bundles, and register the keys.

        Raises:
            ConfigError: if a device of that name takes part already, or a name cannot be used.
        """
        with self._alone():
            self._add(names)

    def revoke(self, names: Sequence[str]) -> None:
        """Take devices out of the fleet.

        Raises:
            ConfigError: if there is no such device, or it is out already.
        """
        with self._alone():
            self._revoke(names)

    def renew(self, hosts: Sequence[Address] = ()) -> None:
        """Give the server a new key and certificate; devices' bundles stay good.

        Args:
            hosts: where devices reach it from now on; none: where they did before.

        Raises:
            ConfigError: if the authority's key is not here.
        """
        with self._alone():
            self._renew(hosts)

    def show(self) -> Provisioned:
        """What there is.

        Raises:
            ConfigError: if nothing was provisioned here.
        """
        begin = "begin with: fleet provision --host NAME --devices NAME …"
        authority, server = self._authority(begin), self.server.certificate(begin)
        return Provisioned(
            tuple(self.server.hosts()),
            tuple(server_names(server)),
            tuple(read_devices(self.server.registry_path).values()),
            expiry(authority),
            expiry(server),
        )

    def bundle_path(self, name: str) -> Path:
        """The archive that is copied to a device."""
        return self.out / f"{name}{SUFFIX}"

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if not self.out.is_dir():  # nothing to change, as whoever tries to will be told
            yield
            return
        with alone_in(
            self.out, "fleet provision", option="--out", file=None, wait_seconds=_LOCK_SECONDS
        ):
            yield

    def _begin(self, hosts: Sequence[Address], devices: Sequence[str]) -> None:
        server = self.server
        files = [self._authority_path("ca.key"), server.authority_path, server.settings_path]
        files += [server.key_path, server.certificate_path, server.registry_path]
        there = [path for path in files if path.exists()]
        if there and server.registry_path not in there:
            raise ConfigError(
                f"{self.out} is provisioned in part only: {server.registry_path} is missing; put "
                f"it back from a backup, or, if this fleet never began, remove "
                f"{', '.join(map(str, there))} and begin again"
            )
        if there:
            raise ConfigError(
                f"{self.out} is provisioned already; add devices with --add NAME, renew the "
                f"server's certificate with --renew, or name another folder with --out"
            )
        self._check_new(devices, {})
        authority = make_authority()
        private_files.make_private_folder(self.out / "authority")
        private_files.write_new(self._authority_path("ca.key"), authority.key)
        private_files.write_new(self._authority_path("ca.crt"), authority.certificate)
        private_files.make_private_folder(self.server.path)
        private_files.write_new(self.server.authority_path, authority.certificate)
        self._write_server(authority, hosts)
        write_devices(self.server.registry_path, {})
        self._add(devices)

    def _add(self, names: Sequence[str]) -> None:
        devices = read_devices(self.server.registry_path)
        hosts = self.server.hosts()
        if not hosts:
            raise ConfigError(f"{self.server.settings_path} has no hosts; run --renew --host NAME")
        authority = self._authority("provision anew")
        self.server.certificate()
        self._check_new(names, devices)
        for name in names:
            private, public = make_device_key()
            files = bundle_files(name, hosts[0], authority, private)
            devices.pop(name, None)  # a revoked one comes back as the newest
            devices[name] = Device(name, public, _now())
            try:
                self._write_bundle(name, files)
                write_devices(self.server.registry_path, devices)
            except ConfigError:  # a bundle without effect would stand in the way of the next try
                shutil.rmtree(self.out / name, ignore_errors=True)
                self.bundle_path(name).unlink(missing_ok=True)
                raise

    def _revoke(self, names: Sequence[str]) -> None:
        devices = read_devices(self.server.registry_path)
        _check_distinct(names)
        for name in names:
            device = devices.get(name)
            if device is None:
                raise ConfigError(
                    f"there is no device {name}; known: {', '.join(devices) or 'none'}"
                )
            if device.revoked is not None:
                raise ConfigError(f"device {name} was revoked already, {device.revoked:%Y-%m-%d}")
            devices[name] = Device(name, device.public_key, device.added, _now())
        write_devices(self.server.registry_path, devices)

    def _renew(self, hosts: Sequence[Address]) -> None:
        where = "renew where the folder authority is kept, or put it back from a backup"
        parts = []
        for name, what, check in (
            ("ca.crt", "authority's certificate", expiry),
            ("ca.key", "authority's key", check_authority_key),
        ):
            path = self._authority_path(name)
            parts.append(private_files.read(path, what, where))
            with naming(path, "put it back from a backup, or provision anew in another folder"):
                check(parts[-1])
        authority = Signed(*parts)
        self._write_server(authority, hosts or self.server.hosts())

    def _write_server(self, authority: Signed, hosts: Sequence[Address]) -> None:
        if not hosts:
            raise ConfigError("the server has no host; name one with --host NAME[:PORT]")
        signed = issue_server_certificate(authority, [host.host for host in hosts])
        settings = {"hosts": [str(host) for host in hosts]}
        private_files.replace(self.server.settings_path, tomli_w.dumps(settings).encode())
        private_files.replace(self.server.key_path, signed.key)
        private_files.replace(self.server.certificate_path, signed.certificate)

    def _write_bundle(self, name: str, files: dict[str, bytes]) -> None:
        folder = self.out / name
        private_files.make_private_folder(folder)
        for file_name, content in files.items():
            private_files.write_new(folder / file_name, content)
        private_files.write_new(self.bundle_path(name), pack(name, files))

    def _check_new(self, names: Sequence[str], devices: dict[str, Device]) -> None:
        """Before anything is written: every name can be used."""
        _check_distinct(names)
        for name in names:
            check_name(name)
            device = devices.get(name)
            if device is not None and device.revoked is None:
                raise ConfigError(
                    f"device {name} is registered already (since {device.added:%Y-%m-%d}); take "
                    f"another name, or --revoke it first for a new key"
                )
            for path in (self.out / name, self.bundle_path(name)):
                if path.exists():
                    raise ConfigError(
                        f"{path} is there already, and keys are never overwritten; remove it, "
                        f"if it is of a device that was revoked, or take another name"
                    )

    def _authority(self, way_out: str) -> bytes:
        """The authority's certificate, as the server has it; `way_out` is for one that is gone."""
        path, what = self.server.authority_path, "authority's certificate"
        certificate = private_files.read(path, what, way_out)
        kept = self._authority_path("ca.crt")
        with naming(path, f"put it back with: cp {kept} {path}; or from a backup"):
            expiry(certificate)
        return certificate

    def _authority_path(self, name: str) -> Path:
        return self.out / "authority" / name


def days_left(moment: datetime.datetime) -> int:
    """Whole days until a moment; negative once it is over."""
    return (moment - _now()).days


def _check_distinct(names: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name.lower() in seen:  # folders of a disk that ignores case
            raise ConfigError(f"device {name} is named twice; name each once")
        seen.add(name.lower())


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)
