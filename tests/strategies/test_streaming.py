import threading
import time

import pytest
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from google.protobuf.message import DecodeError

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


def damaged(error):
    """A node whose reply Flower cannot build: what its bytes make Flower's grid raise."""

    def answer(message):
        raise error

    return answer


@pytest.mark.parametrize(
    "error",
    [DecodeError("Error parsing message"), ValueError("no head"), KeyError("1"), RecursionError()],
)
def test_a_reply_that_cannot_be_built_ends_nothing_and_is_named(scripted_grid, clock, error):
    grid = scripted_grid({1: answers, 2: damaged(error), 3: answers, 4: damaged(error), 5: answers})
    streaming_grid = StreamingGrid(grid, 0.5)
    lossy = list(streaming_grid.send_and_receive(map(question, (1, 2, 3)), timeout=1.0))
    assert nodes_of(lossy) == [3]  # with a batch, what came before the bad one is lost
    replies = list(streaming_grid.send_and_receive(map(question, (3, 4, 5)), timeout=60))
    assert nodes_of(r for r in replies if r.has_content()) == [3, 5]
    (reason,) = [reply.error.reason for reply in replies if reply.has_error()]
    assert reason == f"reply cannot be read ({error!r})"


def test_a_late_reply_that_cannot_be_built_is_counted(scripted_grid, clock):
    grid = scripted_grid({1: answers, 2: damaged(ValueError("no head")), 3: answers})
    After(grid, clock).due = {2: 1010.0, 3: 1010.0}
    streaming_grid = StreamingGrid(grid, 0.5)
    streaming_grid._singly = True
    list(streaming_grid.send_and_receive(map(question, (1, 2, 3)), timeout=1.0))
    clock.now = 1010.0
    assert len(streaming_grid.take_late()) == 2


def test_a_network_that_fails_is_no_hostile_reply(scripted_grid, clock):
    grid = scripted_grid({1: damaged(ConnectionError("refused"))})
    with pytest.raises(ConnectionError):
        list(StreamingGrid(grid).send_and_receive([question(1)], timeout=1.0))


def test_a_fault_in_one_process_is_not_taken_for_a_hostile_reply(scripted_grid, clock):
    grid = scripted_grid({1: damaged(ValueError("a bug"))})
    grid.answers_at_once = True
    with pytest.raises(ValueError, match="a bug"):
        list(StreamingGrid(grid).send_and_receive([question(1)], timeout=1.0))


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


class HeldUp:
    """A grid that waits within a look for a node whose reply never gets there whole."""

    def __init__(self, grid, node):
        self.grid, self.node, self.released = grid, node, threading.Event()
        self.pull, self.handed_out = grid.pull_messages, set()
        grid.pull_messages = self.pull_messages

    def pull_messages(self, message_ids):
        nodes = {m.metadata.message_id: m.metadata.dst_node_id for m in self.grid.sent}
        held = {i for i in message_ids if nodes[i] == self.node and i not in self.handed_out}
        self.handed_out |= held
        if held:
            self.released.wait(60)
        return self.pull(held or {i for i in message_ids if nodes[i] != self.node})


def test_a_sender_that_died_as_it_sent_holds_up_neither_deadline_nor_others(scripted_grid):
    grid = scripted_grid({1: answers, 2: answers, 3: answers})
    held_up = HeldUp(grid, 2)
    streaming_grid = StreamingGrid(grid, 0.01, patience=0.1)
    began = time.monotonic()
    replies = streaming_grid.send_and_receive(map(question, (1, 2, 3)), timeout=3)
    assert sorted(nodes_of(replies)) == [1, 3]
    assert 3 <= time.monotonic() - began < 30  # what held it up lasts for 60 s
    held_up.released.set()
    late = []
    while not late:
        assert time.monotonic() - began < 30
        late = streaming_grid.take_late()
    assert [message_id for message_id, _ in late] == [grid.sent[1].metadata.message_id]


def test_a_reply_that_was_held_up_over_the_deadline_is_not_the_next_rounds(scripted_grid):
    grid = scripted_grid({1: answers, 2: answers})
    held_up = HeldUp(grid, 2)
    streaming_grid = StreamingGrid(grid, 0.01, patience=0.1)
    first = streaming_grid.send_and_receive(map(question, (1, 2)), timeout=1)
    assert nodes_of(first) == [1]
    held_up.node = None  # the next round is not held up
    held_up.released.set()
    second = streaming_grid.send_and_receive(map(question, (1, 2)), timeout=20)
    assert sorted(nodes_of(second)) == [1, 2]
    ((message_id, _),) = streaming_grid.take_late()
    assert message_id == grid.sent[1].metadata.message_id


