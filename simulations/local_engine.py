"""A fleet in one process: the unchanged ServerApp and ClientApp, without Flower's runtime."""

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fleet.config import Value

_SERVER_NODE_ID = 1
_FIRST_CLIENT_NODE_ID = 2

ClientFunction = Callable[[Message, Context], Message]  # as a ClientApp is called


@dataclass(frozen=True)
class Exchange:
    """A client's number, what it was sent, and what it answered."""

    client: int
    message: Message
    reply: Message


# What befalls a cohort's replies between the clients and the server: some may change or go.
Interference = Callable[[Sequence[Exchange]], Sequence[Exchange]]


class LocalGrid(Grid):
    """Hands every message to the ClientApp in this process, one after the other.

    Clients answer in the order in which they were asked, so a run depends on
    its seed and on nothing else. One runs whenever replies are looked for, so
    that no two replies are there at once.

    Args:
        client_app: called for every message.
        num_clients: each is one partition of the run's data.
        run_config: what Flower would hand to the apps.
        on_reply: called after each reply with how many of the cohort have
            answered, and its size.
        interferences: done in turn to the replies once the whole cohort has answered.
    """

    answers_at_once = True  # a reply that `pull_messages` does not return will not come later

    def __init__(
        self,
        client_app: ClientFunction,
        num_clients: int,
        run_config: Mapping[str, Value],
        on_reply: Callable[[int, int], None] = lambda answered, asked: None,
        interferences: Sequence[Interference] = (),
    ) -> None:
        self._client_app = client_app
        self._on_reply = on_reply
        self._interferences = interferences
        self._message_ids = count(1)
        self._waiting: dict[str, Message] = {}  # id → message whose client has not run
        self._asked = self._answered = 0
        self._contexts = {
            _FIRST_CLIENT_NODE_ID + i: Context(
                run_id=1,
                node_id=_FIRST_CLIENT_NODE_ID + i,
                node_config={"partition-id": i, "num-partitions": num_clients},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for i in range(num_clients)
        }

    def set_run(self, run: Run) -> None:
        """There is one run, which needs no description."""

    @property
    def run(self) -> Run:
        """The run that this grid is made for."""
        return Run.create_empty(run_id=1)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """As the constructor of `Message`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Every client, always."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; their clients run as replies are pulled."""
        messages = list(messages)
        self._asked, self._answered = len(messages), 0
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(next(self._message_ids))
            self._waiting[message.metadata.message_id] = message
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the client whose turn it is, and return its reply.

        All of them with interferences, which look at a whole cohort.
        """
        ids = set(message_ids)
        turns = [i for i in self._waiting if i in ids]
        if not turns:
            return []
        exchanges = []
        for turn in turns if self._interferences else turns[:1]:
            message = self._waiting.pop(turn)
            client = message.metadata.dst_node_id - _FIRST_CLIENT_NODE_ID
            exchanges.append(Exchange(client, message, self._answer(message)))
            self._answered += 1
            self._on_reply(self._answered, self._asked)
        for interfere in self._interferences:
            exchanges = interfere(exchanges)
        return [exchange.reply for exchange in exchanges]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Run client after client; those whose turn comes after the deadline are not run."""
        deadline = time.monotonic() + timeout if timeout is not None else float("inf")
        ids, replies = set(self.push_messages(messages)), []
        while time.monotonic() <= deadline:
            came = self.pull_messages(ids)
            if not came:
                break
            replies += came
        return replies

    def _answer(self, message: Message) -> Message:
        context = self._contexts[message.metadata.dst_node_id]
        TaskIdentity.node_id = context.node_id
        try:
            return self._client_app(message, context)
        except Exception:  # as in Flower's runtimes, a client's fault is its reply
            reason = traceback.format_exc()
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
        finally:
            TaskIdentity.node_id = _SERVER_NODE_ID


def run_local(
    server_app: ServerApp,
    client_app: ClientFunction,
    run_config: Mapping[str, Value],
    num_clients: int,
    on_reply: Callable[[int, int], None] = lambda answered, asked: None,
    interferences: Sequence[Interference] = (),
) -> None:
    """Run a ServerApp against `num_clients` ClientApps in this process.

    Raises:
        Whatever the ServerApp raises.
    """
    # Flower sets these in every process of a run; messages cannot be made without.
    TaskIdentity.run_id = TaskIdentity.task_id = 1
    TaskIdentity.node_id = _SERVER_NODE_ID
    context = Context(
        run_id=1,
        node_id=_SERVER_NODE_ID,
        node_config={},
        state=RecordDict(),
        run_config=dict(run_config),
    )
    grid = LocalGrid(client_app, num_clients, run_config, on_reply, interferences)
    with _one_thread():
        server_app(grid, context)


@contextmanager
def _one_thread() -> Iterator[None]:
    """As many threads as Flower's simulated clients have, so that sums round alike.

    It also spares small models the waiting of threads for one another.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
