"""A grid that hands out replies as they arrive, and forgets nobody who is late."""

import time
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

POLL_SECONDS = 0.3  # Flower's own grid polls every 3 s


class StreamingGrid(Grid):
    """Flower's grid, whose replies come one by one.

    Whoever asked can stop listening: once enough have answered, or when the
    deadline is over. Replies to earlier messages that arrive after that are
    counted and dropped.

    Args:
        grid: through which messages go.
        poll_seconds: between two looks for replies.
    """

    def __init__(self, grid: Grid, poll_seconds: float = POLL_SECONDS) -> None:
        self._grid = grid
        self._poll_seconds = poll_seconds
        # A simulated fleet answers as it is asked: what does not come then, never comes.
        self._waits = not getattr(grid, "answers_at_once", False)
        self._outstanding: set[str] = set()  # ids of messages that nobody waits for any more
        self._late: list[str] = []

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
        """Send at once; yield replies as they come, until all are there or the time is over."""
        deadline = time.monotonic() + timeout if timeout is not None else float("inf")
        messages = list(messages)
        sent = self._grid.push_messages(messages) if messages else []
        return self._replies({message_id for message_id in sent if message_id}, deadline)

    def take_late(self) -> list[str]:
        """Ids of earlier messages whose replies have come since, to be dropped."""
        while self._outstanding:
            replies = list(self._grid.pull_messages(set(self._outstanding)))
            if not replies:
                break
            self._late += [reply.metadata.reply_to_message_id for reply in replies]
            self._outstanding.difference_update(self._late)
        late, self._late = self._late, []
        return late

    def _replies(self, waiting: set[str], deadline: float) -> Iterator[Message]:
        pulled: list[Message] = []
        try:
            while waiting and time.monotonic() < deadline:
                pulled = list(self._grid.pull_messages(set(waiting)))
                waiting -= {reply.metadata.reply_to_message_id for reply in pulled}
                if not pulled:
                    if not self._waits:
                        break
                    time.sleep(min(self._poll_seconds, max(0.0, deadline - time.monotonic())))
                while pulled:
                    yield pulled.pop(0)
        finally:
            self._outstanding |= waiting
            self._late += [reply.metadata.reply_to_message_id for reply in pulled]


def close(replies: Iterable[Message]) -> None:
    """Stop listening now: replies that have not come count as late from here on."""
    if isinstance(replies, Generator):
        replies.close()
