"""All clients of a simulated run, each run for the length of a message."""

import copyreg
import io
import os
import pickle
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Array, Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from fleet.config import Value

SERVER_NODE_ID = 1
FIRST_CLIENT_NODE_ID = 2

ClientFunction = Callable[[Message, Context], Message]  # as a ClientApp is called


class LocalClients:
    """Answers messages as the clients that they are for, one at a time.

    Nothing of a client stays in memory between its messages: its Flower state,
    if it keeps any, lies in a file, so whichever process runs it next finds it.
    A client that raises, or whose process dies, has the state that it had before.

    Args:
        client_app: called for every message.
        num_clients: each is one partition of the run's data.
        run_config: what Flower would hand to the clients.
        states: an existing folder for their states, of this run alone.
    """

    def __init__(
        self,
        client_app: ClientFunction,
        num_clients: int,
        run_config: Mapping[str, Value],
        states: Path,
    ) -> None:
        self.num_clients = num_clients
        self._client_app = client_app
        self._run_config = dict(run_config)
        self._states = Path(states)

    def answer(self, message: Message) -> Message:
        """The reply of the client that a message is for; what it raises is an error reply."""
        identify(message.metadata.dst_node_id)
        try:
            return self._run(message)
        except Exception:  # as in Flower's runtimes, a client's fault is its reply
            reason = traceback.format_exc()
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
        finally:
            identify(SERVER_NODE_ID)

    def _run(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        file = self._states / str(node)
        before = file.read_bytes() if file.is_file() else b""
        context = Context(
            run_id=1,
            node_id=node,
            node_config={
                "partition-id": number_of(message),
                "num-partitions": self.num_clients,
            },
            # Written by this run's own processes, in a folder that only its user can enter.
            state=pickle.loads(before) if before else RecordDict(),
            run_config=dict(self._run_config),
        )
        reply = self._client_app(message, context)
        if before or context.state:
            after = pack(context.state)
            if after != before:
                _replace(file, after)
        return reply


def number_of(message: Message) -> int:
    """Which client a message is for, counted from 0 on."""
    return message.metadata.dst_node_id - FIRST_CLIENT_NODE_ID


def identify(node_id: int) -> None:
    """Say whose code runs now: Flower wants it in every process that makes messages."""
    TaskIdentity.run_id = TaskIdentity.task_id = 1
    TaskIdentity.node_id = node_id


def pack(value: Any) -> bytes:
    """Pickle what holds Flower's records.

    An array that was measured once remembers its chunks, which are views and do not pickle.
    """
    file = io.BytesIO()
    pickler = pickle.Pickler(file, pickle.HIGHEST_PROTOCOL)
    pickler.dispatch_table = copyreg.dispatch_table | {Array: _reduce_array}
    pickler.dump(value)
    return file.getvalue()


def _reduce_array(array: Array) -> tuple[type, tuple[Any, ...]]:
    return Array, (array.dtype, array.shape, array.stype, bytes(array.data))


def _replace(file: Path, content: bytes) -> None:
    """Write a file so that a process which is killed meanwhile leaves the old one."""
    part = file.with_suffix(".part")
    part.write_bytes(content)
    os.replace(part, file)
