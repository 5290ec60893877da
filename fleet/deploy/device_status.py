"""A device asks the server how it is seen: online, offline, or not known at all.

The question is signed with the device's key, in the headers that Flower's own nodes
use; nobody learns of another's device. The answer is what a watchdog goes by.
"""

import base64
import datetime
import email.utils
import http.client
import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fleet.deploy.addresses import Address
from fleet.errors import ConfigError

EARLY_SECONDS, LATE_SECONDS = 5.0, 305.0  # how far Flower lets a device's clock be off

_PURPOSE = "fleet-device-status "  # a signature for this is good for nothing else
_KEY, _TIME, _SIGNATURE = "fleet-public-key", "fleet-timestamp", "fleet-signature"
_ASK_SECONDS = 10.0
_STATUSES = ("online", "offline", "registered", "unknown")


@dataclass(frozen=True)
class Seen:
    """What a device finds out by asking.

    Attributes:
        status: `online`, `offline`, `registered` (never seen yet), `unknown` (no such key),
            `refused` (signature or clock), or `unreachable`.
        clock_offset: seconds that this device's clock is ahead of the server's; None if
            the server did not say.
        problem: why there is no answer, in words; empty if there is.
    """

    status: str
    clock_offset: float | None = None
    problem: str = ""

    @property
    def clock_is_off(self) -> bool:
        """Whether Flower refuses this device for its clock."""
        return self.clock_offset is not None and not (
            -LATE_SECONDS < self.clock_offset < EARLY_SECONDS
        )


class Asker:
    """Asks a server about this device.

    Args:
        server: where it is.
        path: of the question.
        key: this device's private key, OpenSSH.
        authority: certificate that the server's is verified against.

    Raises:
        ConfigError: if key or certificate cannot be read.
    """

    def __init__(self, server: Address, path: str, key: Path, authority: Path) -> None:
        self._server, self._path = server, path
        try:
            self._key = serialization.load_ssh_private_key(key.read_bytes(), password=None)
            self._tls = ssl.create_default_context(cafile=str(authority))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"the bundle's key or certificate cannot be read ({error}); give this device its "
                f"bundle again with --bundle"
            ) from error

    def ask(self) -> Seen:
        """How the server sees this device now; it takes 10 s at most."""
        connection = http.client.HTTPSConnection(
            self._server.host, self._server.port, timeout=_ASK_SECONDS, context=self._tls
        )
        try:
            connection.request("GET", self._path, headers=signed_headers(self._key))
            response = connection.getresponse()
            body = response.read(65536)
        except ssl.SSLCertVerificationError as error:
            return Seen("unreachable", problem=_why_not_trusted(error))
        except (OSError, http.client.HTTPException) as error:
            return Seen("unreachable", problem=f"{type(error).__name__}: {error}")
        finally:
            connection.close()
        return _read_answer(response.status, response.getheader("date"), body)


def signed_headers(key: ec.EllipticCurvePrivateKey) -> dict[str, str]:
    """Headers that show who asks, and that it is now."""
    timestamp = datetime.datetime.now(datetime.UTC).isoformat()
    signature = key.sign((_PURPOSE + timestamp).encode(), ec.ECDSA(hashes.SHA256()))
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return {
        _KEY: base64.b64encode(public).decode(),
        _TIME: timestamp,
        _SIGNATURE: base64.b64encode(signature).decode(),
    }


def asking_key(headers: Mapping[str, str]) -> bytes | None:
    """The public key, PEM, of who asks; None if the headers do not show it.

    A clock that is off is no reason: the answer tells it. But a question that
    somebody else kept for a day is not answered.
    """
    try:
        public = base64.b64decode(headers[_KEY], validate=True)
        signature = base64.b64decode(headers[_SIGNATURE], validate=True)
        timestamp = headers[_TIME]
        age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(timestamp)
        key = serialization.load_pem_public_key(public)
        if not isinstance(key, ec.EllipticCurvePublicKey) or abs(age.total_seconds()) > 86_400:
            return None
        key.verify(signature, (_PURPOSE + timestamp).encode(), ec.ECDSA(hashes.SHA256()))
    except (KeyError, ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return None
    return public


def _read_answer(code: int, date: str | None, body: bytes) -> Seen:
    offset = None
    if date is not None:
        # It has whole seconds, cut off: on average it is half a second behind.
        server = email.utils.parsedate_to_datetime(date) + datetime.timedelta(seconds=0.5)
        offset = (datetime.datetime.now(datetime.UTC) - server).total_seconds()
    if code == 401:
        return Seen("refused", offset, "the server does not take this device's signature")
    try:
        status = json.loads(body)["status"] if code == 200 else ""
    except (ValueError, KeyError, TypeError):
        status = ""
    if code >= 500:
        problem = f"the server answered {code}: it is there and cannot serve, its own log says why"
        return Seen("unreachable", offset, problem)
    if status not in _STATUSES:
        return Seen("unreachable", offset, f"the server answered {code}, as none of ours does")
    return Seen(status, offset)


def _why_not_trusted(error: ssl.SSLCertVerificationError) -> str:
    reason = error.verify_message
    if "not yet valid" in reason:
        return f"{reason}: this device's clock is behind; let it synchronise (timedatectl)"
    if "expired" in reason:
        return f"{reason}; on the server: fleet provision --renew"
    if "mismatch" in reason or "not valid for" in reason:
        return f"{reason}; on the server: fleet provision --renew --host with every name of it"
    return f"{reason}: the server's certificate is not of this bundle's authority"
