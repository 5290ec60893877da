import pytest
from flwr.app import Message, RecordDict

from fleet.message import content_bytes
from strategies import streaming
from strategies.streaming import StreamingGrid, close

EMPTY = content_bytes(RecordDict())  # of a reply that holds nothing


class Clock:
    """Time that passes only as someone sleeps."""

    def __init__(self):
        self.now = 1000.0
        self.slept = []
        self.on_sleep = lambda: None

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds
        self.on_sleep()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(streaming, "time", clock)
    return clock


def question(node):
    return Message(RecordDict(), node, "train")


def answers(message):
    return RecordDict()


def nodes_of(replies):
    return [reply.metadata.src_node_id for reply in replies]


class After:
    """A node that answers once the clock is so far; until then its message waits."""

    def __init__(self, grid, clock):
        self.grid, self.clock, self.due = grid, clock, {}
        self.pull = grid.pull_messages
        grid.pull_messages = self.pull_messages

    def pull_messages(self, message_ids):
        nodes = {m.metadata.message_id: m.metadata.dst_node_id for m in self.grid.sent}
        due = {i for i in message_ids if self.due.get(nodes[i], 0) <= self.clock.now}
        return self.pull(due)


def test_replies_come_as_they_arrive(scripted_grid, clock):
    grid = scripted_grid({1: answers, 2: answers, 3: answers})
    After(grid, clock).due = {1: 1002.0, 3: 1001.0}
    came = []
    for reply in StreamingGrid(grid, 0.5).send_and_receive(map(question, (1, 2, 3)), timeout=60):
        came.append((reply.metadata.src_node_id, clock.now))
    assert came == [(2, 1000.0), (3, 1001.0), (1, 1002.0)]
    assert clock.slept == [0.5] * 4


def test_the_deadline_is_kept_to_the_moment(scripted_grid, clock):
    grid = scripted_grid({1: answers, 2: answers})
    After(grid, clock).due = {2: 1010.0}
    replies = StreamingGrid(grid, 0.4).send_and_receive(map(question, (1, 2)), timeout=1.0)
    assert nodes_of(replies) == [1]
    assert clock.now == 1001.0
    assert clock.slept == pytest.approx([0.4, 0.4, 0.2])


def test_simulated_clients_are_waited_for_however_slow_the_machine_is(scripted_grid, clock):
    grid = scripted_grid({1: answers, 2: answers, 3: lambda message: None})
    grid.answers_at_once = True
    came = []
    for reply in StreamingGrid(grid).send_and_receive(map(question, (1, 2, 3)), timeout=1.0):
        came.append(reply.metadata.src_node_id)
        clock.now += 2  # one after the other, they take longer than devices beside each other
    assert came == [1, 2]


def test_time_that_the_listener_takes_counts(scripted_grid, clock):
    grid = scripted_grid({1: answers, 2: answers})
    After(grid, clock).due = {2: 1000.5}
    came = []
    for reply in StreamingGrid(grid, 0.4).send_and_receive(map(question, (1, 2)), timeout=1.0):
        came.append(reply.metadata.src_node_id)
        clock.now += 2
    assert came == [1]


def test_who_did_not_answer_in_time_is_late(scripted_grid, clock):
    grid = scripted_grid({1: answers, 2: answers})
    After(grid, clock).due = {2: 1010.0}
    streaming_grid = StreamingGrid(grid, 0.5)
    list(streaming_grid.send_and_receive(map(question, (1, 2)), timeout=1.0))
    assert streaming_grid.take_late() == []
    clock.now = 1010.0
    assert streaming_grid.take_late() == [(grid.sent[1].metadata.message_id, EMPTY)]
    assert streaming_grid.take_late() == []


def test_replies_that_were_there_as_the_listener_left_are_late(scripted_grid, clock):
    grid = scripted_grid({n: answers for n in range(1, 6)})
    streaming_grid = StreamingGrid(grid)
    replies = streaming_grid.send_and_receive(map(question, range(1, 6)), timeout=60)
    next(replies), next(replies)
    close(replies)
    assert len(streaming_grid.take_late()) == 3


def test_late_replies_are_not_mixed_into_the_next_round(scripted_grid, clock):
    grid = scripted_grid({1: answers, 2: answers})
    After(grid, clock).due = {2: 1001.2}
    streaming_grid = StreamingGrid(grid, 0.5)
    list(streaming_grid.send_and_receive(map(question, (1, 2)), timeout=1.0))
    again = list(streaming_grid.send_and_receive([question(1), question(2)], timeout=60))
    asked = {m.metadata.message_id for m in grid.sent[2:]}
    assert {reply.metadata.reply_to_message_id for reply in again} == asked
    assert streaming_grid.take_late() == [(grid.sent[1].metadata.message_id, EMPTY)]


@pytest.mark.parametrize("no_id", [None, ""])
def test_a_message_that_could_not_be_sent_is_answered_at_once(scripted_grid, clock, no_id):
    """Flower gives None for such a message, in its place."""
    grid = scripted_grid({1: answers, 2: answers, 3: answers})
    push = grid.push_messages

    def push_all_but_the_second(messages):
        ids = push(messages)
        del grid._waiting[ids[1]]
        return [ids[0], no_id, ids[2]]

    grid.push_messages = push_all_but_the_second
    replies = list(StreamingGrid(grid).send_and_receive(map(question, (1, 2, 3)), timeout=60))
    failed = [reply for reply in replies if reply.has_error()]
    assert len(replies) == 3
    assert [r.metadata.reply_to_message_id for r in failed] == [grid.sent[1].metadata.message_id]
    assert "could not be sent; the server's log says why" in failed[0].error.reason
    assert clock.slept == []


def test_if_nothing_could_be_sent_nobody_is_waited_for(scripted_grid, clock):
    grid = scripted_grid({1: answers})
    grid.push_messages = lambda messages: []  # as Flower's does if all together are too large
    grid.nodes = {}
    replies = list(StreamingGrid(grid).send_and_receive([question(1)], timeout=60))
    assert [reply.has_error() for reply in replies] == [True]
    assert clock.slept == []


def test_a_fleet_that_answers_at_once_is_not_waited_for(scripted_grid, clock):
    grid = scripted_grid({1: answers, 2: lambda message: None})
    grid.answers_at_once = True
    assert nodes_of(StreamingGrid(grid).send_and_receive(map(question, (1, 2)), timeout=60)) == [1]
    assert clock.slept == []


def test_messages_that_nobody_ever_answers_are_forgotten_in_the_end(
    scripted_grid, clock, monkeypatch
):
    monkeypatch.setattr(streaming, "_REMEMBERED", 3)
    grid = scripted_grid({1: lambda message: None})
    streaming_grid = StreamingGrid(grid, 0.5)
    for _ in range(10):
        list(streaming_grid.send_and_receive([question(1)], timeout=1.0))
    assert list(streaming_grid._outstanding) == ["8", "9", "10"]


def test_whoever_wants_to_hears_of_replies_that_are_late(scripted_grid, clock):
    grid = scripted_grid({1: answers, 2: answers, 3: answers})
    After(grid, clock).due = {2: 1010.0}
    heard = []
    streaming_grid = StreamingGrid(grid, 0.5, on_late=heard.append)
    assert nodes_of(streaming_grid.send_and_receive(map(question, (1, 2)), timeout=1.0)) == [1]
    clock.now = 1010.0
    streaming_grid.take_late()
    assert nodes_of(heard) == [2]
