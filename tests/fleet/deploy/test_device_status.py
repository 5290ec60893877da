import base64
import contextlib
import datetime
import email.utils
import http.server
import ssl
import threading

import pytest
from cryptography.hazmat.primitives import serialization

from fleet.deploy import device_status as module
from fleet.deploy.addresses import Address
from fleet.deploy.certificates import (
    issue_server_certificate,
    make_authority,
    make_device_key,
    public_pem,
)
from fleet.deploy.device_status import Asker, asking_key, signed_headers
from fleet.errors import ConfigError

PATH = "/status"


@pytest.fixture(scope="module")
def device():
    private, public = make_device_key()
    return private, serialization.load_ssh_private_key(private, password=None), public_pem(public)


def test_a_question_shows_whose_it_is(device):
    _, key, public = device
    assert asking_key(signed_headers(key)) == public


def changed(headers, name, change):
    value = base64.b64decode(headers[name])
    return headers | {name: base64.b64encode(change(value)).decode()}


def test_a_question_that_was_tampered_with_shows_nobody(device):
    headers = signed_headers(device[1])
    other = serialization.load_ssh_private_key(make_device_key()[0], password=None)
    theirs = signed_headers(other)
    for forged in (
        changed(headers, "fleet-signature", lambda s: s[:-1] + bytes([s[-1] ^ 1])),
        headers | {"fleet-public-key": theirs["fleet-public-key"]},
        headers | {"fleet-signature": theirs["fleet-signature"]},
        headers | {"fleet-timestamp": datetime.datetime.now(datetime.UTC).isoformat()},
        headers | {"fleet-timestamp": "yesterday"},
        headers | {"fleet-timestamp": "2026-01-01T00:00:00"},
        headers | {"fleet-public-key": "%%%"},
        headers | {"fleet-public-key": base64.b64encode(b"nothing").decode()},
        *({k: v for k, v in headers.items() if k != missing} for missing in headers),
        {},
    ):
        assert asking_key(forged) is None


def test_a_signature_for_flower_is_none_for_us_nor_ours_for_flower(device):
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    _, key, _ = device
    headers = signed_headers(key)
    timestamp = headers["fleet-timestamp"]
    flowers = key.sign(timestamp.encode(), ec.ECDSA(hashes.SHA256()))
    signature = base64.b64encode(flowers).decode()
    assert asking_key(headers | {"fleet-signature": signature}) is None
    with pytest.raises(InvalidSignature):
        ours = base64.b64decode(headers["fleet-signature"])
        key.public_key().verify(ours, timestamp.encode(), ec.ECDSA(hashes.SHA256()))


def test_a_question_that_somebody_kept_is_not_answered(device, monkeypatch):
    headers = signed_headers(device[1])
    today = datetime.datetime

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, zone=None):
            return today.now(zone) + datetime.timedelta(days=1, seconds=5)

    monkeypatch.setattr(module.datetime, "datetime", Tomorrow)
    assert asking_key(headers) is None


@contextlib.contextmanager
def server(folder, *, code=200, body=b'{"status": "online"}', date="now", foreign=False):
    """An HTTPS server that answers one way, of the client's authority or of another."""
    authority = make_authority()
    issuer = make_authority() if foreign else authority
    signed = issue_server_certificate(issuer, ["127.0.0.1"])
    (folder / "ca.crt").write_bytes(authority.certificate)
    (folder / "server.pem").write_bytes(signed.certificate)
    (folder / "server.key").write_bytes(signed.key)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append((self.path, dict(self.headers)))
            self.send_response_only(code)
            if date is not None:
                self.send_header("date", self.date_time_string() if date == "now" else date)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.asked = []
        httpd.socket = context.wrap_socket(httpd.socket, server_side=True)
        httpd.handle_error = lambda *_: None
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        try:
            yield httpd
        finally:
            httpd.shutdown()
            thread.join()


@pytest.fixture
def ask(tmp_path, device):
    """Ask a server that answers as told."""
    (tmp_path / "device.key").write_bytes(device[0])

    def asked(**how):
        with server(tmp_path, **how) as httpd:
            address = Address("127.0.0.1", httpd.server_port)
            seen = Asker(address, PATH, tmp_path / "device.key", tmp_path / "ca.crt").ask()
            return seen, httpd.asked

    return asked


def test_the_answer_and_the_clock_come_back(ask, device):
    seen, ((path, headers),) = ask()
    assert (seen.status, seen.problem) == ("online", "")
    assert path == PATH and asking_key({k.lower(): v for k, v in headers.items()}) == device[2]
    assert abs(seen.clock_offset) < 30 and not seen.clock_is_off


@pytest.mark.parametrize(
    ("ahead", "off"), [(3600, True), (60, True), (-200, False), (-400, True), (-86400, True)]
)
def test_a_clock_that_flower_refuses_is_noticed(ask, ahead, off):
    now = datetime.datetime.now(datetime.UTC).timestamp()
    seen, _ = ask(date=email.utils.formatdate(now - ahead, usegmt=True))
    assert seen.clock_is_off == off
    assert abs(seen.clock_offset - ahead) < 30


def test_without_a_date_the_clock_is_not_judged(ask):
    seen, _ = ask(date=None)
    assert seen.clock_offset is None and not seen.clock_is_off


def test_a_signature_that_is_refused_is_told(ask):
    assert ask(code=401)[0].status == "refused"


@pytest.mark.parametrize(
    ("code", "body"),
    [(404, b"{}"), (200, b"<html>"), (200, b"[]"), (200, b'{"status": "fine"}')],
)
def test_an_answer_that_is_none_of_ours_is_told(ask, code, body):
    seen, _ = ask(code=code, body=body)
    assert seen.status == "unreachable" and f"the server answered {code}" in seen.problem


@pytest.mark.parametrize("code", [500, 503])
def test_a_server_that_cannot_serve_is_told_from_one_that_is_none_of_ours(ask, code):
    seen, _ = ask(code=code, body=b"Internal Server Error")
    assert seen.status == "unreachable"
    why = f"the server answered {code}: it is there and cannot serve, its own log says why"
    assert seen.problem == why


def test_a_server_of_another_authority_is_not_believed(ask):
    seen, asked = ask(foreign=True)
    assert seen.status == "unreachable" and not asked
    assert "certificate is not of this bundle's authority" in seen.problem


def test_nobody_there_is_told(tmp_path, device):
    (tmp_path / "device.key").write_bytes(device[0])
    with server(tmp_path) as httpd:
        port = httpd.server_port
    asker = Asker(Address("127.0.0.1", port), PATH, tmp_path / "device.key", tmp_path / "ca.crt")
    seen = asker.ask()
    assert seen.status == "unreachable" and "ConnectionRefusedError" in seen.problem


def test_a_bundle_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "device.key").write_text("x")
    with pytest.raises(ConfigError, match="the bundle's key or certificate cannot be read"):
        Asker(Address("127.0.0.1"), PATH, tmp_path / "device.key", tmp_path / "ca.crt")
