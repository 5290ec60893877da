"""The SuperLink, with a guard before it: from outside it serves devices, and nobody else.

    python -m fleet.deploy.superlink ARGUMENTS    # those of flower-superlink

Flower 1.41 serves three APIs on one port: for devices (Fleet), for who starts runs
and registers devices (Control), and for the server's own processes (Runtime). The
last two ask for no key: whoever reaches the port could start code of his own on
every device. So here they are reached from this machine alone.

Names of Flower's that this module needs are imported as they are: if a version
has them no more, the server does not start, rather than without its guard.
"""

import contextlib
import ipaddress
import json
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import replace
from datetime import timedelta
from types import ModuleType
from typing import Any

import psutil
from sqlalchemy import select, update

from fleet.deploy.addresses import is_loopback
from fleet.deploy.flower_process import end_with_parent

STATUS_PATH = "/fleet/v1/device"  # how the server sees the device that asks
# That nobody asks on a connection before it is closed. A device asks every 3 s, and with a
# round trip of 2 s uvicorn's 5 s close it just as the next question is under way: each then
# costs a new connection, three round trips. Devices close theirs sooner.
KEEP_ALIVE_SECONDS = 120

_OPEN = ("/v1/fleet/", STATUS_PATH)
_HEALTH = "/health"

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Guard:
    """Lets requests from other machines through to the API of devices alone.

    Args:
        app: what answers a request that may pass.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or may_pass(scope):
            await self._app(scope, receive, send)
            return
        await _refuse(scope, send)


def may_pass(scope: Scope) -> bool:
    """Whether a request is one that its sender may make.

    Args:
        scope: of ASGI; `client` is the peer of the connection, never a header.
    """
    client = scope.get("client")
    if client is not None and is_loopback(client[0]):
        return True
    path = scope.get("path", "")
    return scope["type"] == "http" and (path == _HEALTH or path.startswith(_OPEN))


async def _refuse(scope: Scope, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    body = json.dumps({"detail": "only the server's own machine may ask for this"}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def listening_sockets(host: str, port: int) -> list[socket.socket]:
    """Sockets on which the server listens: the host's, and loopback for its own processes.

    Raises:
        OSError: if the address is taken, or is none of this machine.
    """
    sockets = [_listen(host, port)]
    if not (_is_wildcard(host) or is_loopback(host)):
        sockets.append(_listen("127.0.0.1", port))
    return sockets


def _listen(host: str, port: int) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    both = family == socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6()
    return socket.create_server(address, family=family, backlog=2048, dualstack_ipv6=both)


def cannot_listen(host: str, port: int, error: OSError) -> str:
    """Why there are no `listening_sockets`, with the way out."""
    return (
        f"cannot listen on {host}, port {port}: {error.strerror or error}; end what listens there, "
        f"or name another --host or --port"
    )


def _is_wildcard(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_unspecified
    return False


def device_status(linkstate: Any, public_key: bytes) -> dict[str, Any]:
    """How the SuperLink sees the node that has a key: `online`, `offline`, `registered`, `unknown`.

    Args:
        linkstate: Flower's, of the running SuperLink.
        public_key: PEM.
    """
    node_id = linkstate.get_node_id_by_public_key(public_key)
    nodes = linkstate.get_node_info(node_ids=[node_id]) if node_id is not None else ()
    return {"status": nodes[0].status if nodes else "unknown"}


def _add_status_route(app: Any) -> None:
    """Serve `STATUS_PATH`: a signed question, of the device about itself."""
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse

    from fleet.deploy.device_status import asking_key

    async def answer(request: Request) -> JSONResponse:
        public_key = asking_key(request.headers)
        if public_key is None:
            return JSONResponse({"detail": "the signature is not valid"}, status_code=401)
        linkstate = request.app.state.linkstate_factory.state()
        return JSONResponse(await run_in_threadpool(device_status, linkstate, public_key))

    app.add_route(STATUS_PATH, answer, methods=["GET"])


def keep_signatures(handlers: ModuleType) -> None:
    """Let an app that is submitted keep the signatures that come with it.

    Flower 1.41 keeps those of its own Hub alone. Here nobody verifies them: devices do.

    Args:
        handlers: `flwr.superlink.servicer.control.control_handlers`; its callers look
            functions up in it each time.
    """
    start = handlers.start_run

    def start_signed(request: Any, account: Any, state: Any, *others: Any, **named: Any) -> Any:
        signed = _SigningState(state, request.fab.verifications)
        return start(request, account, signed, *others, **named)

    handlers.start_run = start_signed


class _SigningState:
    """Flower's state, for the start of one run: apps are stored with signatures.

    They belong to the code: an app that was signed before stays so if the same is
    submitted without a signature.
    """

    def __init__(self, state: Any, signatures: Mapping[str, str]) -> None:
        self._state = state
        self._signatures = dict(signatures)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def store_app(self, fab: Any, **others: Any) -> Any:
        """As Flower's; "valid_license" is its word for a server that hands signatures on."""
        before = self._state.get_fab(fab.hash_str)
        known = before.verifications if before is not None else {}
        signatures = {"valid_license": "Valid", **known, **self._signatures}
        return self._state.store_app(fab=replace(fab, verifications=signatures), **others)


