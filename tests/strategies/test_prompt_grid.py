"""Flower's own grid of a ServerApp over a SuperLink that is played."""

import threading
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.superlink.grid.http_grid import HttpGrid

from strategies.prompt_grid import PromptGrid, prompt
from strategies.streaming import StreamingGrid


@dataclass
class PlayedSuperLink:
    """What Flower's client of the SuperLink does, as far as replies go.

    Attributes:
        asked: ids of messages, a set for each question after replies.
        stalled: ids of messages of whose replies one object does not come, until the event is set.
        confirmed: ids of replies.
    """

    replies: dict = field(default_factory=dict)
    objects: dict = field(default_factory=dict)
    asked: list = field(default_factory=list)
    stalled: dict = field(default_factory=dict)
    confirmed: list = field(default_factory=list)

    def reply(self, question, value):
        """Announce a reply to a question."""
        arrays = ArrayRecord({"a": Array(np.full(3, value))})
        message = Message(RecordDict({"arrays": arrays}), reply_to=question)
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
        if content == b"broken":
            raise ValueError("no object")
        return PullObjectResponse(object_found=True, object_available=True, object_content=content)

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


def test_one_that_cannot_be_read_loses_no_other(superlink, flowers, questions):
    grid = PromptGrid(flowers, wait_seconds=30)
    for number, question in enumerate(questions):
        superlink.reply(question, number)
    superlink.objects = {
        object_id: (question, b"broken" if question == "2" else content)
        for object_id, (question, content) in superlink.objects.items()
    }
    with pytest.raises(ValueError, match="no object"):
        grid.pull_messages({"1", "2", "3"})
    with pytest.raises(ValueError, match="no object"):
        grid.pull_messages({"2"})
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


@pytest.mark.parametrize("prompt_or_not", [True, False])
def test_a_round_has_at_its_deadline_what_was_in_time(
    superlink, flowers, questions, prompt_or_not, monkeypatch
):
    """Over the prompt grid alone; over Flower's own, which the other case shows, it has none."""
    for number, question in enumerate(questions):
        superlink.reply(question, number)
    superlink.stalled["2"] = threading.Event()
    grid = prompt(flowers) if prompt_or_not else flowers
    monkeypatch.setattr(grid, "push_messages", lambda messages: ["1", "2", "3"])
    replies = list(StreamingGrid(grid, 0.1).send_and_receive(questions, timeout=3))
    assert values(replies) == ([0, 2] if prompt_or_not else [])


def test_a_grid_of_a_simulation_stays_as_it_is(scripted_grid):
    grid = scripted_grid({})
    assert prompt(grid) is grid
