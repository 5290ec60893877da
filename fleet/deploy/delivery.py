"""Messages and replies that arrive although the answers about them do not.

A device asks, the server answers, and the link breaks in between, or the server ends: the
server takes what it has answered for done, the device asks again. Flower 1.41 loses by that

- a message: it counts as delivered once it is handed out, and nobody hands it out again;
- a reply that the run has seen announced: announced again, it answers a message that is
  no more, and the device is told that there is nothing to send;
- a reply of which a part was stored: sent again, that part is refused, and the device
  gives the whole reply up.

Here a device that asks again is told what it would have been told the first time. What that
was is read from Flower's own tables, so that it is known to a server that was started anew.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from flwr.supercore.date import now
from flwr.supercore.state.schema.corestate_models import (
    ObjectPushSession,
    ObjectPushSessionPending,
    ObjectPushSessionRoot,
)
from flwr.supercore.state.schema.linkstate_models import MessageIns, MessageRes
from flwr.supercore.utils import uint64_to_int64
from sqlalchemy import select, update

REMEMBERED_SECONDS = 900.0  # in which a device that was not answered asks again
_MOST = 20_000  # parts; the oldest is forgotten first


class Deliveries:
    """Flower's handlers of devices' requests, each the same on being asked twice.

    Args:
        handlers: `flwr.superlink.servicer.fleet.fleet_handlers`, or what has its functions.
        clock: seconds that pass.
    """

    def __init__(self, handlers: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._pull_messages = handlers.pull_messages
        self._push_messages = handlers.push_messages
        self._push_object = handlers.push_object
        self._lock = threading.Lock()  # the server answers in many threads
        self._stored = _Recent(clock)  # (session, id of an object)

    def install(self, handlers: Any) -> None:
        """Put these in place of a module's functions, which its callers look up each time."""
        for name in ("pull_messages", "push_messages", "push_object"):
            setattr(handlers, name, getattr(self, name))

    def pull_messages(self, request: Any, state: Any, store: Any) -> Any:
        """The next message, or an earlier one that the device never said it has.

        A SuperNode fetches one message after another: as long as it has not confirmed one,
        it does not ask for the next, unless it never got it or was started anew.
        """
        answer = self._pull_messages(request=request, state=state, store=store)
        if not answer.messages_list and _take_back(request.node.node_id, state, store):
            answer = self._pull_messages(request=request, state=state, store=store)
        return answer

    def push_messages(self, request: Any, state: Any) -> Any:
        """What of a reply is to be sent still."""
        answer = self._push_messages(request=request, state=state)
        if not answer.objects_to_push:
            begun = _begun_push(request.messages_list[0].metadata.message_id, state)
            if begun is not None:
                answer.session_id, missing = begun
                answer.objects_to_push.extend(missing)
        return answer

    def push_object(self, request: Any, state: Any) -> Any:
        """As Flower's; a part that was stored before is stored."""
        answer = self._push_object(request=request, state=state)
        key = (request.session_id, request.object_id)
        with self._lock:
            if answer.stored:
                self._stored.add(key, True)
                return answer
            # The run may have fetched it since, and the store let it go.
            answer.stored = bool(self._stored.get(key))
        if not answer.stored:  # an id is the hash of what it names
            answer.stored = bool(state.object_store.get(request.object_id))
        return answer


def _take_back(node_id: int, state: Any, store: Any) -> bool:
    """Let the oldest message that a node was handed, and never had, be handed out again.

    What a node says it has leaves the store. An error may be replied without having fetched
    what it answers.
    """
    handed_out = (
        select(MessageIns.message_id)
        .where(
            MessageIns.dst_node_id == uint64_to_int64(node_id),
            MessageIns.delivered_at != "",
            MessageIns.created_at + MessageIns.ttl > now().timestamp(),
            ~select(MessageRes.message_id)
            .where(MessageRes.reply_to_message_id == MessageIns.message_id)
            .exists(),
        )
        .order_by(MessageIns.created_at, MessageIns.message_id)
    )
    with state.session() as session:
        for message_id in session.scalars(handed_out).all():
            if message_id in store and state.get_valid_message_ins(message_id) is not None:
                session.execute(
                    update(MessageIns)
                    .where(MessageIns.message_id == message_id)
                    .values(delivered_at="")
                )
                return True
    return False


def _begun_push(message_id: str, state: Any) -> tuple[str, list[str]] | None:
    """Session of a reply that has been announced, and ids of what is missing of it.

    None if it was not, or is here whole.
    """
    begun = (
        select(ObjectPushSessionRoot.session_id)
        .join(ObjectPushSession, ObjectPushSession.session_id == ObjectPushSessionRoot.session_id)
        .where(
            ObjectPushSessionRoot.root_object_id == message_id,
            ObjectPushSession.expires_at > now(),
        )
    )
    with state.session() as session:
        session_id = session.scalar(begun)
        if session_id is None:
            return None
        missing = session.scalars(
            select(ObjectPushSessionPending.object_id).where(
                ObjectPushSessionPending.session_id == session_id
            )
        )
        return session_id, list(missing)


class _Recent:
    """What was answered of late, and no more of it than memory is to hold."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._answers: OrderedDict[Any, tuple[float, Any]] = OrderedDict()

    def get(self, key: Any) -> Any:
        """None if nothing was answered, or too long ago."""
        self._forget()
        return self._answers.get(key, (0.0, None))[1]

    def add(self, key: Any, answer: Any) -> None:
        """Remember an answer from now on."""
        self._answers[key] = (self._clock() + REMEMBERED_SECONDS, answer)
        self._answers.move_to_end(key)
        self._forget()

    def _forget(self) -> None:
        now = self._clock()
        while self._answers:
            until, _ = next(iter(self._answers.values()))
            if until > now and len(self._answers) <= _MOST:
                break
            self._answers.popitem(last=False)
