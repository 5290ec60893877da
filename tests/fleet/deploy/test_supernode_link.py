import logging
import time
from types import SimpleNamespace

import httpx
import pytest
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.supernode import fleet_http_client, fleet_http_connection, start_client_internal

from fleet.deploy import supernode_link
from fleet.deploy.fleet_client import KEPT_SECONDS
from fleet.deploy.supernode_link import (
    BUSY_SECONDS,
    HEARTBEAT_SECONDS,
    SOON_SECONDS,
    keep_connection,
    keep_trying,
    look_sooner,
    wait_for_heartbeats,
)

BROKEN_INSIDE_TLS = httpx.ReadError("EOF occurred in violation of protocol (_ssl.c:2406)")
WRONG_CERTIFICATE = httpx.ConnectError(
    "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate"
)


@pytest.fixture
def connection():
    """A module of Flower's, of which nothing stays changed."""
    return SimpleNamespace(**vars(fleet_http_connection))


@pytest.fixture
def waits(monkeypatch):
    """Seconds that a retry would have waited."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def failing(error: Exception, times: int):
    """A transfer that goes through after so many failures."""
    left = [error] * times

    def transfer() -> str:
        if left:
            raise left.pop()
        return "sent"

    return transfer


def invoke(connection, transfer):
    invoker = connection.make_simple_http_retry_invoker()
    invoker.wait_function = lambda seconds: None
    return invoker.invoke(transfer)


def test_flowers_own_transfer_is_lost_where_a_connection_breaks_inside_tls(connection):
    """What there is to mend: if this passes no more, `keep_trying` can go."""
    with pytest.raises(httpx.ReadError):
        invoke(connection, failing(BROKEN_INSIDE_TLS, 1))


@pytest.mark.parametrize(
    "error",
    [
        BROKEN_INSIDE_TLS,
        httpx.ConnectError("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred"),
        httpx.ReadError("[Errno 104] Connection reset by peer"),
        httpx.RemoteProtocolError("Server disconnected without sending a response."),
        httpx.WriteTimeout("The write operation timed out"),
    ],
)
def test_a_transfer_outlasts_a_link_that_breaks(connection, error):
    keep_trying(connection)
    assert invoke(connection, failing(error, 5)) == "sent"


def test_a_certificate_that_does_not_hold_still_ends_it(connection):
    keep_trying(connection)
    with pytest.raises(httpx.ConnectError, match="self-signed"):
        invoke(connection, failing(WRONG_CERTIFICATE, 1))


def test_an_answer_that_trying_again_does_not_change_still_ends_it(connection):
    keep_trying(connection)
    request = httpx.Request("POST", "https://server")
    error = httpx.HTTPStatusError("500", request=request, response=httpx.Response(500))
    with pytest.raises(httpx.HTTPStatusError):
        invoke(connection, failing(error, 1))


@pytest.mark.parametrize("state", [True, False])
def test_the_supernode_talks_through_a_patient_client_that_keeps_apps(
    connection, monkeypatch, tmp_path, state
):
    if state:
        monkeypatch.setenv("FLEET_STATE", str(tmp_path))
    else:
        monkeypatch.delenv("FLEET_STATE")
    keep_connection(connection)
    with connection.FleetHttpClient.from_server_address("pi:1", True, None, []) as client:
        assert isinstance(client, fleet_http_client.FleetHttpClient)
        assert client._client._transport._pool._keepalive_expiry == KEPT_SECONDS
        assert (client.apps and client.apps._folder) == (tmp_path / "apps" if state else None)


def test_a_heartbeat_has_the_time_that_a_slow_link_takes(monkeypatch):
    monkeypatch.setattr(fleet_http_client, "HEARTBEAT_CALL_TIMEOUT", 5)  # put back afterwards
    asked = {}
    client = fleet_http_client.FleetHttpClient("https://server")
    monkeypatch.setattr(client, "_unary_unary", lambda **call: asked.update(call))
    wait_for_heartbeats(fleet_http_client)
    client.SendNodeHeartbeat(SendNodeHeartbeatRequest())
    assert asked["timeout"] == HEARTBEAT_SECONDS < HEARTBEAT_DEFAULT_INTERVAL


class Loop:
    """What `look_sooner` changes of Flower's main loop, which it follows."""

    def __init__(self, messages) -> None:
        self.now, self.slept = 0.0, []
        self.messages = iter(messages)
        self.time = SimpleNamespace(sleep=self.sleep, monotonic=time.monotonic)
        self._pull_and_store_message = lambda **kwargs: next(self.messages)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def go_round(self) -> None:
        if self._pull_and_store_message(state=None) is None:
            self.time.sleep(3)


def test_after_a_message_the_next_is_looked_for_soon_and_later_as_seldom_as_before():
    loop = Loop([None, 7, *[None] * 1000])
    look_sooner(loop, clock=lambda: loop.now)
    while loop.now < BUSY_SECONDS + 20:
        loop.go_round()
    assert loop.slept[0] == 3  # nothing has come yet
    soon = loop.slept.count(SOON_SECONDS)
    assert soon * SOON_SECONDS == pytest.approx(BUSY_SECONDS, abs=SOON_SECONDS)
    assert set(loop.slept[1 + soon :]) == {3}


def test_only_flowers_loop_sleeps_less():
    loop = Loop([7])
    look_sooner(loop, clock=lambda: 0.0)
    assert loop.time.monotonic is time.monotonic
    assert time.sleep is not loop.time.sleep


def test_flowers_loop_is_as_look_sooner_takes_it_to_be():
    loop = SimpleNamespace(**vars(start_client_internal))
    look_sooner(loop)
    assert loop._pull_and_store_message is not start_client_internal._pull_and_store_message
    assert loop.time.sleep is not time.sleep


def test_a_flower_that_has_other_names_stays_as_it_is_and_the_log_says_so(monkeypatch, caplog):
    monkeypatch.delattr(start_client_internal, "_pull_and_store_message")
    for name in (
        "keep_trying",
        "keep_connection",
        "wait_for_heartbeats",
        "answer_for_the_dead",
    ):
        monkeypatch.setattr(supernode_link, name, lambda module, **others: None)
    monkeypatch.setattr(supernode_link, "_log", logging.getLogger("flower of a test"))
    supernode_link.improve(give_up=lambda: None)
    assert "this version of Flower stays as it is" in caplog.text
