import contextlib
import hashlib
import http.server
import os
import threading
import time

import httpx
import pytest
from flwr.proto.fab_pb2 import Fab, GetFabRequest, GetFabResponse
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.supernode.fleet_http_client import FleetHttpClient

from fleet.deploy.fleet_client import APPS_KEPT, KEPT_SECONDS, Apps, Pace, patient_client
from fleet.deploy.superlink import KEEP_ALIVE_SECONDS

KIB = 1024
PATIENT = patient_client(FleetHttpClient, None)


@contextlib.contextmanager
def server(answer=lambda path: b""):
    """A web server on loopback: its address, and a list of a path for every connection."""
    connections = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self):
            super().setup()
            connections.append([])
            self.mine = connections[-1]

        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            self.mine.append(self.path)
            body = answer(self.path)
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            """Silent."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        web.daemon_threads = True
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{web.server_port}", connections
        web.shutdown()


def connect(kind, address):
    return kind(f"http://{address}")


@pytest.mark.parametrize(("kind", "expected"), [(FleetHttpClient, 2), (PATIENT, 1)])
def test_a_connection_that_is_not_used_for_a_while_is_kept(kind, expected):
    """What there is to mend: if Flower's own takes one too, it is mended."""
    with server() as (address, connections), connect(kind, address) as client:
        for pause in (0.0, 5.5):
            time.sleep(pause)
            assert client.PullMessages(PullMessagesRequest()) == PullMessagesResponse()
        assert len(connections) == expected


def test_the_server_keeps_a_connection_longer_than_the_device():
    """Else it closes one just as the device's next question is on its way."""
    assert KEEP_ALIVE_SECONDS >= KEPT_SECONDS + 30


def app(content=b"an app", **more):
    fab_hash = hashlib.sha256(content).hexdigest()
    return GetFabResponse(fab=Fab(hash_str=fab_hash, content=content, **more))


def test_an_app_is_fetched_once_and_kept_for_the_next_client(tmp_path):
    signed = app(verifications={"key": "signature"})
    request = GetFabRequest(hash_str=signed.fab.hash_str)
    with server(lambda path: signed.SerializeToString()) as (address, connections):
        for _ in range(2):
            with connect(patient_client(FleetHttpClient, tmp_path / "apps"), address) as client:
                assert [client.GetFab(request) for _ in range(2)] == [signed, signed]
        assert connections == [["/v1/fleet/get-fab"]]


def test_without_a_folder_apps_are_fetched_each_time():
    with (
        server(lambda path: app().SerializeToString()) as (address, connections),
        connect(PATIENT, address) as client,
    ):
        for _ in range(2):
            assert client.GetFab(GetFabRequest(hash_str=app().fab.hash_str)) == app()
        assert connections == [["/v1/fleet/get-fab"] * 2]


@pytest.mark.parametrize("damage", [b"", b"\xff" * 9, app(b"another app").SerializeToString()])
def test_an_app_that_was_changed_on_the_disk_is_not_used(tmp_path, damage):
    apps = Apps(tmp_path)
    apps.keep(app())
    (path,) = tmp_path.iterdir()
    assert apps.find(app().fab.hash_str) == app()
    path.write_bytes(damage)
    assert apps.find(app().fab.hash_str) is None


def test_the_apps_that_were_used_last_are_kept(tmp_path):
    apps = Apps(tmp_path)
    (tmp_path / "notes.txt").write_text("somebody's own")
    versions = [app(b"version %d" % i) for i in range(APPS_KEPT + 3)]
    for day, version in enumerate(versions):
        apps.keep(version)
        assert apps.find(versions[0].fab.hash_str) is not None  # a run that goes on
        for path in tmp_path.glob("*.app"):
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 1000 * (9 - day)))
    kept = [version for version in versions if apps.find(version.fab.hash_str)]
    assert kept == [versions[0], *versions[-APPS_KEPT + 1 :]]
    assert (tmp_path / "notes.txt").exists()


def test_a_server_cannot_choose_where_an_app_is_looked_for(tmp_path):
    (tmp_path / "x.app").write_bytes(app().SerializeToString())
    assert Apps(tmp_path / "apps").find("../x") is None


def test_a_folder_that_cannot_be_written_is_told_and_keeps_nothing(tmp_path, caplog):
    (tmp_path / "apps").write_text("a file")
    Apps(tmp_path / "apps").keep(app())
    assert f"the app is not kept in {tmp_path / 'apps'}: " in caplog.text


class Link:
    """A link of so many bytes a second, in a time of its own, and a pace that learns of it."""

    def __init__(self, bytes_per_second, delay=0.0):
        self.bytes_per_second, self.delay, self.now = bytes_per_second, delay, 0.0
        self.pace = Pace(30.0, clock=lambda: self.now)

    def send(self, nbytes, answer=0):
        """A request and its answer, which times out if it does not begin in time."""
        with self.pace.timing(nbytes) as transfer:
            until_answer = self.delay + nbytes / self.bytes_per_second
            if until_answer > transfer.timeout:
                self.now += transfer.timeout
                raise httpx.ReadTimeout("The read operation timed out")
            self.now += until_answer + answer / self.bytes_per_second
            transfer.nbytes += answer

    def tries(self, nbytes):
        """How often a request is sent until its answer comes."""
        for count in range(1, 20):
            with contextlib.suppress(httpx.ReadTimeout):
                self.send(nbytes)
                return count
        raise AssertionError("it never goes through")


@pytest.mark.parametrize("kbits", [8, 16, 32, 64, 128, 256, 1000])
def test_a_request_goes_through_however_slow_the_link_is(kbits):
    link = Link(kbits * 125, delay=2.0)
    assert link.tries(256 * KIB) <= 5
    assert [link.tries(256 * KIB) for _ in range(9)] == [1] * 9  # it has learnt


def test_an_answer_teaches_how_long_a_request_takes():
    link = Link(8_000, delay=2.0)
    link.send(200, answer=300 * KIB)  # the app of a run
    assert link.tries(256 * KIB) == 1


def test_a_link_that_is_fast_again_is_given_up_as_soon_as_before():
    link = Link(8_000)
    link.tries(256 * KIB)
    assert link.pace.timeout(256 * KIB) > 90
    link.bytes_per_second = 10_000_000
    link.send(256 * KIB)
    assert link.pace.timeout(256 * KIB) == pytest.approx(30.0, abs=0.1)


def test_small_requests_tell_nothing_of_the_pace():
    link = Link(1e9, delay=29.0)
    for _ in range(3):
        link.send(500)
    link.delay = 31.0
    with pytest.raises(httpx.ReadTimeout):
        link.send(500)
    assert link.pace.timeout(5 * KIB * KIB) == 30.0


def test_nobody_waits_for_ever():
    link = Link(1.0)
    for _ in range(20):
        with pytest.raises(httpx.ReadTimeout):
            link.send(256 * KIB)
    assert link.pace.timeout(256 * KIB) == Pace.MOST_SECONDS


def test_a_request_is_given_the_time_that_its_size_takes():
    timeouts = []
    with server() as (address, _), connect(PATIENT, address) as client:
        client._pace.seconds_per_byte = 1e-3
        send = client._client.send
        client._client.send = lambda request, **more: (
            timeouts.append(request.extensions["timeout"]["read"]) or send(request, **more)
        )
        content = os.urandom(15 * KIB)
        client.PushObject(PushObjectRequest(object_content=content))
        client.PullMessages(PullMessagesRequest())
    assert timeouts == [pytest.approx(30.0 + 3 * 15.36, abs=0.1), 30.0]
