"""The server as this device sees it: port, certificate, clock."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from clients.doctor.address import Server
from clients.doctor.findings import OK, PROBLEM, UNKNOWN, WARNING, Finding

SECONDS = 10  # for each answer
SOON_DAYS = 30
# Flower takes a device's signature if it is less than 5 s ahead of the server's clock and less
# than 305 s behind (flwr.common.constant: SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE).
AHEAD_SECONDS, BEHIND_SECONDS = 5.0, 305.0
NOTED_SECONDS = 3.0  # more than the Date header's own grain

_DAY = 24 * 3600
# Verification results of OpenSSL, x509_vfy.h.
_NOT_YET_VALID, _EXPIRED, _IP_MISMATCH, _HOST_MISMATCH = 9, 10, 64, 62


@dataclass(frozen=True)
class Reading:
    """What happened when this device called the server.

    Attributes:
        server: who was called.
        peer: IP address that answered; None if none did.
        refusal: why none did.
        refused: whether the machine is there, but nothing listens on the port.
        certificate: as `SSLSocket.getpeercert` gives it; None if it was not verified.
        authority_ends: the first of the given authorities to expire, in seconds of the epoch.
        tls_fault: why it was not verified.
        verify_code: OpenSSL's code for that; 0 if the fault is another.
        date: the server's clock by its Date header, whole seconds of the epoch.
        sent, received: this device's clock around that, in seconds of the epoch.
    """

    server: Server
    peer: str | None = None
    refusal: str = ""
    refused: bool = False
    certificate: dict[str, object] | None = None
    authority_ends: float | None = None
    tls_fault: str = ""
    verify_code: int = 0
    date: float | None = None
    sent: float = 0.0
    received: float = 0.0


def call(server: Server) -> Reading:
    """Connect, verify the certificate, and ask for the time.

    The time is asked for without verification: a clock that is far off makes
    every certificate look expired, and nothing is believed but the date.
    """
    try:
        with socket.create_connection((server.host, server.port), timeout=SECONDS) as plain:
            peer = plain.getpeername()[0]
    except OSError as error:
        refused = isinstance(error, ConnectionRefusedError)
        return Reading(server, refusal=_reason(error), refused=refused)
    certificate, authority_ends, fault, code = _verify(server)
    date, sent, received = _ask_the_time(server, tls=code != _NO_TLS)
    return Reading(
        server,
        peer,
        certificate=certificate,
        authority_ends=authority_ends,
        tls_fault=fault,
        verify_code=code,
        date=date,
        sent=sent,
        received=received,
    )


def server_findings(reading: Reading, now: float) -> list[Finding]:
    """Port, certificate and clock, of which the later need the earlier.

    Args:
        reading: of `call`.
        now: this device's clock, in seconds of the epoch.
    """
    if reading.peer is None:
        unseen = f"{reading.server} could not be asked"
        return [
            _unreachable(reading),
            Finding("certificate", UNKNOWN, unseen),
            Finding("clock", UNKNOWN, unseen),
        ]
    answers = Finding("server", OK, f"{reading.server} answers, at {reading.peer}")
    return [answers, certificate_finding(reading, now), clock_finding(reading)]


def certificate_finding(reading: Reading, now: float) -> Finding:
    """Whether the server's certificate is signed by the authority, for its name, and for how long.

    Args:
        reading: of `call`.
        now: this device's clock, in seconds of the epoch.
    """
    check = "certificate"
    if reading.certificate is None:
        return Finding(check, PROBLEM, reading.tls_fault, _tls_remedy(reading))
    ends = {"the certificate": ssl.cert_time_to_seconds(str(reading.certificate["notAfter"]))}
    if reading.authority_ends is not None:
        ends["its authority"] = reading.authority_ends
    which = min(ends, key=ends.__getitem__)
    days = int((ends[which] - now) // _DAY)
    seen = f"signed by the authority for {reading.server.host}, {which} ends in {days} days"
    if days < SOON_DAYS:
        renew = "on the server: fleet provision --renew"
        if which != "the certificate":
            renew = "on the server: fleet provision anew, and a new bundle for every device"
        return Finding(check, WARNING, seen, renew)
    return Finding(check, OK, seen)


def clock_finding(reading: Reading) -> Finding:
    """How far this device's clock is from the server's, and whether Flower will have it.

    The Date header is in whole seconds and up to one old, so that the offset is known
    within a second and half the time that the answer took.
    """
    check = "clock"
    if reading.date is None:
        return Finding(check, UNKNOWN, f"{reading.server} did not tell the time")
    ahead = (reading.sent + reading.received) / 2 - (reading.date + 1)
    grain = 1 + (reading.received - reading.sent) / 2
    side = "ahead of" if ahead > 0 else "behind"
    seen = f"{abs(ahead):.0f} s {side} the server's, ± {grain:.0f} s"
    limits = (
        f"Flower refuses {AHEAD_SECONDS:.0f} s ahead and {BEHIND_SECONDS:.0f} s behind, and the "
        f"client then ends without a word"
    )
    remedy = "sudo timedatectl set-ntp true, here and on the server"
    if ahead - grain >= AHEAD_SECONDS or -ahead - grain >= BEHIND_SECONDS:
        return Finding(check, PROBLEM, f"{seen}; {limits}", remedy)
    if grain >= AHEAD_SECONDS:
        return Finding(check, UNKNOWN, f"{reading.server} answered too slowly to tell, {seen}")
    if ahead + grain >= AHEAD_SECONDS or -ahead - grain >= NOTED_SECONDS:
        return Finding(check, WARNING, f"{seen}; {limits}", remedy)
    return Finding(check, OK, f"within {abs(ahead) + grain:.0f} s of the server's")


_NO_TLS = -1  # beside OpenSSL's codes


def _verify(server: Server) -> tuple[dict[str, object] | None, float | None, str, int]:
    """The verified certificate and when the authority ends; or else why not, and OpenSSL's code."""
    try:
        context = ssl.create_default_context(cadata=server.authority)
    except (ssl.SSLError, ValueError):
        return None, None, "the authority's certificate cannot be read", 0
    authorities = [] if server.authority is None else context.get_ca_certs()
    ends = [ssl.cert_time_to_seconds(str(a["notAfter"])) for a in authorities]
    try:
        with (
            socket.create_connection((server.host, server.port), timeout=SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=server.host) as secure,
        ):
            return secure.getpeercert(), min(ends, default=None), "", 0
    except ssl.SSLCertVerificationError as error:
        return None, None, error.verify_message, error.verify_code
    except (ssl.SSLError, OSError) as error:
        if getattr(error, "reason", None) in _PLAIN_ANSWERS:
            return None, None, f"{server} does not speak TLS", _NO_TLS
        return None, None, f"no TLS connection: {_reason(error)}", 0


