import asyncio
import hashlib
import json
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace

import pytest
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.date import now
from flwr.supercore.state.schema.corestate_models import Task
from flwr.supercore.state.schema.linkstate_models import Node
from sqlalchemy import update

from fleet.deploy.app_bundle import build_app
from fleet.deploy.superlink import (
    STATUS_PATH,
    Guard,
    device_status,
    keep_signatures,
    listening_sockets,
    may_pass,
    renew_patience,
)

OUTSIDE, LOOPBACK = ("192.168.1.77", 40000), ("127.0.0.1", 40000)


def http(path, client, **more):
    return {"type": "http", "path": path, "client": client, "headers": [], **more}


def test_from_outside_a_flower_superlink_serves_devices_alone():
    from fastapi.routing import iter_route_contexts
    from flwr.superlink.main import create_app

    paths = {context.path for context in iter_route_contexts(create_app().routes)}
    open_paths = {path for path in paths if may_pass(http(path, OUTSIDE))}
    assert open_paths == {path for path in paths if path.startswith("/v1/fleet/")} | {"/health"}
    for served in ("/v1/control/start-run", "/v1/control/register-node", "/v1/fleet/pull-messages"):
        assert served in paths
    assert any(path.startswith("/v1/runtime/") for path in paths)
    assert all(may_pass(http(path, LOOPBACK)) for path in paths)
    assert may_pass(http(STATUS_PATH, OUTSIDE))


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "//v1/fleet/../control/start-run",
        "/V1/FLEET/x",
        "/v1/fleet",
        "/health/../v1/control/start-run",
        "/docs",
        "/openapi.json",
        "",
    ],
)
def test_nothing_else_passes_from_outside(path):
    assert not may_pass(http(path, OUTSIDE))


@pytest.mark.parametrize("client", [None, ("", 0), ("fe80::1", 0), ("::ffff:10.0.0.1", 0)])
def test_a_peer_that_is_not_loopback_for_certain_is_from_outside(client):
    assert not may_pass(http("/v1/control/start-run", client))


def test_headers_do_not_make_anyone_loopback():
    forged = [(b"x-forwarded-for", b"127.0.0.1"), (b"forwarded", b"for=127.0.0.1")]
    assert not may_pass(http("/v1/control/start-run", OUTSIDE, headers=forged))


def answer(scope):
    """What the guard sends, and whether the app behind it was asked."""
    asked, sent = [], []

    async def app(scope, receive, send):
        asked.append(scope["path"])

    async def send(message):
        sent.append(message)

    asyncio.run(Guard(app)(scope, None, send))
    return sent, bool(asked)


def test_the_guard_answers_by_itself_what_may_not_pass():
    sent, asked = answer(http("/v1/control/start-run", OUTSIDE))
    assert not asked and sent[0]["status"] == 403
    assert "only the server's own machine" in json.loads(sent[1]["body"])["detail"]
    assert answer(http("/v1/control/start-run", LOOPBACK)) == ([], True)


def test_the_guard_closes_a_websocket_from_outside():
    sent, asked = answer({"type": "websocket", "path": "/v1/fleet/x", "client": OUTSIDE})
    assert not asked and sent == [{"type": "websocket.close", "code": 1008}]


def test_a_server_on_one_address_is_reached_by_loopback_too():
    here = "127.0.0.5"  # stands for an address of the network: loopback is 127.0.0.1 to our parts
    sockets = listening_sockets(here, 0)
    try:
        assert [each.getsockname()[0] for each in sockets] == [here]
    finally:
        for each in sockets:
            each.close()


def test_a_server_on_all_addresses_listens_once_and_on_both_families():
    (ipv4,) = listening_sockets("0.0.0.0", 0)
    ipv4.close()
    if not socket.has_dualstack_ipv6():
        pytest.skip("needs IPv6")
    (both,) = listening_sockets("::", 0)
    with both:
        threading.Thread(target=both.accept, daemon=True).start()
        socket.create_connection(("127.0.0.1", both.getsockname()[1]), timeout=10).close()


def test_a_port_that_is_taken_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError):
        listening_sockets("127.0.0.1", taken.getsockname()[1])


@pytest.fixture
def linkstate(tmp_path):
    """Flower's own, over a file."""
    from flwr.superlink.config_loader import (
        get_federation_manager,
        get_objectstore_linkstate_factories,
    )

    manager = get_federation_manager()
    database = str(tmp_path / "flower.db")
    _, factory = get_objectstore_linkstate_factories(database, manager)
    return factory.state()


