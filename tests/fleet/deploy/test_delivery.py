"""Devices and runs whose answers are lost, against Flower's own state of a SuperLink.

Where a server is `restarted` it ends after each answer: the next one is given by another.
"""

import itertools
import secrets
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Error, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers
from sqlalchemy import text

from fleet.deploy.delivery import REMEMBERED_SECONDS, DeviceDeliveries, RunDeliveries

SERVER = 1  # Flower's own node
_SEEDS = itertools.count()


class World:
    """A SuperLink with a run and a node, and their requests.

    Args:
        state: of the SuperLink.
        handlers: what answers the node: Flower's module, or what is to mend it.
        of_runs: what answers the ServerApp.
    """

    def __init__(self, state, handlers=fleet_handlers, of_runs=runtime_handlers):
        self.handlers, self.of_runs = handlers, of_runs
        self.state = state
        self.store = self.state.object_store
        self.node = self.state.create_node("", "", secrets.token_bytes(8), 0)
        self.state.activate_node(self.node, 30.0)
        self.run = self.state.create_run(
            None, None, None, {}, NOOP_FEDERATION_ID, None, None, TaskType.SERVER_APP
        )
        (run,) = self.state.get_run_info(run_ids=[self.run])
        self.task = run.primary_task_id
        self.state.claim_task(self.task)
        assert self.state.activate_task(self.task)

    def ask(self):
        """The ServerApp sends the node a message; its id."""
        message, session = self._announced()
        for object_id, content in get_all_nested_objects(message).items():
            self.state.store_object(self.run, session, object_id, content.deflate())
        return message.metadata.message_id

    def asked_in_parts(self):
        """A message's id, its last part, which is not here yet, and the session."""
        message, session = self._announced()
        *objects, last = get_all_nested_objects(message).items()
        for object_id, content in objects:
            self.state.store_object(self.run, session, object_id, content.deflate())
        return message.metadata.message_id, last, session

    def send_of_run(self, part, session):
        """Whether the server has a part of a message."""
        object_id, content = part
        request = PushObjectRequest(
            node=Node(node_id=SERVER),
            run_id=self.run,
            object_id=object_id,
            object_content=content.deflate(),
            session_id=session,
        )
        return self.of_runs.push_object(request, self.state, self._task).stored

    def pulled(self):
        """Ids of messages that the node is handed when it asks."""
        request = PullMessagesRequest(node=self._sender)
        answer = self.handlers.pull_messages(request=request, state=self.state, store=self.store)
        return [message.metadata.message_id for message in answer.messages_list]

    def confirm(self, message_id):
        request = ConfirmMessageReceivedRequest(
            node=self._sender, run_id=self.run, message_object_id=message_id
        )
        self.handlers.confirm_message_received(request=request, state=self.state, store=self.store)

    def reply(self, message_id, error=None):
        content = None if error else tensors()
        return self._message(self.node, SERVER, content=content, error=error, answers=message_id)

    def announce(self, reply):
        """What the node is told to send of a reply: ids of objects, and the session."""
        message = reply if reply.has_error() else remove_content_from_message(reply)
        request = PushMessagesRequest(
            node=self._sender,
            messages_list=[message_to_proto(message)],
            message_object_trees=[get_object_tree(reply)],
        )
        answer = self.handlers.push_messages(request=request, state=self.state)
        return list(answer.objects_to_push), answer.session_id

    def send(self, reply, object_id, session):
        """Whether the server has a part of a reply."""
        content = get_all_nested_objects(reply)[object_id].deflate()
        request = PushObjectRequest(
            node=self._sender,
            run_id=self.run,
            object_id=object_id,
            object_content=content,
            session_id=session,
        )
        return self.handlers.push_object(request=request, state=self.state).stored

    def look(self, message_id):
        """Ids of replies that the ServerApp is handed."""
        request = PullAppMessagesRequest(message_ids=[message_id])
        answer = self.of_runs.pull_messages(request, self.state, self._task)
        return [message.metadata.message_id for message in answer.messages_list]

    def fetched(self, reply):
        """The ServerApp says that it has a reply."""
        request = ConfirmMessageReceivedRequest(
            node=Node(node_id=SERVER), run_id=self.run, message_object_id=reply.metadata.message_id
        )
        self.of_runs.confirm_message_received(request, self.state, self._task)

    def answered(self):
        """A message, and the node's reply to it, which is here whole."""
        asked = self.ask()
        self.pulled(), self.confirm(asked)
        reply = self.reply(asked)
        objects, session = self.announce(reply)
        assert all(self.send(reply, object_id, session) for object_id in objects)
        return asked, reply

    def _announced(self):
        """A message to the node of which no part is here yet, and the session to send it in."""
        message = self._message(SERVER, self.node, content=tensors())
        session = self.state.start_session(self.run)
        self.state.store_message_and_object_tree(
            remove_content_from_message(message), get_object_tree(message), session
        )
        return message, session

    @property
    def _task(self):
        return SimpleNamespace(run_id=self.run)

    @property
    def _sender(self):
        return Node(node_id=self.node)

    def _message(self, source, destination, content=None, error=None, answers=""):
        metadata = Metadata(
            run_id=self.run,
            message_id="",
            src_node_id=source,
            dst_node_id=destination,
            reply_to_message_id=answers,
            group_id="",
            created_at=now().timestamp(),
            ttl=300.0 if answers else 600.0,  # a reply may not outlive what it answers
            message_type="train",
        )
        message = make_message(metadata=metadata, content=content, error=error)
        message.metadata.__dict__["_message_id"] = message.object_id
        return message