def renew_patience(linkstate: Any) -> None:
    """Count from now on for how long nothing was heard of devices and of tasks that run.

    While no SuperLink was there, nothing could be heard: those that are well would be taken for
    dead by the first who asks for anything. Of a task its process has to live.

    Args:
        linkstate: Flower's, of a SuperLink that is about to serve.
    """
    from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_PATIENCE
    from flwr.supercore.constant import NodeStatus
    from flwr.supercore.date import now
    from flwr.supercore.state.schema.corestate_models import Task
    from flwr.supercore.state.schema.linkstate_models import Node

    until = now() + timedelta(seconds=HEARTBEAT_PATIENCE * HEARTBEAT_DEFAULT_INTERVAL)
    with linkstate.session() as session:
        online = update(Node).where(Node.status == NodeStatus.ONLINE)
        session.execute(online.values(online_until=until.timestamp()))
        of_running = select(Task.token).where(
            Task.token.is_not(None), Task.running_at.is_not(None), Task.finished_at.is_(None)
        )
        if tokens := set(session.scalars(of_running)):
            alive = update(Task).where(Task.token.in_(tokens & _words_of_processes()))
            session.execute(alive.values(active_until=until))


def _words_of_processes() -> set[str]:
    """Of all command lines on this machine: Flower gives a task's process its token there."""
    lines = (process.info["cmdline"] or () for process in psutil.process_iter(["cmdline"]))
    return {word for line in lines for word in line}


def main() -> None:
    """Run the SuperLink until it is told to end, or its parent is gone."""
    end_with_parent()
    sys.argv[0] = "flower-superlink"
    import uvicorn
    from flwr.supercore.http_logging import get_uvicorn_log_config
    from flwr.supercore.logger import console_handler
    from flwr.superlink.cli.flower_superlink import (
        SuperLinkLifespan,
        _parse_superlink_lifespan_config,
    )
    from flwr.superlink.main import create_app
    from flwr.superlink.servicer.control import control_handlers
    from flwr.superlink.servicer.fleet import fleet_handlers
    from flwr.superlink.servicer.runtime import runtime_handlers

    from fleet.deploy.delivery import DeviceDeliveries, RunDeliveries

    DeviceDeliveries(fleet_handlers).install(fleet_handlers)
    RunDeliveries(runtime_handlers).install(runtime_handlers)
    keep_signatures(control_handlers)
    config = _parse_superlink_lifespan_config()

    class Lifespan(SuperLinkLifespan):
        def startup(self) -> None:
            super().startup()
            renew_patience(self.state_factory.state())

    app = create_app(config, Lifespan)
    _add_status_route(app)
    try:
        sockets = listening_sockets(config.host, config.port)
    except OSError as error:
        sys.exit(cannot_listen(config.host, config.port, error))
    server = uvicorn.Server(
        uvicorn.Config(
            Guard(app),
            access_log=False,  # devices ask every 3 s: it would fill the disk
            proxy_headers=False,  # who asks is the peer, whatever a header says
            server_header=False,
            log_config=get_uvicorn_log_config(console_handler.level),
            ssl_certfile=config.ssl_certfile,
            ssl_keyfile=config.ssl_keyfile,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=5,
        )
    )
    server.run(sockets=sockets)


if __name__ == "__main__":
    main()
