"""A grid that hands out replies as they arrive, and forgets nobody who is late."""

import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Set
from logging import WARNING
from queue import Empty, SimpleQueue
from typing import Any

from flwr.app import Error, Message, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import UnexpectedObjectContentError
from google.protobuf.message import DecodeError

from fleet.message import REFUSED, content_bytes

_REMEMBERED = 10_000  # messages whose late replies are counted
POLL_SECONDS = 0.3  # Flower's own grid polls every 3 s
# Flower's grid waits for up to 180 s within a look, for a reply whose sender died as it sent
# it. Nobody else waits for that: a look that takes longer than this goes on by itself. It is
# more than a look takes on a busy machine: two at once may bring the same reply twice.
PATIENCE_SECONDS = 30.0
_MOST_LOOKS = 64  # at once: each may be held up by a sender that has died
_UNSENT = "the message could not be sent; the server's log says why"
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


class StreamingGrid(Grid):
    """Flower's grid, whose replies come one by one.

    Whoever asked can stop listening: once enough have answered, or when the
    deadline is over. Replies to earlier messages that arrive after that are
    counted and dropped.

    Args:
        grid: through which messages go.
        poll_seconds: between two looks for replies.
        patience: seconds that a look may take before another one is begun beside it.
    """

    def __init__(
        self,
        grid: Grid,
        poll_seconds: float = POLL_SECONDS,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self._grid = grid
        self._poll_seconds = poll_seconds
        self._patience = patience
        self._looks: SimpleQueue[list[Message] | Exception] = SimpleQueue()  # that have ended
        self._seen: dict[str, None] = {}  # ids of replies
        self._looking = 0  # looks that have not, or whose replies nobody has taken
        # A simulated fleet answers as it is asked: what does not come then, never comes.
        self._waits = not getattr(grid, "answers_at_once", False)
        self._outstanding: dict[str, None] = {}  # ids of messages that nobody waits for any more
        self._late: list[tuple[str, int]] = []
        self._singly = False  # whether replies are fetched one by one

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
        # Flower gives no id, or None, for a message that it could not push.
        sent = set(self._grid.push_messages(messages) if messages else [])
        by_id = {m.metadata.message_id: m for m in messages if m.metadata.message_id in sent}
        unsent = [_error(_UNSENT, m) for m in messages if m.metadata.message_id not in by_id]
        return self._replies(by_id, unsent, deadline)

    def take_late(self) -> list[tuple[str, int]]:
        """Earlier messages whose replies have come since, to be dropped: id, and bytes of each."""
        while self._outstanding:
            replies, unreadable = self._pull(self._outstanding.keys(), self._patience)
            came = [(message_id, 0) for message_id in unreadable] + list(map(_late, replies))
            self._late += came
            for message_id, _ in came:
                self._outstanding.pop(message_id, None)
            if not replies:
                break
        late, self._late = self._late, []
        return late

    def _replies(
        self, by_id: Mapping[str, Message], unsent: list[Message], deadline: float
    ) -> Iterator[Message]:
        yield from unsent
        waiting = set(by_id)
        pulled: list[Message] = []
        try:
            while waiting and time.monotonic() < deadline:
                pulled, unreadable = self._pull(waiting, deadline - time.monotonic())
                pulled = self._without_late(pulled)
                pulled += [_error(why, by_id[i]) for i, why in unreadable.items()]
                waiting -= {reply.metadata.reply_to_message_id for reply in pulled}
                if not pulled:
                    if not self._waits:
                        break
                    time.sleep(min(self._poll_seconds, max(0.0, deadline - time.monotonic())))
                while pulled:
                    yield pulled.pop(0)
        finally:
            self._outstanding |= dict.fromkeys(sorted(waiting))
            while len(self._outstanding) > _REMEMBERED:  # the oldest will not come any more
                del self._outstanding[next(iter(self._outstanding))]
            self._late += map(_late, pulled)

    def _without_late(self, replies: list[Message]) -> list[Message]:
        """Without replies to earlier messages, or again, which a look that took long may bring."""
        ids = [r.metadata.message_id for r in replies]
        replies = [r for r, i in zip(replies, ids, strict=True) if not i or i not in self._seen]
        self._seen |= dict.fromkeys(i for i in ids if i)
        while len(self._seen) > _REMEMBERED:
            del self._seen[next(iter(self._seen))]
        late = [r for r in replies if r.metadata.reply_to_message_id in self._outstanding]
        for message_id, nbytes in map(_late, late):
            self._late.append((message_id, nbytes))
            self._outstanding.pop(message_id, None)
        return [r for r in replies if r not in late]

    def _pull(self, message_ids: Set[str], seconds: float) -> tuple[list[Message], dict[str, str]]:
        """Replies that are there, and why others cannot be read.

        Args:
            seconds: after which it returns without, where the grid below waits longer.

        Flower hands out replies a batch at a time, and builds them as it does. One
        that is no message makes it raise, and what it had got by then is lost. So
        from the first of that kind on, replies are fetched one by one.
        """
        if not self._singly:
            try:
                return self._look(set(message_ids), seconds), {}
            except _Unreadable as failed:
                log(WARNING, "a reply cannot be read (%s); others may be lost", failed)
                self._singly = True
                return [], {}
        replies: list[Message] = []
        unreadable: dict[str, str] = {}
        until = time.monotonic() + seconds
        for message_id in sorted(message_ids):
            try:
                replies += self._look({message_id}, until - time.monotonic())
            except _Unreadable as failed:  # not of this look, it may be: of one that took long
                if len(failed.asked) == 1 and failed.asked <= message_ids:
                    unreadable[min(failed.asked)] = f"reply cannot be read ({failed})"
        return replies, unreadable

    def _look(self, message_ids: set[str], seconds: float) -> list[Message]:
        """Replies that the grid below has, or that an earlier look has brought since.

        Raises:
            _Unreadable: if a reply is no message: to this look, or to the earlier one.
            Whatever else the grid does.
        """
        if not self._waits:  # in one process nothing is built from bytes: a fault is ours
            return list(self._grid.pull_messages(message_ids))

        def look() -> None:
            try:
                self._looks.put(list(self._grid.pull_messages(message_ids)))
            except _UNREADABLE as error:
                self._looks.put(_Unreadable(message_ids, error))
            except Exception as error:  # it is raised where it is waited for
                self._looks.put(error)

        if self._looks.empty() and self._looking < _MOST_LOOKS:
            self._looking += 1
            threading.Thread(target=look, name="look for replies", daemon=True).start()
        try:
            found = self._looks.get(timeout=max(0.0, min(seconds, self._patience)))
        except Empty:
            return []
        self._looking -= 1
        if isinstance(found, Exception):
            raise found
        return found


class _Unreadable(Exception):
    """A reply that is no message, to one of those that were looked for."""

    def __init__(self, asked: set[str], error: Exception) -> None:
        super().__init__(f"{error!r:.200}")
        self.asked = asked


def _late(reply: Message) -> tuple[str, int]:
    nbytes = content_bytes(reply.content) if reply.has_content() else 0
    return reply.metadata.reply_to_message_id, nbytes


def _error(reason: str, message: Message) -> Message:
    """In the place of a reply."""
    return Message(Error(REFUSED, reason), reply_to=message)


def close(replies: Iterable[Message]) -> None:
    """Stop listening now: replies that have not come count as late from here on."""
    if isinstance(replies, Generator):
        replies.close()
