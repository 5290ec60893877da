"""Flower's own grid of a ServerApp over a SuperLink that is played."""

import itertools
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.superlink.grid.http_grid import HttpGrid
from google.protobuf.message import DecodeError

from fleet.message import REFUSED, Enrolment, write_enrolment
from strategies.prompt_grid import PromptGrid, prompt
from strategies.sampling import Roster
from strategies.streaming import StreamingGrid


@dataclass
class PlayedSuperLink:
    """What Flower's client of the SuperLink does, as far as replies go.

    Attributes:
        asked: ids of messages, a set for each question after replies.
        stalled: ids of messages of whose replies one object does not come, until the event is set.
        failing: ids of messages → what fetching an object of their replies raises.
        confirmed: ids of replies.
    """

    replies: dict = field(default_factory=dict)
    objects: dict = field(default_factory=dict)
    asked: list = field(default_factory=list)
    stalled: dict = field(default_factory=dict)
    failing: dict = field(default_factory=dict)
    confirmed: list = field(default_factory=list)

    def reply(self, question, value):
        """Announce a reply to a question."""
        self.announce(
            question, RecordDict({"arrays": ArrayRecord({"a": Array(np.full(3, value))})})
        )

    def announce(self, question, content):
        message = Message(content, reply_to=question)
        message.metadata.__dict__["_message_id"] = message.object_id
        tree = get_object_tree(message)
        nested = get_all_nested_objects(message)
        contents = {object_id: each.deflate() for object_id, each in nested.items()}
        self.objects |= {i: (question.metadata.message_id, c) for i, c in contents.items()}
        proto = message_to_proto(remove_content_from_message(message))
        self.replies[question.metadata.message_id] = (proto, tree)

    def PullMessages(self, request):
        """Each reply is announced once, as Flower does."""
        self.asked.append({*request.message_ids})
        found = [self.replies.pop(i) for i in request.message_ids if i in self.replies]
        return PullAppMessagesResponse(
            messages_list=[proto for proto, _ in found],
            message_object_trees=[tree for _, tree in found],
        )

    def PullObject(self, request):
        question, content = self.objects[request.object_id]
        if question in self.stalled:
            self.stalled[question].wait(60)
        if question in self.failing:
            raise self.failing[question]
        return PullObjectResponse(
            object_found=content is not None, object_available=True, object_content=content
        )

    def ConfirmMessageReceived(self, request):
        self.confirmed.append(request.message_object_id)


@pytest.fixture
def superlink():
    played = PlayedSuperLink()
    yield played
    for event in played.stalled.values():
        event.set()


@pytest.fixture
def flowers(superlink, task_identity):
    grid = HttpGrid(token="x")
    grid._client, grid._run = superlink, SimpleNamespace(run_id=1)
    return grid


@pytest.fixture
def questions(task_identity):
    asked = [Message(RecordDict(), node, "train") for node in (11, 12, 13)]
    for number, message in enumerate(asked, start=1):
        message.metadata.__dict__["_message_id"] = str(number)
    return asked


def values(replies):
    return sorted(reply.content["arrays"]["a"].numpy()[0] for reply in replies)


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_flowers_own_grid_holds_back_what_is_whole_for_what_is_not(superlink, flowers, questions):
    for number, question in enumerate(questions):
        superlink.reply(question, number)
    superlink.stalled["2"] = threading.Event()
    came = []
    look = threading.Thread(target=lambda: came.extend(flowers.pull_messages({"1", "2", "3"})))
    look.start()
    look.join(1.5)
    assert look.is_alive() and came == []
    superlink.stalled["2"].set()
    look.join(30)
    assert values(came) == [0, 1, 2]


def test_a_reply_that_does_not_come_whole_holds_up_no_other(superlink, flowers, questions):
    grid = PromptGrid(flowers, wait_seconds=2.0)
    for number, question in enumerate(questions):
        superlink.reply(question, number)
    superlink.stalled["2"] = threading.Event()
    assert values(grid.pull_messages({"1", "2", "3"})) == [0, 2]
    began = time.monotonic()
    assert list(grid.pull_messages({"2"})) == []  # nor is it waited for again
    assert time.monotonic() - began < 1.0
    assert superlink.asked == [{"1", "2", "3"}]  # nor asked for, which Flower would answer wrongly
    superlink.stalled["2"].set()
    until(lambda: "2" in grid._fetched)
    assert values(grid.pull_messages({"2"})) == [1]
    assert len(superlink.confirmed) == 3
    assert list(grid.pull_messages({"2"})) == [] and superlink.asked[-1] == {"2"}


