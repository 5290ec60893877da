"""A message whose ClientApp has died is answered, so that its device goes on with the next.

A SuperNode works on one message at a time: it waits for the reply, and only then looks for
another. In Flower 1.41 three deaths leave it waiting for ever, while its heartbeats go on: of a
ClientApp that says itself that it failed before it replied, as on SIGTERM; of one that had not
taken its message yet; and of one that was handing over its reply, the rest of which never comes.
"""

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

_log = logging.getLogger("flwr")


def answer_for_the_dead(nodestate: ModuleType, give_up: Callable[[], None]) -> None:
    """Let a SuperNode answer each message whose ClientApp failed without a reply.

    Args:
        nodestate: `flwr.supernode.nodestate.in_memory_nodestate`.
        give_up: ends this SuperNode, to be started again; called where half a reply is left,
            which its main loop may be sending by now.
    """
    from flwr.app import Error
    from flwr.common.constant import ErrorCode, SubStatus
    from flwr.supercore.constant import TaskType

    kind = nodestate.InMemoryNodeState
    finish, expire, answer = (
        kind.finish_task,
        kind._on_task_tokens_expired,
        kind._store_error_replies,
    )

    def finish_and_answer(state: Any, task_id: int, sub_status: str, details: str) -> bool:
        finished = finish(state, task_id, sub_status, details)
        if finished and sub_status == SubStatus.FAILED:
            with state.lock_task_store:
                runs = _runs_left_alone(state, [state.task_store[task_id]], TaskType.CLIENT_APP)
            _answer(state, runs, details)
        return finished

    def expire_and_answer(state: Any, tasks: list[Any]) -> None:
        # The caller holds the lock of the tasks.
        runs = _runs_left_alone(state, tasks, TaskType.CLIENT_APP)
        _answer(state, runs, "nothing was heard of it for a minute")
        expire(state, [task for task in tasks if task.type != TaskType.CLIENT_APP])

    def _answer(state: Any, runs: set[int], details: str) -> None:
        if not runs:
            return
        with state.lock_msg_store:
            entries = [e for e in state.msg_store.values() if e.message.metadata.run_id in runs]
            if any(_is_torn(state, entry.message) for entry in entries):
                _log.error("a ClientApp died as it handed over its reply (%s)", details)
                give_up()
                return
            for entry in entries:
                if not entry.is_retrieved and not entry.message.metadata.reply_to_message_id:
                    entry.is_retrieved = True  # else it is not answered
                    state.record_message_processing_start(entry.message.metadata.message_id)
            answer(state, runs, Error(ErrorCode.CLIENT_APP_CRASHED, reason(details)))

    kind.finish_task = finish_and_answer
    kind._on_task_tokens_expired = expire_and_answer


def reason(details: str) -> str:
    """Why a message came to nothing, for the server's record."""
    state = os.environ.get("FLEET_STATE")
    log = Path(state) / "logs" / "supernode.log" if state else "its client's log"
    return f"the process that worked on it died ({details}); on the device {log} says more"


def _runs_left_alone(state: Any, dead: Iterable[Any], kind: str) -> set[int]:
    """Runs of dead tasks that no other task works for: one that does has the newer message."""
    from flwr.common.constant import Status

    runs = {task.run_id for task in dead if task.type == kind}
    tasks = state.task_store.values()
    busy = {task.run_id for task in tasks if task.status.status != Status.FINISHED}
    return runs - busy


def _is_torn(state: Any, message: Any) -> bool:
    """Whether a message is a reply of which not all objects are there."""
    from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
    from flwr.supercore.object_store.object_store import NoObjectInStoreError

    if not message.metadata.reply_to_message_id:
        return False
    try:
        tree = state.object_store.get_object_tree(message.metadata.message_id)
    except NoObjectInStoreError:  # it has been sent, and its objects are gone
        return False
    return any(not state.object_store.get(each.object_id) for each in iterate_object_tree(tree))
