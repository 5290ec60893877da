import re
import socket
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

from clients.doctor.address import Server
from clients.doctor.server import (
    AHEAD_SECONDS,
    BEHIND_SECONDS,
    Reading,
    call,
    clock_finding,
    server_findings,
)
from tests.deployment import Processes, free_ports, handshake
from tests.many import many

HOST = "127.0.0.1"
DAY = 24 * 3600


def findings(server):
    return {finding.check: finding for finding in server_findings(call(server), time.time())}


def states(reading):
    """Of all findings; a clock that a busy machine told too slowly is taken for ok."""
    found = server_findings(reading, time.time())
    slow = reading.received - reading.sent > 1
    return ["ok" if slow and f.check == "clock" else f.state for f in found]


def certificate(server):
    return findings(server)["certificate"]


def test_a_server_that_is_well_is_three_times_ok(authority, serve):
    server = serve(authority)
    reading = call(server)
    assert states(reading) == ["ok", "ok", "ok"]
    answers, signed, _ = server_findings(reading, time.time())
    assert answers.fact == f"{HOST}:{server.port} answers, at {HOST}"
    assert signed.fact == f"signed by the authority for {HOST}, the certificate ends in 99 days"


def test_a_certificate_that_ends_soon_is_a_warning(authority, serve):
    found = certificate(serve(authority, ends=20.5))
    assert found.state == "warning"
    assert found.fact.endswith("the certificate ends in 20 days")
    assert found.remedy == "on the server: fleet provision --renew"


def test_an_authority_that_ends_before_its_certificate_counts(authority, serve):
    reading = call(serve(authority, ends=200))
    late = reading.authority_ends - 10.5 * DAY
    found = server_findings(reading, late)[1]
    assert found.state == "warning"
    assert found.fact.endswith("its authority ends in 10 days")
    assert "a new bundle for every device" in found.remedy


@pytest.mark.parametrize(
    ("made", "fault", "remedy"),
    [
        (
            {"ends": -0.5},
            "certificate has expired",
            "on the server: fleet provision --renew",
        ),
        (
            {"names": ("elsewhere.local",)},
            "IP address mismatch, certificate is not valid for '127.0.0.1'",
            "connect by a name that the certificate has, or make one with fleet provision --host",
        ),
    ],
)
def test_a_certificate_that_does_not_hold_is_a_problem(authority, serve, made, fault, remedy):
    found = certificate(serve(authority, **made))
    assert (found.state, found.remedy) == ("problem", remedy)
    assert fault in found.fact


def test_a_certificate_of_tomorrow_and_a_clock_that_is_behind_send_to_the_clock(authority, serve):
    found = findings(serve(authority, begins=0.5, ahead=DAY))
    assert found["certificate"].fact == "certificate is not yet valid"
    assert found["certificate"].remedy == "set this device's clock first (next line)"
    assert found["clock"].state == "problem"
    behind = re.match(r"(\d+) s behind the server's, ± (\d+) s; Flower", found["clock"].fact)
    assert abs(int(behind[1]) - DAY) <= int(behind[2]) + 1  # rounded


def test_another_authority_is_told_from_none(authority, serve, tmp_path):
    server = serve(authority)
    (tmp_path / "other").mkdir()
    other = type(authority)(tmp_path / "other")
    foreign = certificate(replace(server, authority=other.pem))
    assert foreign.state == "problem"
    assert foreign.remedy == (
        "its authority is another one: take the bundle or ca.crt of this server"
    )
    none = certificate(replace(server, authority=None))
    assert none.state == "problem"
    assert none.remedy == "give the fleet's own authority: --ca ca.crt, or --bundle"


def test_an_authority_that_is_no_certificate_is_said_to_be_so(authority, serve):
    found = certificate(replace(serve(authority), authority="no certificate"))
    assert found.state == "problem"
    assert found.fact == "the authority's certificate cannot be read"


def test_a_server_without_tls_is_a_problem_and_still_tells_the_time(authority, serve):
    server = serve(authority, tls=False)
    reading = call(server)
    assert states(reading) == ["ok", "problem", "ok"]
    assert server_findings(reading, time.time())[1].fact == f"{server} does not speak TLS"


