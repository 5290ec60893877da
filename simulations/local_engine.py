"""A fleet on one machine: the unchanged ServerApp and ClientApp, without Flower's runtime."""

import gc
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import torch
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run

from fleet.config import Value
from fleet.without_compiler import compiler_aside
from simulations.local_clients import (
    FIRST_CLIENT_NODE_ID,
    SERVER_NODE_ID,
    ClientFunction,
    LocalClients,
    identify,
    number_of,
)
from simulations.quick_arrays import quick_arrays
from simulations.workers import WorkerPool


@dataclass(frozen=True)
class Exchange:
    """A client's number, what it was sent, and what it answered."""

    client: int
    message: Message
    reply: Message


# What befalls a cohort's replies between the clients and the server: some may change or go.
Interference = Callable[[Sequence[Exchange]], Sequence[Exchange]]


class LocalGrid(Grid):
    """Hands every message to the ClientApp, in this process or in workers of its own.

    Replies come in the order in which clients were asked, whichever worker is
    done first, so a run depends on its seed and on nothing else. A client in
    this process runs whenever a reply is looked for, so that no two replies are
    there at once; workers run ahead, a few replies far.

    Args:
        client_app: called for every message.
        num_clients: each is one partition of the run's data.
        run_config: what Flower would hand to the apps.
        on_reply: called after each reply with how many of the cohort have
            answered, and its size.
        interferences: done in turn to the replies once the whole cohort has answered.
        workers: processes that run clients; 1: none, clients run in this one.
    """

    answers_at_once = True  # a reply that `pull_messages` does not return will not come later

    def __init__(
        self,
        client_app: ClientFunction,
        num_clients: int,
        run_config: Mapping[str, Value],
        on_reply: Callable[[int, int], None] = lambda answered, asked: None,
        interferences: Sequence[Interference] = (),
        workers: int = 1,
    ) -> None:
        self._on_reply = on_reply
        self._interferences = interferences
        self._message_ids = count(1)
        self._waiting: dict[str, Message] = {}  # id → message whose reply nobody has pulled
        self._asked = self._answered = 0
        self._states = tempfile.TemporaryDirectory(prefix="fleet-clients-")
        self._clients = LocalClients(client_app, num_clients, run_config, Path(self._states.name))
        self._pool = WorkerPool(self._clients, workers) if workers > 1 else None
        self._begun = self._frozen = False

    def close(self) -> None:
        """End the workers, and forget what clients kept as their state."""
        if self._pool is not None:
            self._pool.close()
        self._states.cleanup()
        if self._frozen:
            gc.unfreeze()
            self._frozen = False

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
        return range(FIRST_CLIENT_NODE_ID, FIRST_CLIENT_NODE_ID + self._clients.num_clients)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; without workers their clients run as replies are pulled."""
        messages = list(messages)
        self._freeze()
        self._asked, self._answered = len(messages), 0
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(next(self._message_ids))
            self._waiting[message.metadata.message_id] = message
            if self._pool is not None:
                self._pool.ask(message)
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The reply of the client whose turn it is, once it is there.

        All of them with interferences, which look at a whole cohort.
        """
        ids = set(message_ids)
        turns = (i for i in self._waiting if i in ids)
        turns = list(turns if self._interferences else islice(turns, 1))
        if not turns:
            return []
        exchanges = []
        for turn in turns:
            message = self._waiting.pop(turn)
            exchanges.append(Exchange(number_of(message), message, self._answer(message)))
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

    def _freeze(self) -> None:
        """Leave out of collections what is there as the first client is asked.

        It stays, and looking through all that PyTorch and Flower bring takes as long as a
        round of small clients. To the pages that workers share a collection would write.
        """
        if self._begun:
            return
        self._begun = True  # Python counts what is frozen one by one: not at every push
        if gc.get_freeze_count():  # somebody else has seen to it, and will undo it
            return
        if gc.isenabled():  # else somebody has put collections off
            gc.collect()
        gc.freeze()
        self._frozen = True

    def _answer(self, message: Message) -> Message:
        return (self._pool or self._clients).answer(message)


def run_local(
    server_app: ServerApp,
    client_app: ClientFunction,
    run_config: Mapping[str, Value],
    num_clients: int,
    on_reply: Callable[[int, int], None] = lambda answered, asked: None,
    interferences: Sequence[Interference] = (),
    workers: int = 1,
) -> None:
    """Run a ServerApp against `num_clients` ClientApps on this machine.

    Any apps of Flower's Message API will do. What they draw from generators that
    they do not seed is not the same from run to run where there are workers.

    Args:
        workers: as in `LocalGrid`, as the other arguments.

    Raises:
        Whatever the ServerApp raises.
    """
    identify(SERVER_NODE_ID)
    context = Context(
        run_id=1,
        node_id=SERVER_NODE_ID,
        node_config={},
        state=RecordDict(),
        run_config=dict(run_config),
    )
    with (
        compiler_aside(),
        _one_thread(),
        quick_arrays(),
        closing(
            LocalGrid(client_app, num_clients, run_config, on_reply, interferences, workers)
        ) as grid,
    ):
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