def tensors():
    """Never the same twice: Flower stores what is the same once."""
    rng = np.random.default_rng(next(_SEEDS))
    return RecordDict({"model": ArrayRecord({"w": Array(rng.normal(size=9))})})


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """To make its tables takes seconds."""
    database = str(tmp_path_factory.mktemp("superlink") / "flower.db")
    return LinkStateFactory(database, NoOpFederationManager(), ObjectStoreFactory(database)).state()


@pytest.fixture
def flower(state):
    """With Flower's own handlers."""
    return World(state)


class Restarted:
    """Handlers of a server that is started anew before each request."""

    def __init__(self, deliveries, flowers):
        self._make = deliveries, flowers

    def __getattr__(self, name):
        return getattr(patient(*self._make), name)


def patient(deliveries, flowers):
    """Flower's functions, and those that take the place of some of them."""
    module = SimpleNamespace(**vars(flowers))
    deliveries(flowers).install(module)
    return module


@pytest.fixture(params=["one server", "restarted"])
def world(state, request):
    """With handlers that are the same on being asked twice."""
    make = patient if request.param == "one server" else Restarted
    return World(
        state, make(DeviceDeliveries, fleet_handlers), make(RunDeliveries, runtime_handlers)
    )


def test_flowers_own_message_is_lost_with_the_answer_that_brings_it(flower):
    """What there is to mend: if this passes no more, `DeviceDeliveries.pull_messages` can go."""
    asked = flower.ask()
    assert flower.pulled() == [asked]
    assert flower.pulled() == []


def test_a_message_is_handed_out_until_the_device_has_it(world):
    asked = world.ask()
    assert [world.pulled() for _ in range(4)] == [[asked]] * 4
    world.confirm(asked)
    assert world.pulled() == []


def test_a_new_message_comes_first_and_the_lost_one_after_it(world):
    lost, new = world.ask(), world.ask()
    assert world.pulled() == [lost]
    assert world.pulled() == [new]
    world.confirm(new)
    assert world.pulled() == [lost]


def test_a_message_of_a_run_that_has_ended_is_handed_out_no_more(world):
    asked = world.ask()
    assert world.pulled() == [asked]
    world.state.stop_run(world.run)
    assert world.pulled() == []