def test_a_port_on_which_nothing_listens(authority):
    (port,) = free_ports(1)
    found = findings(Server(HOST, port, authority.pem))
    assert found["server"].state == "problem"
    assert found["server"].fact == f"{HOST}:{port}: Connection refused"
    assert found["server"].remedy.endswith(f"nothing listens on port {port}: start fleet server")
    assert [found[check].state for check in ("certificate", "clock")] == ["unknown", "unknown"]


def test_a_name_that_does_not_resolve(authority, monkeypatch):
    def resolve(*arguments, **options):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    found = findings(Server("nowhere.invalid", 8000, authority.pem))
    assert found["server"].fact == "nowhere.invalid:8000: Name or service not known"
    assert "ping nowhere.invalid" in found["server"].remedy


def test_a_server_that_does_not_tell_the_time_leaves_the_clock_unknown(authority, serve):
    server = serve(authority, tells_time=False)
    found = findings(server)["clock"]
    assert (found.state, found.fact) == ("unknown", f"{server} did not tell the time")


@pytest.mark.parametrize(
    ("ahead", "state"),
    [
        (8, "problem"),
        (5, "warning"),  # within the header's grain of the limit
        (0, "ok"),
        (-60, "warning"),
        (-303, "warning"),
        (-310, "problem"),
    ],
)
def test_the_clock_is_held_to_flowers_limits(ahead, state):
    server_time = 1_000_000.5
    reading = Reading(
        Server(HOST, 8000),
        date=float(int(server_time)),
        sent=server_time + ahead - 0.01,
        received=server_time + ahead + 0.01,
    )
    found = clock_finding(reading)
    assert found.state == state
    if state == "ok":
        assert found.fact == "within 2 s of the server's"
    else:
        assert "Flower refuses 5 s ahead and 305 s behind" in found.fact
        assert found.remedy == "sudo timedatectl set-ntp true, here and on the server"


def test_an_answer_that_took_too_long_tells_nothing_of_the_clock():
    reading = Reading(Server(HOST, 8000), date=1000.0, sent=1000.0, received=1009.0)
    found = clock_finding(reading)
    assert found.state == "unknown"
    assert found.fact.startswith(f"{HOST}:8000 answered too slowly to tell, ")


@many("fraction", [0.0, 0.3, 0.999])
@many("stale", [0, 1])
@many("delay", [0.0, 0.8])
@pytest.mark.parametrize("ahead", [-400, -306.5, -20, 0, 3, 7.5])
def test_the_true_offset_lies_within_what_is_said(fraction, stale, delay, ahead):
    """Whatever the header's age and wherever in the exchange the server read its clock."""
    server_time = 1_000_000 + fraction
    for part in (0.0, 0.5, 1.0):  # of the delay that had passed
        sent = server_time + ahead - part * delay
        reading = Reading(
            Server(HOST, 8000), date=float(int(server_time)) - stale, sent=sent,
            received=sent + delay,
        )  # fmt: skip
        # A header one second old and a clock read at its end lie at the edge.
        assert (clock_finding(reading).state == "problem") <= (ahead >= 5 or ahead <= -305)


def test_the_limits_are_flowers():
    assert AHEAD_SECONDS == SYSTEM_TIME_TOLERANCE
    assert BEHIND_SECONDS == SYSTEM_TIME_TOLERANCE + TIMESTAMP_TOLERANCE


def test_a_real_superlink_is_well_and_tells_the_time(authority):
    (port,) = free_ports(1)
    pem, key = authority.server_files()
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder:
        processes = Processes(Path(folder))
        try:
            processes.start(
                "superlink",
                "server",
                "flower-superlink",
                *("--host", HOST, "--port", port, "--enable-supernode-auth"),
                *("--ssl-ca-certfile", authority.path, "--ssl-certfile", pem, "--ssl-keyfile", key),
                *("--database", "state.db", "--disable-runtime-dependency-installation"),
            )
            processes.wait("SuperLink listens", lambda: handshake(port, authority.path), 120)
            reading = call(Server(HOST, port, authority.pem))
        finally:
            processes.stop()
    assert states(reading) == ["ok", "ok", "ok"]
    fast = replace(reading, sent=reading.sent + 60, received=reading.received + 60)
    assert clock_finding(fast).state == "problem"
