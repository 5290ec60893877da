"""A grid that hands out replies as they arrive, and forgets nobody who is late."""

import threading
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from logging import WARNING
from queue import Empty, SimpleQueue
from typing import Any

from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import UnexpectedObjectContentError
from google.protobuf.message import DecodeError

from fleet.message import REFUSED, content_bytes

_REMEMBERED = 10_000  # messages whose late replies are counted
POLL_SECONDS = 0.3  # Flower's own grid polls every 3 s
# Flower's grid waits for up to 180 s within a look, for a reply whose sender died as it sent
# it, or sends it over a slow link. Nobody else waits for that: a look that takes longer than
# this goes on by itself. It is more than a look takes on a busy machine: two at once may bring
# the same reply twice.
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
        on_late: is given each reply to an earlier message, before it is dropped.
    """

    def __init__(
        self,
        grid: Grid,
        poll_seconds: float = POLL_SECONDS,
        patience: float = PATIENCE_SECONDS,
        on_late: Callable[[Message], None] = lambda reply: None,
    ) -> None:
        self._grid = grid
        self._poll_seconds = poll_seconds
        self._patience = patience
        self._on_late = on_late
        self._ended: SimpleQueue[_Look] = SimpleQueue()
        self._under_way: list[_Look] = []  # that have not ended, or whose replies nobody has taken
        self._seen: dict[str, None] = {}  # ids of replies
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
            came = [(message_id, 0) for message_id in unreadable]
            came += map(self._dropped, replies)
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
            self._late += map(self._dropped, pulled)

    def _without_late(self, replies: list[Message]) -> list[Message]:
        """Without replies to earlier messages, or again, which a look that took long may bring."""
        ids = [r.metadata.message_id for r in replies]
        replies = [r for r, i in zip(replies, ids, strict=True) if not i or i not in self._seen]
        self._seen |= dict.fromkeys(i for i in ids if i)
        while len(self._seen) > _REMEMBERED:
            del self._seen[next(iter(self._seen))]
        late = [r for r in replies if r.metadata.reply_to_message_id in self._outstanding]
        for message_id, nbytes in map(self._dropped, late):
            self._late.append((message_id, nbytes))
            self._outstanding.pop(message_id, None)
        return [r for r in replies if r not in late]

    def _dropped(self, reply: Message) -> tuple[str, int]:
        self._on_late(reply)
        nbytes = content_bytes(reply.content) if reply.has_content() else 0
        return reply.metadata.reply_to_message_id, nbytes

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

        if self._ended.empty() and len(self._under_way) < _MOST_LOOKS:
            self._begin_look(message_ids)
        try:
            look = self._ended.get(timeout=max(0.0, min(seconds, self._patience)))
        except Empty:
            return []
        self._under_way.remove(look)
        if look.error is not None:
            raise look.error
        return [reply for reply in look.replies if not _is_with_another(reply, look)]

    def _begin_look(self, message_ids: set[str]) -> None:
        look = _Look(message_ids)
        for other in self._under_way:
            look.asked_by_others |= other.asked
            other.asked_by_others |= look.asked
        self._under_way.append(look)

        def pull() -> None:
            try:
                look.replies = list(self._grid.pull_messages(set(message_ids)))
            except _UNREADABLE as error:
                look.error = _Unreadable(message_ids, error)
            except Exception as error:  # it is raised where it is waited for
                look.error = error
            self._ended.put(look)

        threading.Thread(target=pull, name="look for replies", daemon=True).start()


@dataclass(eq=False)
class _Look:
    """One question to the grid below, in a thread of its own.

    Args:
        asked: ids of messages whose replies are looked for.
    """

    asked: Collection[str]
    asked_by_others: set[str] = field(default_factory=set)  # while this look was under way
    replies: list[Message] = field(default_factory=list)
    error: Exception | None = None


def _is_with_another(reply: Message, look: _Look) -> bool:
    """Whether another look may be fetching the reply that this one was told there is not.

    Flower forgets a message as it hands out the reply's name, before the reply itself is
    there, which over a slow link takes minutes. Whoever asks again by then is told that there
    is no such message. Where that is the truth, the next look is told so too.
    """
    return (
        reply.has_error()
        and reply.error.code == ErrorCode.MESSAGE_UNAVAILABLE
        and reply.metadata.reply_to_message_id in look.asked_by_others
    )


class _Unreadable(Exception):
    """A reply that is no message, to one of those that were looked for."""

    def __init__(self, asked: set[str], error: Exception) -> None:
        super().__init__(f"{error!r:.200}")
        self.asked = asked


def _error(reason: str, message: Message) -> Message:
    """In the place of a reply."""
    return Message(Error(REFUSED, reason), reply_to=message)


def close(replies: Iterable[Message]) -> None:
    """Stop listening now: replies that have not come count as late from here on."""
    if isinstance(replies, Generator):
        replies.close()
