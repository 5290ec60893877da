"""A grid that hands out each reply as soon as it is whole, whatever becomes of the others.

Flower's grid hands out several replies that have been announced once it has the last of
them. A device that is cut off as it sends so holds up all that were announced with it: the
round ends at its deadline, without the updates of devices that were in time.
"""

import copy
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from flwr.app import Error, Message
from flwr.app.message import make_message
from flwr.common.serde import metadata_from_proto
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import UnexpectedObjectContentError
from google.protobuf.message import DecodeError

from fleet.message import REFUSED

if TYPE_CHECKING:
    from flwr.superlink.grid.http_grid import HttpGrid

_OF_DEVICES = "flwr.superlink.grid.http_grid"
_WAIT_SECONDS = 1.0  # in which most replies that are announced come whole
# What building a reply from bytes that are none raises. A network that fails raises others.
_UNREADABLE = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    DecodeError,
    UnexpectedObjectContentError,
)


def prompt(grid: Grid) -> Grid:
    """The grid of a server with devices made prompt; those of simulations are as they are."""
    # Whoever has such a grid has imported it. It brings a web server, half a second of a start.
    module = sys.modules.get(_OF_DEVICES)
    return PromptGrid(grid) if module and isinstance(grid, module.HttpGrid) else grid


class PromptGrid(Grid):
    """Flower's grid, whose replies are fetched each in a thread of its own.

    A look for replies so never waits for a sender that is slow, or has died. A reply that is
    found is kept until it is asked for: whoever has asked once has to go on asking.

    Args:
        grid: of a ServerApp's process.
        wait_seconds: that `pull_messages` waits for replies that it finds announced.
    """

    def __init__(self, grid: "HttpGrid", wait_seconds: float = _WAIT_SECONDS) -> None:
        self._grid = grid
        self._wait_seconds = wait_seconds
        self._changed = threading.Condition()
        self._under_way: set[str] = set()  # ids of messages whose replies are being fetched
        self._fetched: dict[str, list[Message] | Exception] = {}  # by the same

    def set_run(self, run: Any) -> None:
        """As the grid below."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """As the grid below."""
        return self._grid.run

    def create_message(self, *arguments: Any, **options: Any) -> Message:
        """As the grid below."""
        return self._grid.create_message(*arguments, **options)

    def get_node_ids(self) -> Iterable[int]:
        """As the grid below."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As the grid below."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to these messages that are whole, each once; an error for one that is none.

        Raises:
            Exception: once, what fetching one of them has raised. The others come with the
                next look.
        """
        asked = set(message_ids)
        with self._changed:
            new = asked - self._under_way - self._fetched.keys()
            self._under_way |= new
        announced = self._announced(new)
        deadline = time.monotonic() + self._wait_seconds
        with self._changed:
            while announced & self._under_way and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            return self._take(asked)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """As the grid below."""
        return self._grid.send_and_receive(messages, timeout=timeout)

    def _announced(self, message_ids: set[str]) -> set[str]:
        """Ask which replies there are, and begin to fetch them; the messages that they answer."""
        announced: set[str] = set()
        try:
            if message_ids:
                client = self._grid._runtime_client
                request = PullAppMessagesRequest(message_ids=message_ids)
                answer = client.PullMessages(request)
                both = zip(answer.messages_list, answer.message_object_trees, strict=True)
                for reply, tree in both:
                    one = PullAppMessagesResponse(
                        messages_list=[reply], message_object_trees=[tree]
                    )
                    message_id = reply.metadata.reply_to_message_id
                    announced.add(message_id)
                    fetch = self._fetching(message_id, _Announcing(client, one))
                    threading.Thread(target=fetch, name="fetch reply", daemon=True).start()
        finally:
            with self._changed:
                self._under_way -= message_ids - announced
        return announced

    def _fetching(self, message_id: str, client: "_Announcing") -> Callable[[], None]:
        """A function that has Flower's grid fetch the one reply that its client announces."""
        grid = copy.copy(self._grid)
        grid._client = client

        def fetch() -> None:
            try:
                fetched: list[Message] | Exception = list(grid.pull_messages({message_id}))
            except _UNREADABLE as error:
                fetched = [client.refusal(f"reply cannot be read ({error!r:.200})")]
            except Exception as error:  # it is raised where the reply is asked for
                fetched = error
            with self._changed:
                self._under_way.discard(message_id)
                self._fetched[message_id] = fetched
                self._changed.notify_all()

        return fetch

    def _take(self, asked: set[str]) -> list[Message]:
        there = sorted(asked & self._fetched.keys())
        for message_id in there:
            if isinstance(self._fetched[message_id], Exception):
                raise self._fetched.pop(message_id)
        return [reply for message_id in there for reply in self._fetched.pop(message_id)]


class _Announcing:
    """Flower's client of the SuperLink, which knows of one reply already.

    Args:
        client: for everything else.
        announcement: of the reply.
    """

    def __init__(self, client: Any, announcement: PullAppMessagesResponse) -> None:
        self._client, self._announcement = client, announcement

    def PullMessages(self, request: PullAppMessagesRequest) -> PullAppMessagesResponse:
        return self._announcement

    def refusal(self, reason: str) -> Message:
        """What stands in the reply's place."""
        (reply,) = self._announcement.messages_list
        return make_message(metadata_from_proto(reply.metadata), error=Error(REFUSED, reason))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)