def test_a_message_that_an_error_answers_is_handed_out_no_more(world):
    """A SuperNode that does not trust an app replies without having fetched the message."""
    asked = world.ask()
    assert world.pulled() == [asked]
    world.announce(world.reply(asked, error=Error(9, "not signed")))
    assert world.pulled() == []


def test_flowers_own_reply_is_lost_if_it_is_announced_again(flower):
    """What there is to mend: if this passes no more, `RunDeliveries` need keep no message."""
    asked = flower.ask()
    flower.pulled(), flower.confirm(asked)
    reply = flower.reply(asked)
    assert flower.announce(reply)[0]
    assert flower.look(asked) == [reply.metadata.message_id]  # the ServerApp waits for it
    assert flower.announce(reply)[0] == []


def test_a_reply_that_is_announced_again_is_sent_all_the_same(world):
    asked = world.ask()
    world.pulled(), world.confirm(asked)
    reply = world.reply(asked)
    assert world.announce(reply)[0]
    assert world.look(asked) == [reply.metadata.message_id]
    objects, session = world.announce(reply)
    assert set(objects) == get_all_nested_objects(reply).keys()
    assert all(world.send(reply, object_id, session) for object_id in objects)
    for object_id, content in get_all_nested_objects(reply).items():
        assert world.state.get_object(world.run, object_id) == content.deflate()


def test_flowers_own_reply_is_given_up_if_a_part_is_sent_again(flower):
    """What there is to mend: if this passes no more, `DeviceDeliveries.push_object` can go."""
    asked = flower.ask()
    flower.pulled(), flower.confirm(asked)
    reply = flower.reply(asked)
    (part, *_), session = flower.announce(reply)
    assert [flower.send(reply, part, session) for _ in range(2)] == [True, False]


def test_a_part_that_is_sent_again_is_stored_and_one_of_no_reply_is_not(world):
    asked = world.ask()
    world.pulled(), world.confirm(asked)
    reply = world.reply(asked)
    (part, other, *_), session = world.announce(reply)
    assert [world.send(reply, part, session) for _ in range(3)] == [True] * 3
    assert not world.send(reply, other, "another session")
    never_announced = world.reply(asked)
    assert not world.send(never_announced, never_announced.metadata.message_id, session)


def test_a_reply_whose_sending_was_cut_off_is_announced_again_and_arrives_whole(world):
    asked = world.ask()
    world.pulled(), world.confirm(asked)
    reply = world.reply(asked)
    (part, *rest), session = world.announce(reply)
    assert world.send(reply, part, session)
    assert world.look(asked) == [reply.metadata.message_id]
    objects, session = world.announce(reply)
    assert set(objects) == set(rest)
    assert all(world.send(reply, object_id, session) for object_id in (part, *rest))
    assert world.announce(reply)[0] == []
    for object_id, content in get_all_nested_objects(reply).items():
        assert world.state.get_object(world.run, object_id) == content.deflate()


def test_a_part_whose_answer_was_lost_is_stored_though_the_run_has_taken_all_of_it(world):
    asked = world.ask()
    world.pulled(), world.confirm(asked)
    reply = world.reply(asked)
    objects, session = world.announce(reply)
    assert all(world.send(reply, object_id, session) for object_id in objects)
    world.fetched(reply)
    assert world.send(reply, objects[-1], session)


def test_flowers_own_run_is_given_up_if_a_device_has_fetched_the_part_that_it_sends_again(flower):
    """What there is to mend: if this passes no more, `RunDeliveries.push_object` can go."""
    asked, part, session = flower.asked_in_parts()
    assert flower.send_of_run(part, session)
    assert flower.pulled() == [asked]
    flower.confirm(asked)
    assert not flower.send_of_run(part, session)


