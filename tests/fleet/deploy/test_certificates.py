import datetime
import shutil
import socket
import ssl
import subprocess
import threading

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from fleet.deploy.certificates import (
    Signed,
    expiry,
    fingerprint,
    issue_server_certificate,
    make_authority,
    make_device_key,
    public_pem,
    server_names,
)
from fleet.errors import ConfigError

HOSTS = ["server.local", "192.168.1.10", "2001:db8::7"]
LOOPBACK = ["localhost", "127.0.0.1", "::1"]


@pytest.fixture(scope="module")
def authority():
    return make_authority()


@pytest.fixture(scope="module")
def server(authority):
    return issue_server_certificate(authority, HOSTS)


@pytest.fixture
def handshake(authority, server, tmp_path):
    """Connect as a client that expects a name; raises what verification raises."""
    certificate, key, root = (tmp_path / name for name in ("server.pem", "server.key", "ca.crt"))
    certificate.write_bytes(server.certificate)
    key.write_bytes(server.key)
    root.write_bytes(authority.certificate)
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(certificate, key)

    def connect(name, root_certificate=root):
        ours = ssl.create_default_context(cafile=root_certificate)
        ours.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
        left, right = socket.socketpair()

        def serve():
            try:
                with theirs.wrap_socket(left, server_side=True):
                    pass
            except OSError:
                left.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with ours.wrap_socket(right, server_hostname=name) as secure:
                return secure.version()
        finally:
            right.close()
            thread.join()

    return connect


@pytest.mark.parametrize("name", [*HOSTS, *LOOPBACK])
def test_a_strict_client_accepts_the_server_under_every_name_of_it(handshake, name):
    assert handshake(name) == "TLSv1.3"


@pytest.mark.parametrize("name", ["other.local", "192.168.1.11"])
def test_a_client_refuses_the_server_under_any_other_name(handshake, name):
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        handshake(name)


def test_a_client_of_another_authority_refuses_the_server(handshake, tmp_path):
    other = tmp_path / "other.crt"
    other.write_bytes(make_authority().certificate)
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate verify failed"):
        handshake(HOSTS[0], other)


def test_a_second_verifier_agrees(authority, server):
    roots = Store([x509.load_pem_x509_certificate(authority.certificate)])
    leaf = x509.load_pem_x509_certificate(server.certificate)
    builder = PolicyBuilder().store(roots)
    assert len(builder.build_server_verifier(x509.DNSName(HOSTS[0])).verify(leaf, [])) == 2
    with pytest.raises(VerificationError):
        builder.build_server_verifier(x509.DNSName("other.local")).verify(leaf, [])
    in_years = datetime.datetime.now() + datetime.timedelta(days=826)
    with pytest.raises(VerificationError):
        builder.time(in_years).build_server_verifier(x509.DNSName(HOSTS[0])).verify(leaf, [])


def test_names_and_expiry_are_read_back(authority, server):
    assert server_names(server.certificate) == [*HOSTS, *LOOPBACK]
    now = datetime.datetime.now(datetime.UTC)
    assert (expiry(server.certificate) - now).days == 824
    assert (expiry(authority.certificate) - now).days == 3649


def test_a_server_certificate_does_not_outlive_its_authority():
    authority = make_authority(days=40)
    server = issue_server_certificate(authority, ["server.local"])
    assert expiry(server.certificate) <= expiry(authority.certificate)


def test_an_authority_that_has_expired_signs_nothing():
    with pytest.raises(ConfigError, match=r"the authority's certificate expires .*provision anew"):
        issue_server_certificate(make_authority(days=0), ["server.local"])


def test_a_damaged_authority_is_named(authority):
    with pytest.raises(ConfigError, match="it holds no certificate that can be read"):
        issue_server_certificate(Signed(b"nothing", authority.key), ["server.local"])
    with pytest.raises(ConfigError, match="it holds no private key that can be read"):
        issue_server_certificate(Signed(authority.certificate, b"nothing"), ["server.local"])


def test_flower_reads_a_device_key():
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes, uses_nist_ec_curve

    private, public = make_device_key()
    key = serialization.load_ssh_private_key(private, password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name == "secp384r1"
    assert uses_nist_ec_curve(key.public_key())
    assert public_pem(public) == public_key_to_bytes(key.public_key())


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_ssh_keygen_prints_the_same_fingerprint(tmp_path):
    private, public = make_device_key()
    (tmp_path / "key.pub").write_text(public + "\n")
    (tmp_path / "key").write_bytes(private)
    (tmp_path / "key").chmod(0o600)
    listed = subprocess.run(
        ["ssh-keygen", "-lf", tmp_path / "key.pub"], check=True, capture_output=True, text=True
    )
    assert listed.stdout.split()[:2] == ["384", fingerprint(public)]
    derived = subprocess.run(
        ["ssh-keygen", "-yf", tmp_path / "key"], check=True, capture_output=True, text=True
    )
    assert derived.stdout.split()[:2] == public.split()


@pytest.mark.parametrize("line", ["nothing", "ssh-ed25519 AAAA"])
def test_what_is_no_ec_key_is_refused(line):
    with pytest.raises(ConfigError, match="is no public key"):
        public_pem(line)


def test_a_key_of_another_kind_is_refused():
    from cryptography.hazmat.primitives.asymmetric import ed25519

    key = ed25519.Ed25519PrivateKey.generate().public_key()
    openssh = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    with pytest.raises(ConfigError, match="is no EC key"):
        public_pem(openssh.decode())