def test_a_device_is_seen_as_flower_sees_it(linkstate):
    assert device_status(linkstate, b"key") == {"status": "unknown"}
    node = linkstate.create_node("aid", "name", b"key", 30)
    assert device_status(linkstate, b"key") == {"status": "registered"}
    linkstate.activate_node(node, 30)
    assert device_status(linkstate, b"key") == {"status": "online"}
    linkstate.deactivate_node(node)
    assert device_status(linkstate, b"key") == {"status": "offline"}
    linkstate.delete_node("aid", node)
    assert device_status(linkstate, b"key") == {"status": "unknown"}


@pytest.fixture
def submit(linkstate):
    """Function of an app and its signatures, which Flower's own handler starts a run of.

    It returns the signatures that a device is handed.
    """
    from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
    from flwr.common.serde import fab_to_proto
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.supercore.auth.typing import AccountInfo
    from flwr.supercore.fab import Fab
    from flwr.superlink.servicer.control import control_handlers

    handlers = SimpleNamespace(**vars(control_handlers))
    keep_signatures(handlers)
    account = AccountInfo(flwr_aid=NOOP_FLWR_AID, account_name=NOOP_ACCOUNT_NAME)

    def submit(app, signatures, start_run=handlers.start_run):
        fab = Fab(hashlib.sha256(app).hexdigest(), app, signatures)
        answer = start_run(StartRunRequest(fab=fab_to_proto(fab)), account, linkstate, None)
        (run,) = linkstate.get_run_info(run_ids=[answer.run_id])
        return linkstate.get_fab(run.fab_hash).verifications

    return submit


def test_an_app_keeps_the_signatures_that_it_is_submitted_with(submit):
    app = build_app()
    assert submit(app, {}) == {"valid_license": "Valid"}
    first = {"valid_license": "Valid", "SHA256:one": "{}"}
    assert submit(app, {"SHA256:one": "{}"}) == first
    assert submit(app, {}) == first  # what was signed before stays so
    assert submit(app, {"SHA256:two": "[]"}) == first | {"SHA256:two": "[]"}


def test_flowers_own_handler_drops_signatures(submit):
    """What there is to mend: if it keeps them, it is mended."""
    from flwr.superlink.servicer.control import control_handlers

    assert submit(build_app(), {"SHA256:one": "{}"}, control_handlers.start_run) == {}


def test_a_flower_that_starts_runs_elsewhere_is_not_served():
    with pytest.raises(AttributeError, match="start_run"):
        keep_signatures(SimpleNamespace())


@pytest.fixture
def silent(linkstate):
    """Ids and tokens of two tasks that run, of which nothing was heard for an hour."""
    tasks = []
    for _ in range(2):
        run = linkstate.create_run(
            None, None, None, {}, NOOP_FEDERATION_ID, None, None, TaskType.SERVER_APP
        )
        (info,) = linkstate.get_run_info(run_ids=[run])
        tasks.append((info.primary_task_id, linkstate.claim_task(info.primary_task_id)))
        assert linkstate.activate_task(info.primary_task_id)
    with linkstate.session() as session:
        session.execute(update(Task).values(active_until=now() - timedelta(hours=1)))
    return tasks


@contextmanager
def process_of(token):
    command = [sys.executable, "-c", "input()", "--token", token]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        yield
        process.communicate(b"\n")


def test_a_task_whose_process_lives_is_not_dead_for_what_no_superlink_could_hear(linkstate, silent):
    (lives, its_token), (dead, _) = silent
    with process_of(its_token):
        renew_patience(linkstate)
    assert linkstate.acknowledge_task_heartbeat(lives)
    assert not linkstate.acknowledge_task_heartbeat(dead)
    (task,) = linkstate.get_tasks(task_ids=[dead])
    assert task.status.details == "No heartbeat received from the task"


def test_a_task_that_was_taken_for_dead_stays_so(linkstate, silent):
    (dead, its_token), _ = silent
    assert not linkstate.acknowledge_task_heartbeat(dead)
    with process_of(its_token):
        renew_patience(linkstate)
    assert not linkstate.acknowledge_task_heartbeat(dead)


def test_a_device_is_not_offline_for_what_no_superlink_could_hear(linkstate):
    nodes = [linkstate.create_node("aid", "name", key, 30) for key in (b"here", b"left")]
    for node in nodes:
        linkstate.activate_node(node, 30)
    linkstate.deactivate_node(nodes[1])
    with linkstate.session() as session:
        session.execute(update(Node).values(online_until=now().timestamp() - 3600))
    renew_patience(linkstate)
    assert device_status(linkstate, b"here") == {"status": "online"}
    assert device_status(linkstate, b"left") == {"status": "offline"}
