"""Flower's own state of a SuperNode, as ClientApps die in it."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
from flwr.app import Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode, SubStatus
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

from fleet.deploy.dead_tasks import answer_for_the_dead, reason

RUN = 7


@pytest.fixture
def gave_up():
    return []


@pytest.fixture
def state(gave_up, task_identity):
    """A SuperNode's state that answers for the dead; Flower's class stays as it is."""

    class State(InMemoryNodeState):
        pass

    nodestate = SimpleNamespace(InMemoryNodeState=State)
    answer_for_the_dead(nodestate, lambda: gave_up.append(True))
    return State(ObjectStoreFactory().store())


@pytest.fixture
def task_identity():
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN, 1, 1
    yield
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = None


def receive(state):
    """A message as the SuperNode's main loop stores it, and the task that is to work on it."""
    task_id = state.create_task(task_type=TaskType.CLIENT_APP, run_id=RUN, fab_hash="")
    message = Message(RecordDict(), 5, MessageType.TRAIN)
    message.metadata.__dict__["_message_id"] = message.object_id
    state.store_message(message)
    state.claim_task(task_id)
    return task_id, message


def take(state, task_id):
    """What a ClientApp does first."""
    state.activate_task(task_id)
    (message,) = state.get_messages_legacy(run_ids=[RUN], is_reply=False, limit=1)
    state.record_message_processing_start(message.metadata.message_id)
    return message


def hand_over(state, message, whole=True):
    reply = Message(RecordDict(), reply_to=message)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    state.record_message_processing_end(message.metadata.message_id)
    with no_object_id_recompute():
        state.store_message_and_object_tree(reply, get_object_tree(reply), state.start_session(RUN))
        for object_id, each in get_all_nested_objects(reply).items():
            if whole:
                state.object_store.put(object_id, each.deflate())
    return reply


def replies(state):
    return state.get_messages_legacy(is_reply=True)


@pytest.mark.parametrize("taken", [True, False])
def test_a_task_that_fails_without_a_reply_is_answered_at_once(state, gave_up, taken):
    task_id, message = receive(state)
    if taken:
        take(state, task_id)
    state.finish_task(task_id, SubStatus.FAILED, "killed by signal 9")
    (reply,) = replies(state)
    assert reply.metadata.reply_to_message_id == message.metadata.message_id
    assert reply.error.code == ErrorCode.CLIENT_APP_CRASHED
    assert reply.error.reason == reason("killed by signal 9")
    assert state.object_store.get(reply.metadata.message_id)  # it can be sent
    assert replies(state) == [] and gave_up == []


def test_flowers_own_state_leaves_such_a_message_without_an_answer(task_identity):
    """What there is to mend: if this passes no more, `answer_for_the_dead` can go."""
    state = InMemoryNodeState(ObjectStoreFactory().store())
    task_id, _ = receive(state)
    take(state, task_id)
    state.finish_task(task_id, SubStatus.FAILED, "killed by signal 15")
    assert replies(state) == []


@pytest.mark.parametrize("taken", [True, False])
def test_a_task_that_says_nothing_any_more_is_answered_as_its_time_is_over(state, taken):
    task_id, _ = receive(state)
    state.activate_task(task_id)
    if taken:
        take(state, task_id)
    state.task_token_store[task_id].active_until -= timedelta(seconds=61)
    (reply,) = replies(state)
    assert "(nothing was heard of it for a minute)" in reply.error.reason


def test_who_has_replied_before_it_fails_is_not_answered_for(state, gave_up):
    task_id, _ = receive(state)
    own = hand_over(state, take(state, task_id))
    state.finish_task(task_id, SubStatus.FAILED, "it raised an exception")
    assert [reply.metadata.message_id for reply in replies(state)] == [own.metadata.message_id]
    assert gave_up == []


def test_a_task_that_ends_late_takes_nothing_from_the_next(state):
    first, message = receive(state)
    hand_over(state, take(state, first))
    (reply,) = replies(state)  # and sent
    state.delete_messages(message_ids=[message.metadata.message_id, reply.metadata.message_id])
    second, newer = receive(state)
    state.finish_task(first, SubStatus.FAILED, "it raised an exception")
    assert replies(state) == []
    assert take(state, second).metadata.message_id == newer.metadata.message_id


@pytest.mark.parametrize("being_sent", [True, False])
def test_half_a_reply_ends_the_supernode(state, gave_up, being_sent):
    task_id, _ = receive(state)
    hand_over(state, take(state, task_id), whole=False)
    if being_sent:
        assert len(replies(state)) == 1
    state.finish_task(task_id, SubStatus.FAILED, "killed by signal 9")
    assert gave_up == [True]


def test_the_reason_names_the_log_on_the_device(monkeypatch):
    monkeypatch.setenv("FLEET_STATE", "/var/lib/fleet-client")
    assert reason("killed by signal 9") == (
        "the process that worked on it died (killed by signal 9); on the device "
        "/var/lib/fleet-client/logs/supernode.log says more"
    )
    monkeypatch.delenv("FLEET_STATE")
    assert "on the device its client's log says more" in reason("x")
