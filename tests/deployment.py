"""A Flower deployment on loopback: certificates, node keys and processes."""

import contextlib
import datetime
import ipaddress
import os
import random
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HOST = "127.0.0.1"


def write_certificates(folder: Path) -> Path:
    """An authority, `ca.crt`, and what it signed for loopback, `server.pem` with `server.key`.

    Returns:
        The authority's path.
    """
    authority, server = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    names = [x509.IPAddress(ipaddress.ip_address(HOST)), x509.DNSName("localhost")]
    ours = _certificate(authority, authority, None)
    theirs = _certificate(server, authority, names)
    pem = serialization.Encoding.PEM
    (folder / "ca.crt").write_bytes(ours.public_bytes(pem))
    (folder / "server.pem").write_bytes(theirs.public_bytes(pem))
    (folder / "server.key").write_bytes(
        server.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "ca.crt"


def _certificate(
    key: ec.EllipticCurvePrivateKey,
    issuer_key: ec.EllipticCurvePrivateKey,
    names: list[x509.GeneralName] | None,
) -> x509.Certificate:
    """A server's for `names`, or, without names, an authority's.

    With every extension that Python 3.13's strict verification asks for.
    """
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    signs = names is None
    builder = (
        x509.CertificateBuilder()
        .subject_name(_AUTHORITY if signs else _common_name("fleet test server"))
        .issuer_name(_AUTHORITY)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .add_extension(x509.BasicConstraints(ca=signs, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not signs,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=signs,
                crl_sign=signs,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
    )
    if names is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


_AUTHORITY = _common_name("fleet test authority")


def write_node_key(path: Path) -> Path:
    """A key pair as `ssh-keygen -t ecdsa -b 384 -N "" -f path` writes it; returns `path`."""
    key = ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
    )
    path.chmod(0o600)
    path.with_suffix(".pub").write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
    )
    return path


def free_ports(count: int) -> list[int]:
    """Ports on which nothing listens.

    They lie below those that Linux gives to outgoing connections, one of which
    could otherwise take a port between this answer and its use.
    """
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(10_000, 20_000), 1_000):
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            break
    return ports


def handshake(port: int, authority: Path) -> str | None:
    """TLS version of the server on a port, verified against an authority; None if none is there."""
    context = ssl.create_default_context(cafile=authority)
    try:
        with (
            socket.create_connection((HOST, port), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname=HOST) as secure,
        ):
            return secure.version()
    except (ConnectionError, TimeoutError):
        return None


class Processes:
    """Flower's commands, each with a log, on machines that are folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, machine: str, command: str, *arguments: object) -> None:
        """Start a command of this Python's environment.

        Args:
            name: what to call the process.
            machine: the folder that is its working directory and its Flower home.
        """
        home = self.folder / machine
        home.mkdir(exist_ok=True)
        with self._log_path(name).open("wb") as log:
            self._started[name] = subprocess.Popen(
                [_executable(command), *map(str, arguments)],
                cwd=home,
                env=_environment(home),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def exit_code(self, name: str) -> int | None:
        """None while the process runs."""
        return self._started[name].poll()

    def log(self, name: str) -> str:
        """What the process has printed so far."""
        return self._log_path(name).read_text(errors="replace")

    def logs(self, characters: int = 8000) -> str:
        """The end of every log."""
        return "\n".join(
            f"----- {name}, exit code {self.exit_code(name)}\n{self.log(name)[-characters:]}"
            for name in self._started
        )

    def wait(self, what: str, condition: Callable[[], object], seconds: float) -> None:
        """Poll until a condition holds; after `seconds` fail with all logs."""
        deadline = time.monotonic() + seconds
        while not condition():
            for process in self._started.values():
                process.poll()  # what a process has started ends only when it is no zombie
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {seconds:.0f} s: {what}\n{self.logs()}")
            time.sleep(0.1)

    def finish(self, name: str, seconds: float) -> None:
        """Wait until a process has ended well."""
        self.wait(f"end of {name}", lambda: self.exit_code(name) is not None, seconds)
        if code := self.exit_code(name):
            raise AssertionError(f"{name} failed with exit code {code}\n{self.logs()}")

    def stop(self) -> None:
        """End every process and what it started."""
        family = []
        for process in self._started.values():
            if process.poll() is None:
                parent = psutil.Process(process.pid)
                family += [parent, *parent.children(recursive=True)]
                process.terminate()
        _, alive = psutil.wait_procs(family, timeout=20)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=20)

    def _log_path(self, name: str) -> Path:
        return self.folder / f"{name}.log"


def _executable(command: str) -> str:
    path = shutil.which(command, path=_search_path())
    assert path is not None, f"{command} is not installed beside {sys.executable}"
    return path


def _search_path() -> str:
    """Flower starts its helpers by name: they have to be this environment's."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def _environment(home: Path) -> dict[str, str]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("FLWR_") and not name.lower().endswith("_proxy")
    }
    return inherited | {
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_HOME": str(home),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        "FLWR_TELEMETRY_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "PATH": _search_path(),
        "PYTHONUNBUFFERED": "1",
    }