def test_a_part_of_a_message_is_stored_though_the_device_has_fetched_all_of_it(world):
    asked, part, session = world.asked_in_parts()
    assert world.send_of_run(part, session)
    assert world.pulled() == [asked]
    world.confirm(asked)
    assert world.send_of_run(part, session)
    assert not world.send_of_run(part, "another session")


def test_a_reply_to_a_run_that_has_ended_is_still_refused(world):
    asked = world.ask()
    world.pulled(), world.confirm(asked)
    world.state.stop_run(world.run)
    with pytest.raises(Exception, match="finished"):
        world.announce(world.reply(asked))


def test_parts_stored_long_ago_are_forgotten(state):
    clock = [1e9]
    deliveries = DeviceDeliveries(fleet_handlers, clock=lambda: clock[0])
    module = SimpleNamespace(**vars(fleet_handlers))
    deliveries.install(module)
    world = World(state, module)
    for _ in range(3):
        _, reply = world.answered()
        clock[0] += REMEMBERED_SECONDS + 1
    with state.session() as session:
        counted = "SELECT COUNT(*) FROM fleet_stored_objects WHERE forget_at < 1.5e9"
        assert session.scalar(text(counted)) == len(get_all_nested_objects(reply))


def test_what_flower_could_not_store_is_still_to_be_sent(world, monkeypatch):
    """Flower says so of an error in the midst of it, and takes back what came before that."""
    asked = world.ask()
    world.pulled(), world.confirm(asked)
    reply = world.reply(asked)
    (part, *_), session = world.announce(reply)
    with monkeypatch.context() as full:
        full.setattr(world.state.object_store, "put", _no_room)
        assert not world.send(reply, part, session)
    assert world.send(reply, part, session)


def _no_room(object_id, content):
    raise OSError("no space left on device")


def test_flowers_own_reply_is_lost_with_the_answer_that_tells_the_run_of_it(flower):
    """What there is to mend: if this passes no more, `RunDeliveries` can go."""
    asked, reply = flower.answered()
    assert flower.look(asked) == [reply.metadata.message_id]
    (instead,) = flower.look(asked)
    assert instead != reply.metadata.message_id  # an error: the message is not there any more


def test_a_run_is_told_of_a_reply_until_it_has_it(world):
    asked, reply = world.answered()
    assert [world.look(asked) for _ in range(3)] == [[reply.metadata.message_id]] * 3
    assert world.state.get_valid_message_ins(asked) is not None
    world.fetched(reply)
    assert world.state.get_valid_message_ins(asked) is None
    assert reply.metadata.message_id not in world.store
    (instead,) = world.look(asked)  # as Flower's own
    assert instead != reply.metadata.message_id


def test_a_run_is_told_of_a_reply_that_is_still_being_sent_until_it_has_it(world):
    asked = world.ask()
    world.pulled(), world.confirm(asked)
    reply = world.reply(asked)
    objects, session = world.announce(reply)
    assert [world.look(asked) for _ in range(2)] == [[reply.metadata.message_id]] * 2
    assert all(world.send(reply, object_id, session) for object_id in objects)
    world.fetched(reply)
    assert world.state.get_valid_message_ins(asked) is None


def test_a_message_that_nobody_knows_is_answered_by_an_error_each_time(world):
    assert [len(world.look("0" * 64)) for _ in range(2)] == [1, 1]


def test_a_part_of_a_message_that_is_sent_again_is_stored(world, flower):
    for each, again in ((flower, False), (world, True)):
        message, session = each._announced()
        part = next(iter(get_all_nested_objects(message).items()))
        stored = [each.send_of_run(part, session) for _ in range(2)]
        assert stored == [True, again]


def test_flowers_routers_look_their_handlers_up_each_time():
    from flwr.superlink.main import create_app
    from flwr.superlink.routers.fleet import router

    assert router.fleet_handlers is fleet_handlers
    assert create_app().state.runtime_handlers is runtime_handlers
