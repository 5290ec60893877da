"""A server on loopback whose certificate, clock and manners a test chooses."""

import datetime
import email.utils
import http.server
import ipaddress
import ssl
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from clients.doctor.address import Server

HOST = "127.0.0.1"


@dataclass
class Authority:
    """One that signs what it is asked to."""

    folder: Path
    days: float = 100

    def __post_init__(self):
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
        self.certificate = self._sign(self.key.public_key(), self.name, -1, self.days, None)
        self.path = self.folder / "ca.crt"
        self.path.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))

    @property
    def pem(self):
        return self.path.read_text()

    def server_files(self, *, names=(HOST,), begins=-1.0, ends=100.0):
        """Certificate and key for names, valid between two times in days from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server")])
        signed = self._sign(key.public_key(), subject, begins, ends, names)
        certificate, private = self.folder / "server.pem", self.folder / "server.key"
        certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return certificate, private

    def _sign(self, public_key, subject, begins, ends, names):
        now = datetime.datetime.now(datetime.UTC)
        signs = names is None
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(days=begins))
            .not_valid_after(now + datetime.timedelta(days=ends))
            .add_extension(x509.BasicConstraints(ca=signs, path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(not signs, False, False, False, False, signs, signs, False, False),
                critical=True,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                critical=False,
            )
        )
        if names is not None:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_general_name(name) for name in names]),
                critical=False,
            )
        return builder.sign(self.key, hashes.SHA256())


def _general_name(name):
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


@pytest.fixture
def serve():
    """A function that starts a server and returns where it is."""
    started = []

    def start(authority, *, tls=True, ahead=0.0, tells_time=True, **certificate):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.send_response_only(404)
                if tells_time:
                    self.send_header("Date", email.utils.formatdate(time.time() + ahead))
                self.end_headers()

            def log_message(self, *arguments):
                pass

        server = http.server.ThreadingHTTPServer((HOST, 0), Handler)
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*authority.server_files(**certificate))
            server.socket = context.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
        server.handle_error = lambda *arguments: None  # a client that hangs up is meant
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started.append(server)
        return Server(HOST, server.server_port, authority.pem)

    yield start
    for server in started:
        server.shutdown()
        server.server_close()