def test_a_reply_is_handed_to_whoever_asks_for_it(superlink, flowers, questions):
    grid = PromptGrid(flowers)
    superlink.reply(questions[0], 7)
    superlink.stalled["1"] = threading.Event()
    assert list(PromptGrid.pull_messages(grid, {"1"})) == []
    superlink.stalled["1"].set()
    until(lambda: "1" in grid._fetched)
    assert list(grid.pull_messages({"2"})) == []
    assert values(grid.pull_messages({"1", "2"})) == [7]


def damage(superlink, question_id, content):
    superlink.objects = {
        object_id: (of, content if of == question_id else own)
        for object_id, (of, own) in superlink.objects.items()
    }


def errors(replies):
    """Id of a message → why there is no reply to it."""
    return {r.metadata.reply_to_message_id: r.error.reason for r in replies if r.has_error()}


@pytest.mark.parametrize("content", [b"", b"broken", b"Message 3\x00\xff\xff\xff"])
def test_a_reply_of_damaged_bytes_is_laid_to_its_own_message(
    superlink, flowers, questions, content
):
    grid = PromptGrid(flowers, wait_seconds=30)
    for number, question in enumerate(questions):
        superlink.reply(question, number)
    damage(superlink, "2", content)
    replies = list(grid.pull_messages({"1", "2", "3"}))
    assert values(r for r in replies if r.has_content()) == [0, 2]
    assert errors(replies).keys() == {"2"}
    assert errors(replies)["2"].startswith("reply cannot be read (")


@pytest.mark.parametrize(
    "error",
    [DecodeError("Error parsing message"), ValueError("no head"), KeyError("1"), RecursionError()],
)
def test_whatever_building_a_reply_raises_is_its_reason(superlink, flowers, questions, error):
    grid = PromptGrid(flowers, wait_seconds=30)
    superlink.reply(questions[0], 7)
    superlink.failing["1"] = error
    (reply,) = grid.pull_messages({"1"})
    assert errors([reply]) == {"1": f"reply cannot be read ({error!r})"}
    assert reply.error.code == REFUSED and reply.metadata.src_node_id == 11
    assert list(grid.pull_messages({"1"})) == []


def test_a_reply_that_never_comes_whole_is_told_as_flower_does(superlink, flowers, questions):
    grid = PromptGrid(flowers, wait_seconds=30)
    superlink.reply(questions[0], 0), superlink.reply(questions[1], 1)
    damage(superlink, "2", None)
    replies = list(grid.pull_messages({"1", "2"}))
    assert values(r for r in replies if r.has_content()) == [0]
    (failed,) = (r.error for r in replies if r.has_error())
    assert failed.code == ErrorCode.MESSAGE_UNAVAILABLE


def test_a_network_that_fails_is_no_hostile_reply_and_loses_no_other(superlink, flowers, questions):
    grid = PromptGrid(flowers, wait_seconds=30)
    for number, question in enumerate(questions):
        superlink.reply(question, number)
    superlink.failing["2"] = ConnectionError("refused")
    with pytest.raises(ConnectionError, match="refused"):
        grid.pull_messages({"1", "2", "3"})
    assert values(grid.pull_messages({"1", "2", "3"})) == [0, 2]


def test_a_superlink_that_does_not_answer_is_asked_again(superlink, flowers, questions):
    grid = PromptGrid(flowers)
    superlink.reply(questions[0], 7)
    answer = superlink.PullMessages
    superlink.PullMessages = lambda request: 1 / 0
    with pytest.raises(ZeroDivisionError):
        grid.pull_messages({"1"})
    superlink.PullMessages = answer
    assert values(grid.pull_messages({"1"})) == [7]