# What OpenSSL calls the answer of a server that takes the handshake for a request.
_PLAIN_ANSWERS = (
    "WRONG_VERSION_NUMBER",
    "RECORD_LAYER_FAILURE",
    "PACKET_LENGTH_TOO_LONG",
    "HTTP_REQUEST",
)


def _ask_the_time(server: Server, tls: bool) -> tuple[float | None, float, float]:
    """The server's Date in seconds of the epoch, and this device's clock before and after."""
    if tls:
        context = ssl._create_unverified_context()
        line = http.client.HTTPSConnection(
            server.host, server.port, timeout=SECONDS, context=context
        )
    else:
        line = http.client.HTTPConnection(server.host, server.port, timeout=SECONDS)
    with contextlib.closing(line):
        try:
            line.connect()
            sent = time.time()
            line.request("HEAD", "/")
            answer = line.getresponse()
            received = time.time()
            date = parsedate_to_datetime(answer.getheader("Date")).timestamp()
        except (OSError, http.client.HTTPException, TypeError, ValueError, IndexError):
            return None, 0.0, 0.0
    return date, sent, received


def _unreachable(reading: Reading) -> Finding:
    server = reading.server
    if reading.refused:
        remedy = (
            f"{server.host} is there, but nothing listens on port {server.port}: start fleet server"
        )
    else:
        remedy = (
            f"is the network up (ping {server.host}), the name right, the server on, and does its "
            f"firewall let port {server.port} through?"
        )
    return Finding("server", PROBLEM, f"{server}: {reading.refusal}", remedy)


def _tls_remedy(reading: Reading) -> str:
    if reading.verify_code in (_EXPIRED, _NOT_YET_VALID):
        clock = clock_finding(reading)
        if clock.state == PROBLEM:
            return "set this device's clock first (next line)"
        return "on the server: fleet provision --renew"
    if reading.verify_code in (_HOST_MISMATCH, _IP_MISMATCH):
        return "connect by a name that the certificate has, or make one with fleet provision --host"
    if reading.verify_code == _NO_TLS:
        return "start the server with its keys, without --insecure; is it the right port?"
    if reading.server.authority is None:
        return "give the fleet's own authority: --ca ca.crt, or --bundle"
    if reading.verify_code:
        return "its authority is another one: take the bundle or ca.crt of this server"
    return "is it the right port, and is the server well? See its log"


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__