def test_what_an_earlier_look_could_not_read_is_not_laid_to_another_message(scripted_grid):
    """Looks for the second node's reply take long, and end while the first's is looked for."""
    grid = scripted_grid({1: answers, 2: answers})
    pull, looked = grid.pull_messages, {1: 0, 2: 0}

    def pull_messages(message_ids):
        (node,) = (
            m.metadata.dst_node_id for m in grid.sent if m.metadata.message_id in message_ids
        )
        looked[node] += 1
        time.sleep({1: 0.08, 2: 0.15}[node])
        if node == 2:
            raise DecodeError("damaged")
        return pull(message_ids if looked[1] > 5 else set())

    grid.pull_messages = pull_messages
    streaming_grid = StreamingGrid(grid, 0.01, patience=0.1)
    streaming_grid._singly = True  # as after the first damaged reply
    replies = list(streaming_grid.send_and_receive(map(question, (1, 2)), timeout=30))
    ids = {m.metadata.message_id: m.metadata.dst_node_id for m in grid.sent}
    failed = {ids[r.metadata.reply_to_message_id]: r.has_error() for r in replies}
    assert failed == {1: False, 2: True}


class SlowLink:
    """A grid whose first look waits for a node's reply to come over a slow link.

    As Flower's, it forgets a message as it hands out its reply's name: who looks again
    meanwhile is told that there is no such message.
    """

    def __init__(self, grid, node, brings=True):
        self.grid, self.node, self.brings = grid, node, brings
        self.arrived, self.refusals, self.handed_out = threading.Event(), 0, set()
        self.pull = grid.pull_messages
        grid.pull_messages = self.pull_messages

    def pull_messages(self, message_ids):
        mine = {
            m.metadata.message_id for m in self.grid.sent if m.metadata.dst_node_id == self.node
        }
        mine &= message_ids
        if mine - self.handed_out:
            self.handed_out |= mine
            self.arrived.wait(60)
            return self.pull(mine) if self.brings else []
        self.refusals += len(mine)
        return [*self.pull(message_ids - mine), *map(self.unavailable, mine)]

    def unavailable(self, message_id):
        (message,) = (m for m in self.grid.sent if m.metadata.message_id == message_id)
        return Message(Error(ErrorCode.MESSAGE_UNAVAILABLE, "there is none"), reply_to=message)


def test_a_reply_that_takes_long_over_its_link_is_not_taken_for_one_that_never_comes(scripted_grid):
    grid = scripted_grid({1: answers, 2: answers})
    link = SlowLink(grid, 2)
    replies = StreamingGrid(grid, 0.01, patience=0.1).send_and_receive(
        map(question, (1, 2)), timeout=60
    )
    assert nodes_of([next(replies)]) == [1]
    threading.Timer(0.5, link.arrived.set).start()
    (reply,) = replies
    assert link.refusals > 2  # others looked, and were told that there is none
    assert reply.metadata.src_node_id == 2 and not reply.has_error()


def test_a_reply_that_never_comes_is_told_once_the_look_for_it_has_ended(scripted_grid):
    grid = scripted_grid({1: answers, 2: answers})
    link = SlowLink(grid, 2, brings=False)
    replies = StreamingGrid(grid, 0.01, patience=0.1).send_and_receive(
        map(question, (1, 2)), timeout=60
    )
    assert nodes_of([next(replies)]) == [1]
    threading.Timer(0.3, link.arrived.set).start()
    (reply,) = replies
    assert reply.error.reason == "there is none"


def test_whoever_wants_to_hears_of_replies_that_are_late(scripted_grid, clock):
    grid = scripted_grid({1: answers, 2: answers, 3: answers})
    After(grid, clock).due = {2: 1010.0}
    heard = []
    streaming_grid = StreamingGrid(grid, 0.5, on_late=heard.append)
    assert nodes_of(streaming_grid.send_and_receive(map(question, (1, 2)), timeout=1.0)) == [1]
    clock.now = 1010.0
    streaming_grid.take_late()
    assert nodes_of(heard) == [2]


def test_a_reply_that_two_looks_bring_counts_once(scripted_grid):
    grid = scripted_grid({1: answers, 2: answers})
    pull, first = grid.pull_messages, []

    def pull_messages(message_ids):
        if first:  # the same again, and then the other
            return [*first, *pull(message_ids)]
        one = {m.metadata.message_id for m in grid.sent if m.metadata.dst_node_id == 1}
        first.extend(pull(one & message_ids))
        for reply in first:
            reply.metadata.__dict__["_message_id"] = "of the first node's reply"
        return list(first)

    grid.pull_messages = pull_messages
    replies = StreamingGrid(grid, 0.01).send_and_receive(map(question, (1, 2)), timeout=20)
    assert sorted(nodes_of(replies)) == [1, 2]
