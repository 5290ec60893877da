"""A device whose answers are lost, against Flower's own state of a SuperLink.

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
from flwr.supercore.corestate import sql_corestate
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers

from fleet.deploy.delivery import REMEMBERED_SECONDS, Deliveries

SERVER = 1  # Flower's own node
_SEEDS = itertools.count()


class World:
    """A SuperLink with a run and a node, its ServerApp, and the node's requests.

    Args:
        handlers: what answers the node: Flower's module, or what is to mend it.
        state: of the SuperLink.
    """

    def __init__(self, handlers, state):
        self.handlers = handlers
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
        message = self._message(SERVER, self.node, content=tensors())
        session = self.state.start_session(self.run)
        tree = get_object_tree(message)
        self.state.store_message_and_object_tree(
            remove_content_from_message(message), tree, session
        )
        for object_id, content in get_all_nested_objects(message).items():
            self.state.store_object(self.run, session, object_id, content.deflate())
        return message.metadata.message_id

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
        answer = runtime_handlers.pull_messages(
            PullAppMessagesRequest(message_ids=[message_id]),
            self.state,
            SimpleNamespace(run_id=self.run),
        )
        return [message.metadata.message_id for message in answer.messages_list]

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
    return World(fleet_handlers, state)


class Restarted:
    """Handlers of a server that is started anew before each request."""

    def __getattr__(self, name):
        return getattr(patient_handlers(), name)


def patient_handlers():
    """Flower's functions, and those of one SuperLink that take the place of some of them."""
    module = SimpleNamespace(**vars(fleet_handlers))
    Deliveries(module).install(module)
    return module


@pytest.fixture(params=["one server", "restarted"])
def world(state, request):
    """With handlers that are the same on being asked twice."""
    return World(patient_handlers() if request.param == "one server" else Restarted(), state)


def test_flowers_own_message_is_lost_with_the_answer_that_brings_it(flower):
    """What there is to mend: if this passes no more, `Deliveries.pull_messages` can go."""
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
    """What there is to mend: if this passes no more, `Deliveries.push_messages` can go."""
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
    first = world.announce(reply)
    assert world.look(asked) == [reply.metadata.message_id]
    objects, session = world.announce(reply)
    assert (set(objects), session) == (set(first[0]), first[1])
    assert set(objects) == get_all_nested_objects(reply).keys()
    assert all(world.send(reply, object_id, session) for object_id in objects)
    for object_id, content in get_all_nested_objects(reply).items():
        assert world.state.get_object(world.run, object_id) == content.deflate()


def test_flowers_own_reply_is_given_up_if_a_part_is_sent_again(flower):
    """What there is to mend: if this passes no more, `Deliveries.push_object` can go."""
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


def test_a_part_whose_answer_was_lost_is_stored_though_the_run_has_taken_all_of_it(state):
    world = World(patient_handlers(), state)
    asked = world.ask()
    world.pulled(), world.confirm(asked)
    reply = world.reply(asked)
    objects, session = world.announce(reply)
    assert all(world.send(reply, object_id, session) for object_id in objects)
    world.store.delete(reply.metadata.message_id)  # as the ServerApp has it
    assert world.send(reply, objects[-1], session)


def test_a_push_that_took_too_long_is_not_gone_on_with(world, monkeypatch):
    asked = world.ask()
    world.pulled(), world.confirm(asked)
    reply = world.reply(asked)
    monkeypatch.setattr(sql_corestate, "OBJECT_PUSH_SESSION_TTL_SECONDS", -1)
    assert world.announce(reply)[0]
    assert world.look(asked) == [reply.metadata.message_id]
    assert world.announce(reply)[0] == []


def test_a_reply_to_a_run_that_has_ended_is_still_refused(world):
    asked = world.ask()
    world.pulled(), world.confirm(asked)
    world.state.stop_run(world.run)
    with pytest.raises(Exception, match="finished"):
        world.announce(world.reply(asked))


def test_parts_stored_long_ago_are_forgotten(state):
    clock = [0.0]
    deliveries = Deliveries(fleet_handlers, clock=lambda: clock[0])
    module = SimpleNamespace(**vars(fleet_handlers))
    deliveries.install(module)
    world = World(module, state)
    for _ in range(3):
        asked = world.ask()
        world.pulled(), world.confirm(asked)
        reply = world.reply(asked)
        objects, session = world.announce(reply)
        assert all(world.send(reply, object_id, session) for object_id in objects)
        clock[0] += REMEMBERED_SECONDS + 1
    assert len(deliveries._stored._answers) == len(objects)


def test_flowers_router_looks_its_handlers_up_each_time():
    from flwr.superlink.routers.fleet import router

    assert router.fleet_handlers is fleet_handlers
