"""A grid that hands out replies as they arrive, and forgets nobody who is late."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from fleet.message import REFUSED, content_bytes

_REMEMBERED = 10_000  # messages whose late replies are counted
POLL_SECONDS = 0.3  # Flower's own grid polls every 3 s
_UNSENT = "the message could not be sent; the server's log says why"


class StreamingGrid(Grid):
    """Flower's grid, whose replies come one by one.

    Whoever asked can stop listening: once enough have answered, or when the
    deadline is over. Replies to earlier messages that arrive after that are
    counted and dropped.

    Args:
        grid: through which messages go; a look for replies waits for none (`PromptGrid`).
        poll_seconds: between two looks for replies.
        on_late: is given each reply to an earlier message, before it is dropped.

    Attributes:
        waits: whether a reply may come later than it is looked for; not of simulated clients.
    """

    def __init__(
        self,
        grid: Grid,
        poll_seconds: float = POLL_SECONDS,
        on_late: Callable[[Message], None] = lambda reply: None,
    ) -> None:
        self._grid = grid
        self._poll_seconds = poll_seconds
        self._on_late = on_late
        # A simulated fleet answers as it is asked: what does not come then, never comes.
        self.waits = not getattr(grid, "answers_at_once", False)
        self._outstanding: dict[str, None] = {}  # ids of messages that nobody waits for any more
        self._late: list[tuple[str, int]] = []

    def set_run(self, run: Any) -> None:
        """As the grid below."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """As the grid below."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """As the grid below."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """As the grid below."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As the grid below."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As the grid below."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Send at once; yield replies as they come, until all are there or the time is over.

        Simulated clients have no time: they work one after the other, as fast as this machine
        can, and what comes of a run must not depend on that.
        """
        timed = self.waits and timeout is not None
        deadline = time.monotonic() + timeout if timed else float("inf")
        messages = list(messages)
        # Flower gives no id, or None, for a message that it could not push.
        sent = set(self._grid.push_messages(messages) if messages else [])
        unsent = [
            Message(Error(REFUSED, _UNSENT), reply_to=message)
            for message in messages
            if message.metadata.message_id not in sent
        ]
        waiting = {m.metadata.message_id for m in messages} & sent
        return self._replies(waiting, unsent, deadline)

    def take_late(self) -> list[tuple[str, int]]:
        """Earlier messages whose replies have come since, to be dropped: id, and bytes of each."""
        while self._outstanding:
            replies = list(self._grid.pull_messages({*self._outstanding}))
            self._drop(replies)
            if not replies:
                break
        late, self._late = self._late, []
        return late

    def _replies(
        self, waiting: set[str], unsent: list[Message], deadline: float
    ) -> Iterator[Message]:
        yield from unsent
        pulled: list[Message] = []
        try:
            while waiting and time.monotonic() < deadline:
                pulled = list(self._grid.pull_messages({*waiting}))
                waiting -= {reply.metadata.reply_to_message_id for reply in pulled}
                if not pulled:
                    if not self.waits:
                        break
                    time.sleep(min(self._poll_seconds, max(0.0, deadline - time.monotonic())))
                while pulled:
                    yield pulled.pop(0)
        finally:
            self._outstanding |= dict.fromkeys(sorted(waiting))
            while len(self._outstanding) > _REMEMBERED:  # the oldest will not come any more
                del self._outstanding[next(iter(self._outstanding))]
            self._drop(pulled)

    def _drop(self, replies: list[Message]) -> None:
        for reply in replies:
            self._on_late(reply)
            message_id = reply.metadata.reply_to_message_id
            self._outstanding.pop(message_id, None)
            nbytes = content_bytes(reply.content) if reply.has_content() else 0
            self._late.append((message_id, nbytes))


def close(replies: Iterable[Message]) -> None:
    """Stop listening now: replies that have not come count as late from here on."""
    if isinstance(replies, Generator):
        replies.close()
