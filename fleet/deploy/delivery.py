"""Messages and replies that arrive although the answers about them do not.

A device or a run asks, the server answers, and the link breaks in between, or the server ends:
the server takes what it has answered for done, the other side asks again. Flower 1.41 loses
by that

- a message: it counts as delivered once it is handed out, and nobody hands it out again;
- a message or reply of which a part was stored: sent again, that part is refused, and the
  device gives the whole reply up, the run itself;
- a reply that the run was told of: it is known no more, nor what it answers. The run takes
  it for one that cannot come, and a device that announces it again, as it was not answered,
  is told that there is nothing to send.

Here whoever asks again is told what they would have been told the first time. What that was
is read from Flower's own tables, so that it is known to a server that was started anew. They
do not tell which parts were stored of what has been fetched since: one table beside them does.
"""

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from sqlalchemy import Column, Float, MetaData, String, Table, delete, select, update
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.schema import CreateIndex, CreateTable

REMEMBERED_SECONDS = 900.0  # in which who was not answered asks again

_STORED = Table(
    "fleet_stored_objects",
    MetaData(),
    Column("session_id", String, primary_key=True),
    Column("object_id", String, primary_key=True),
    Column("forget_at", Float, index=True),  # seconds since the epoch
)


class _Deliveries:
    """Functions of one of Flower's modules of handlers, each the same on being asked twice.

    Args:
        handlers: the module, or what has its functions.
        clock: seconds since the epoch.
    """

    names: tuple[str, ...]  # of the functions

    def __init__(self, handlers: Any, clock: Callable[[], float] = time.time) -> None:
        self._flowers = {name: getattr(handlers, name) for name in self.names}
        self._clock = clock
        self._lock = threading.Lock()  # the server answers in many threads
        self._has_table = False

    def install(self, handlers: Any) -> None:
        """Put these in place of a module's functions, which its callers look up each time."""
        for name in self.names:
            setattr(handlers, name, getattr(self, name))

    def push_object(self, request: Any, state: Any, *task: Any) -> Any:
        """As Flower's; a part that was stored before is stored."""
        self._make_table(state)
        part = {"session_id": request.session_id, "object_id": request.object_id}
        with state.session() as session:  # one transaction: that it is stored, and known to be
            answer = self._flowers["push_object"](request, state, *task)
            if answer.stored:
                self._remember(part, session)
                return answer
            session.rollback()  # Flower ends its own where a part of it went wrong
        with state.session() as session:
            # It may have been fetched since, and the store let it go.
            known = session.execute(select(_STORED).filter_by(**part)).first() is not None
        # An id is the hash of what it names.
        answer.stored = known or bool(state.object_store.get(request.object_id))
        return answer

    def _make_table(self, state: Any) -> None:
        with self._lock:
            if self._has_table:
                return
            with state.session() as session:
                session.execute(CreateTable(_STORED, if_not_exists=True))
                for index in _STORED.indexes:
                    session.execute(CreateIndex(index, if_not_exists=True))
            self._has_table = True

    def _remember(self, part: dict[str, str], session: Any) -> None:
        now = self._clock()
        session.execute(delete(_STORED).where(_STORED.c.forget_at < now))
        row = part | {"forget_at": now + REMEMBERED_SECONDS}
        session.execute(insert(_STORED).values(row).on_conflict_do_nothing())


class DeviceDeliveries(_Deliveries):
    """What devices ask: of `flwr.superlink.servicer.fleet.fleet_handlers`."""

    names = ("pull_messages", "push_object")

    def pull_messages(self, request: Any, state: Any, store: Any) -> Any:
        """The next message, or an earlier one that the device never said it has.

        A SuperNode fetches one message after another: as long as it has not confirmed one,
        it does not ask for the next, unless it never got it or was started anew.
        """
        answer = self._flowers["pull_messages"](request, state, store)
        if not answer.messages_list and _take_back_message(request.node.node_id, state, store):
            answer = self._flowers["pull_messages"](request, state, store)
        return answer


class RunDeliveries(_Deliveries):
    """What runs ask: of `flwr.superlink.servicer.runtime.runtime_handlers`."""

    names = ("pull_messages", "confirm_message_received", "push_object")

    def pull_messages(self, request: Any, state: Any, task: Any) -> Any:
        """The replies to messages; those too that the run was told of, and never had."""
        _take_back_replies(request.message_ids, state)
        return self._flowers["pull_messages"](request, _Keeping(state), task)

    def confirm_message_received(self, request: Any, state: Any, task: Any) -> Any:
        """As Flower's; the reply and what it answers go now, rather than as they are told of."""
        from flwr.supercore.state.schema.linkstate_models import MessageRes

        answer = self._flowers["confirm_message_received"](request, state, task)
        with state.session() as session:
            message_id = session.scalar(
                select(MessageRes.reply_to_message_id).where(
                    MessageRes.message_id == request.message_object_id
                )
            )
            if message_id is not None:
                state.delete_messages({message_id})
        return answer


class _Keeping:
    """Flower's state, of which messages that have a reply are not deleted."""

    def __init__(self, state: Any) -> None:
        self._state = state

    def delete_messages(self, message_ins_ids: set[str]) -> None:
        from flwr.supercore.state.schema.linkstate_models import MessageRes

        with self._state.session() as session:
            replied = session.scalars(
                select(MessageRes.reply_to_message_id).where(
                    MessageRes.reply_to_message_id.in_(message_ins_ids)
                )
            ).all()
        self._state.delete_messages(message_ins_ids - set(replied))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)


def _take_back_replies(message_ids: Iterable[str], state: Any) -> None:
    """Let replies to these be handed out again that were, and are still here.

    What a run has fetched leaves the store.
    """
    from flwr.supercore.state.schema.linkstate_models import MessageRes

    handed_out = select(MessageRes.message_id).where(
        MessageRes.reply_to_message_id.in_(list(message_ids)), MessageRes.delivered_at != ""
    )
    with state.session() as session:
        here = [reply for reply in session.scalars(handed_out).all() if reply in state.object_store]
        if here:
            session.execute(
                update(MessageRes).where(MessageRes.message_id.in_(here)).values(delivered_at="")
            )


def _take_back_message(node_id: int, state: Any, store: Any) -> bool:
    """Let the oldest message that a node was handed, and never had, be handed out again.

    What a node says it has leaves the store. An error may be replied without having fetched
    what it answers.
    """
    from flwr.supercore.date import now
    from flwr.supercore.state.schema.linkstate_models import MessageIns, MessageRes
    from flwr.supercore.utils import uint64_to_int64

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
