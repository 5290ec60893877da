"""Flower's Control API, as much of it as a server needs: its nodes and its runs."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleet.deploy.addresses import Address
from fleet.errors import FleetError

ONLINE, UNREGISTERED = "online", "unregistered"

_RECENT_RUNS = 100


class ControlError(FleetError):
    """The SuperLink did not do what it was asked.

    Attributes:
        refused: it answered, and would answer the same again; else it was not reached.
        code: Flower's own; 0 if it gave none.
    """

    def __init__(self, message: str, refused: bool, code: int = 0) -> None:
        super().__init__(message)
        self.refused = refused
        self.code = code


@dataclass(frozen=True)
class Node:
    """A node that Flower knows.

    Attributes:
        id: Flower's.
        public_key: PEM.
        status: `registered`, `online`, `offline` or `unregistered`.
    """

    id: int
    public_key: bytes
    status: str


@dataclass(frozen=True)
class FlowerRun:
    """A run that Flower knows.

    Attributes:
        status: `pending`, `starting`, `running` or `finished`.
        outcome: of a finished one: `completed`, `failed` or `stopped`.
        details: why, in Flower's words.
    """

    status: str
    outcome: str
    details: str


class Control:
    """A connection to the SuperLink of this machine.

    Args:
        address: on loopback.
        authority: certificate that the server's is verified against; None: no TLS.
    """

    def __init__(self, address: Address, authority: Path | None) -> None:
        from flwr.supercore.control.control_http_client import ControlHttpClient
        from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor

        self._client = ControlHttpClient.from_server_address(
            str(address),
            insecure=authority is None,
            root_certificates=None if authority is None else str(authority),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )

    def close(self) -> None:
        """Let the connection go."""
        self._client.close()

    def nodes(self) -> list[Node]:
        """All nodes, those that were unregistered among them.

        Raises:
            ControlError: as every method, if the SuperLink does not do it.
        """
        from flwr.proto.control_pb2 import ListNodesRequest

        with _translated("list its nodes"):
            listed = self._client.ListNodes(ListNodesRequest())
        return [Node(node.node_id, node.public_key, node.status) for node in listed.nodes_info]

    def register(self, public_key: bytes, name: str) -> None:
        """Let a node with a key, PEM, take part."""
        from flwr.proto.control_pb2 import RegisterNodeRequest

        with _translated(f"register {name}"):
            self._client.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name))

    def unregister(self, node_id: int) -> None:
        """Take a node out; its key never comes back."""
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        with _translated(f"unregister node {node_id}"):
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))

    def start_run(
        self, app: bytes, settings: Mapping[str, Any], signatures: Mapping[str, str]
    ) -> int:
        """Submit an app bundle with its signatures; returns Flower's number of the run."""
        import hashlib

        from flwr.common.serde import fab_to_proto, user_config_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.supercore.fab import Fab

        request = StartRunRequest(
            fab=fab_to_proto(Fab(hashlib.sha256(app).hexdigest(), app, dict(signatures))),
            override_config=user_config_to_proto(dict(settings)),
        )
        with _translated("start the run"):
            answer = self._client.StartRun(request)
        if not answer.HasField("run_id"):
            raise ControlError("the SuperLink did not start the run, and does not say why", True)
        return answer.run_id

    def run(self, run_id: int) -> FlowerRun | None:
        """A run by Flower's number; None if Flower does not know it."""
        from flwr.proto.control_pb2 import ListRunsRequest
        from flwr.supercore.error import ApiErrorCode

        try:
            with _translated(f"show run {run_id}"):
                listed = self._client.ListRuns(ListRunsRequest(run_id=run_id))
        except ControlError as error:
            if error.code == ApiErrorCode.RUN_ID_NOT_FOUND:
                return None
            raise
        status = listed.run_dict[run_id].status
        return FlowerRun(status.status, status.sub_status, status.details)

    def unfinished(self, run_dir: str) -> int | None:
        """Flower's number of the run that goes on in a folder; None if none does."""
        from flwr.common.serde import user_config_from_proto
        from flwr.proto.control_pb2 import ListRunsRequest

        with _translated("list its runs"):
            listed = self._client.ListRuns(ListRunsRequest(limit=_RECENT_RUNS))
        for run in listed.run_dict.values():
            there = user_config_from_proto(run.override_config).get("run-dir")
            if there == run_dir and run.status.status != "finished":
                return run.run_id
        return None

    def stop_run(self, run_id: int) -> None:
        """End a run."""
        from flwr.proto.control_pb2 import StopRunRequest

        with _translated(f"stop run {run_id}"):
            self._client.StopRun(StopRunRequest(run_id=run_id))


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """Whatever Flower's client raises becomes one kind of error, in words.

    Args:
        what: the SuperLink was to do.
    """
    import httpx
    from flwr.supercore.error import FlowerError

    try:
        yield
    except httpx.HTTPStatusError as error:
        said = FlowerError.from_json(error.response.text)
        reason = f"status {error.response.status_code}"
        if said is not None:
            reason = f"[code {said.code}] {said.message} {said.public_details or ''}".rstrip()
        raise ControlError(
            f"the SuperLink did not {what}: {reason}",
            refused=error.response.status_code < 500,
            code=said.code if said is not None else 0,
        ) from error
    except (httpx.HTTPError, ValueError, OSError) as error:
        raise ControlError(
            f"the SuperLink did not {what}: {type(error).__name__}: {error}", refused=False
        ) from error