@pytest.fixture
def prompt_grid(superlink, flowers, monkeypatch):
    """Whose messages are numbered from 1, and answered by node 11 and 13 at once.

    What node 12 sends stalls, until its event is set.
    """
    numbers = itertools.count(1)

    def push_messages(messages):
        ids = []
        for message in messages:
            ids.append(str(next(numbers)))
            message.metadata.__dict__["_message_id"] = ids[-1]
            if message.metadata.dst_node_id == 12:
                superlink.stalled[ids[-1]] = threading.Event()
            superlink.announce(
                message,
                write_enrolment(Enrolment(f"pi-{message.metadata.dst_node_id}", 10, ("cat",))),
            )
        return ids

    grid = prompt(flowers)
    monkeypatch.setattr(grid, "push_messages", push_messages)
    monkeypatch.setattr(grid, "get_node_ids", lambda: [11, 12, 13])
    return grid


def nodes_of(replies):
    return sorted(reply.metadata.src_node_id for reply in replies)


def test_a_round_has_at_its_deadline_what_was_in_time(superlink, prompt_grid, questions):
    streaming_grid = StreamingGrid(prompt_grid, 0.1)
    began = time.monotonic()
    assert nodes_of(streaming_grid.send_and_receive(questions, timeout=3)) == [11, 13]
    assert 3 <= time.monotonic() - began < 30  # what held one up lasts for 60 s
    assert streaming_grid.take_late() == []
    superlink.stalled["2"].set()
    until(lambda: "2" in prompt_grid._fetched)
    ((message_id, nbytes),) = streaming_grid.take_late()
    assert message_id == "2" and nbytes > 0
    assert prompt_grid._fetched == {} and prompt_grid._under_way == set()


def test_a_reply_that_was_held_up_over_the_deadline_is_not_the_next_rounds(
    superlink, prompt_grid, questions
):
    streaming_grid = StreamingGrid(prompt_grid, 0.1)
    assert nodes_of(streaming_grid.send_and_receive(questions, timeout=1)) == [11, 13]
    superlink.stalled["2"].set()
    until(lambda: "2" in prompt_grid._fetched)
    again = streaming_grid.send_and_receive(questions, timeout=2)
    assert {r.metadata.reply_to_message_id for r in again} == {"4", "6"}
    assert [message_id for message_id, _ in streaming_grid.take_late()] == ["2"]


def test_a_late_reply_that_cannot_be_read_is_counted(superlink, prompt_grid, questions):
    streaming_grid = StreamingGrid(prompt_grid, 0.1)
    assert nodes_of(streaming_grid.send_and_receive(questions, timeout=1)) == [11, 13]
    superlink.failing["2"] = DecodeError("damaged")
    superlink.stalled["2"].set()
    until(lambda: "2" in prompt_grid._fetched)
    assert streaming_grid.take_late() == [("2", 0)]


def test_a_reply_that_takes_long_over_its_link_counts(superlink, prompt_grid, questions):
    replies = StreamingGrid(prompt_grid, 0.1).send_and_receive(questions, timeout=60)
    assert nodes_of([next(replies), next(replies)]) == [11, 13]
    threading.Timer(2, superlink.stalled["2"].set).start()
    assert nodes_of(replies) == [12]
    assert [asked for asked in superlink.asked if "2" in asked] == [{"1", "2", "3"}]


def test_an_introduction_that_takes_long_counts_without_another(superlink, prompt_grid):
    roster = Roster(prompt_grid, timeout=2)
    assert roster.online(2) == {"pi-11": 11, "pi-13": 13}
    superlink.stalled["2"].set()
    until(lambda: "2" in prompt_grid._fetched)
    assert roster.online(2) == {"pi-11": 11, "pi-12": 12, "pi-13": 13}
    assert superlink.stalled.keys() == {"2"}  # node 12 was asked once


def test_an_introduction_that_cannot_be_read_turns_away_its_node_alone(superlink, prompt_grid):
    superlink.failing["2"] = DecodeError("damaged")
    push = prompt_grid.push_messages

    def push_and_let_through(messages):
        ids = push(messages)
        superlink.stalled["2"].set()
        return ids

    prompt_grid.push_messages = push_and_let_through
    roster = Roster(prompt_grid, timeout=60)
    assert roster.online(2) == {"pi-11": 11, "pi-13": 13}
    assert roster.absent == {"node 12": "reply cannot be read (DecodeError('damaged'))"}


def test_a_grid_of_a_simulation_stays_as_it_is(scripted_grid):
    grid = scripted_grid({})
    assert prompt(grid) is grid


def test_a_simulation_does_without_flowers_own_grid():
    program = (
        "import sys, strategies.server_app; print('flwr.superlink.grid.http_grid' in sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ran.stdout == "False\n"
