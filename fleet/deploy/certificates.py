"""A certificate authority of the fleet's own, what it signs, and devices' keys.

With every extension that strict verification asks for (RFC 5280; Python's own
default from 3.13 on).
"""

import base64
import contextlib
import datetime
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fleet.deploy.addresses import ip_address
from fleet.errors import ConfigError

AUTHORITY_DAYS = 3650
SERVER_DAYS = 825  # the most that Apple's systems believe; others take any
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")

_PEM = serialization.Encoding.PEM
_BACKDATED = datetime.timedelta(days=1)  # a device's clock may be behind


@contextlib.contextmanager
def naming(file: object, way_out: str = "") -> Iterator[None]:
    """Let what is said of a certificate or key begin with its file, and end with the way out."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}" + (f"; {way_out}" if way_out else "")) from error


@dataclass(frozen=True)
class Signed:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes


def make_authority(days: int = AUTHORITY_DAYS) -> Signed:
    """A new authority, which signs its own certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _common_name("fleet authority")
    certificate = _sign(name, key.public_key(), name, key, days, names=None)
    return Signed(certificate, _private_pem(key))


def issue_server_certificate(
    authority: Signed, hosts: Sequence[str], days: int = SERVER_DAYS
) -> Signed:
    """A server's new key and certificate, for its hosts and for this machine by loopback.

    Args:
        authority: who signs.
        hosts: DNS names and IP addresses that clients connect to.
        days: from now until it expires, and not beyond the authority itself.

    Raises:
        ConfigError: if the authority cannot be read, which does not name its files, or has
            expired.
    """
    issuer, issuer_key = _read_certificate(authority.certificate), _read_key(authority.key)
    left = (issuer.not_valid_after_utc - datetime.datetime.now(datetime.UTC)).days
    if left < 1:
        raise ConfigError(
            f"the authority's certificate expires {issuer.not_valid_after_utc:%Y-%m-%d}; provision "
            f"anew in another folder, and give every device its new bundle"
        )
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _sign(
        _common_name("fleet server"),
        key.public_key(),
        issuer.subject,
        issuer_key,
        min(days, left),
        names=_alternative_names([*hosts, *LOOPBACK_NAMES]),
    )
    return Signed(certificate, _private_pem(key))


def make_device_key() -> tuple[bytes, str]:
    """A device's new key, EC P-384.

    Returns:
        The private key as `flower-supernode` reads it (OpenSSH), and the public
        key as a line such as `ecdsa-sha2-nistp384 AAAA…`.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        _PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return private, public.decode()


def check_authority_key(private: bytes) -> None:
    """Load an authority's private key.

    Raises:
        ConfigError: if it cannot be loaded.
    """
    _read_key(private)


def check_device_key(private: bytes) -> None:
    """Load a device's private key as `flower-supernode` does.

    Raises:
        ConfigError: if it cannot be loaded, has a passphrase, or is of another curve or kind
            than EC P-384.
    """
    try:
        key = serialization.load_ssh_private_key(private, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"it holds no private key that can be read ({error})") from error
    curve = key.curve.name if isinstance(key, ec.EllipticCurvePrivateKey) else type(key).__name__
    if curve != ec.SECP384R1.name:
        raise ConfigError(f"it holds a private key of {curve}, not of {ec.SECP384R1.name}")


def fingerprint(public_key: str) -> str:
    """Of a public key's line, as `ssh-keygen -l` prints it: `SHA256:…`."""
    digest = hashlib.sha256(base64.b64decode(public_key.split()[1])).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def public_pem(public_key: str) -> bytes:
    """A public key's line as PEM, which is how Flower keeps it.

    Raises:
        ConfigError: if it is no EC key.
    """
    try:
        key = serialization.load_ssh_public_key(public_key.encode())
    except ValueError as error:
        raise ConfigError(f"{public_key[:60]!r} is no public key: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"{public_key[:60]!r} is no EC key; Flower's nodes have EC keys")
    return key.public_bytes(_PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def expiry(certificate: bytes) -> datetime.datetime:
    """When a certificate expires, in UTC.

    Raises:
        ConfigError: if it is none.
    """
    return _read_certificate(certificate).not_valid_after_utc


def server_names(certificate: bytes) -> list[str]:
    """DNS names and IP addresses that a server's certificate is good for."""
    extension = _read_certificate(certificate).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    return [str(name.value) for name in extension.value]


def _sign(
    subject: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    days: int,
    names: Sequence[x509.GeneralName] | None,
) -> bytes:
    """A server's certificate for `names`, or, without names, an authority's."""
    now, signs = datetime.datetime.now(datetime.UTC), names is None
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(
            x509.BasicConstraints(ca=signs, path_length=0 if signs else None), critical=True
        )
        .add_extension(_key_usage(signs), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
    )
    if names is not None:
        serves = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        builder = builder.add_extension(serves, critical=False)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(issuer_key, hashes.SHA256()).public_bytes(_PEM)


def _key_usage(signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = []
    for host in dict.fromkeys(hosts):
        address = ip_address(host)
        names.append(x509.DNSName(host) if address is None else x509.IPAddress(address))
    return names


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _read_certificate(pem: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise ConfigError(f"it holds no certificate that can be read ({error})") from error


def _read_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        return serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"it holds no private key that can be read ({error})") from error
