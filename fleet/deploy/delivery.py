"""Messages and replies that arrive although the answers about them do not.

A device asks, the server answers, and the link breaks in between: the server takes what
it has answered for done, the device asks again. Flower 1.41 loses by that

- a message: it counts as delivered once it is handed out, and nobody hands it out again;
- a reply that the run has seen announced: announced again, it answers a message that is
  no more, and the device is told that there is nothing to send;
- a reply of which a part was stored: sent again, that part is refused, and the device
  gives the whole reply up.

Here a device that asks again is answered as it was the first time. All of it is kept in
memory: a server that ends in just that moment loses what Flower would have lost.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

REMEMBERED_SECONDS = 900.0  # in which a device that was not answered asks again
_MOST = 20_000  # answers; the oldest is forgotten first


class Deliveries:
    """Flower's handlers of devices' requests, each the same on being asked twice.

    Args:
        handlers: `flwr.superlink.servicer.fleet.fleet_handlers`, or what has its functions.
        clock: seconds that pass.
    """

    def __init__(self, handlers: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._pull_messages = handlers.pull_messages
        self._confirm_message_received = handlers.confirm_message_received
        self._push_messages = handlers.push_messages
        self._push_object = handlers.push_object
        self._lock = threading.Lock()  # the server answers in many threads
        self._handed_out: dict[int, dict[str, Any]] = {}  # node → message id → answer
        self._announced = _Recent(clock)  # (node, id of a reply) → answer
        self._stored = _Recent(clock)  # (session, id of an object)

    def install(self, handlers: Any) -> None:
        """Put these in place of a module's functions, which its callers look up each time."""
        for name in (
            "pull_messages",
            "confirm_message_received",
            "push_messages",
            "push_object",
        ):
            setattr(handlers, name, getattr(self, name))

    def pull_messages(self, request: Any, state: Any, store: Any) -> Any:
        """The next message, or an earlier one that the device never said it has.

        A SuperNode fetches one message after another: as long as it has not confirmed one,
        it does not ask for the next, unless it never got it or was started anew.
        """
        node = request.node.node_id
        answer = self._pull_messages(request=request, state=state, store=store)
        if answer.messages_list:
            message_id = answer.messages_list[0].metadata.message_id
            with self._lock:
                self._handed_out.setdefault(node, {})[message_id] = answer
            return answer
        with self._lock:
            earlier = list(self._handed_out.get(node, {}).items())
        for message_id, again in earlier:
            if _is_waited_for(message_id, state, store):
                run_id = again.messages_list[0].metadata.run_id
                state.store_traffic(
                    run_id, bytes_sent=again.ByteSize(), bytes_recv=request.ByteSize()
                )
                return again
            self._has(node, message_id)
        return answer

    def confirm_message_received(self, request: Any, state: Any, store: Any) -> Any:
        """As Flower's; the message is not handed out again."""
        self._has(request.node.node_id, request.message_object_id)
        return self._confirm_message_received(request=request, state=state, store=store)

    def push_messages(self, request: Any, state: Any) -> Any:
        """What of a reply is to be sent, the same as it was announced first."""
        node = request.node.node_id
        metadata = [message.metadata for message in request.messages_list]
        for each in metadata:  # an error is replied without a confirmation
            self._has(node, each.reply_to_message_id)
        key = (node, *(each.message_id for each in metadata))
        with self._lock:
            answer = self._announced.get(key)
        if answer is None:
            answer = self._push_messages(request=request, state=state)
            with self._lock:
                self._announced.add(key, answer)
        return answer

    def push_object(self, request: Any, state: Any) -> Any:
        """As Flower's; a part that was stored before is stored."""
        answer = self._push_object(request=request, state=state)
        key = (request.session_id, request.object_id)
        with self._lock:
            if answer.stored:
                self._stored.add(key, True)
            elif self._stored.get(key):
                answer.stored = True
        return answer

    def _has(self, node: int, message_id: str) -> None:
        with self._lock:
            messages = self._handed_out.get(node, {})
            messages.pop(message_id, None)
            if not messages:
                self._handed_out.pop(node, None)


def _is_waited_for(message_id: str, state: Any, store: Any) -> bool:
    """Whether a message still is one; not if its run has ended, or did not wait any longer."""
    return state.get_valid_message_ins(message_id) is not None and message_id in store


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
