import dataclasses

import numpy as np
import pytest

from fleet.codec import follow
from fleet.message import content_bytes, read_state, read_task, write_exponent
from fleet.state import TrainableState
from strategies.ledger import Ledger
from strategies.outbox import Outbox
from strategies.tokens import Tokens


@pytest.fixture
def toy_plan(toy_plan):
    """With a head that is so large that many steps in int4 are smaller than the state."""
    *others, head = toy_plan.specs
    return dataclasses.replace(toy_plan, specs=(*others, dataclasses.replace(head, shape=(64, 64))))


@pytest.fixture
def initial(toy_plan):
    rng = np.random.default_rng(0)
    arrays = {s.name: np.square(rng.normal(size=s.shape)) for s in toy_plan.specs}
    return TrainableState(toy_plan, {n: a.astype(np.float32) for n, a in arrays.items()})


@pytest.fixture
def outbox(task_identity, initial):
    return Outbox(initial, ("cat", "dog"), "00ff00ff00ff00ff", "int4", Tokens())


class Post:
    """Sends an outbox's messages; ids are given as they are sent, as Flower does."""

    def __init__(self, outbox):
        self.outbox, self.count = outbox, 0

    def send(self, server_round, names=("pi-1",), ledger=None):
        nodes = {name: i for i, name in enumerate(names, start=1)}
        messages = self.outbox.write(server_round, nodes, "train", ledger or Ledger())
        for message in messages.values():
            self.count += 1
            message.metadata.__dict__["_message_id"] = f"id-{self.count}"
        return [messages[name] for name in names]

    def step(self, seed):
        state = self.outbox.versions.state
        shifted = {n: a + np.float32(seed) for n, a in state.tensors.items()}
        self.outbox.versions.advance(TrainableState(state.plan, shifted), [seed])


@pytest.fixture
def post(outbox):
    return Post(outbox)


def start_of(message, plan):
    """The version that a message's steps start from; None: it brings the state."""
    download = read_state(message.content, plan.digest)
    return None if download.is_full_state else download.versions[0]


def test_a_client_that_answered_is_sent_the_steps_since(outbox, post, toy_plan):
    version_0 = outbox.versions.newest
    (first,) = post.send(1)
    assert start_of(first, toy_plan) == version_0
    outbox.arrived("pi-1", first.metadata.message_id)
    post.step(1)
    version_1 = outbox.versions.newest
    (second,) = post.send(2)
    assert start_of(second, toy_plan) == version_0
    outbox.arrived("pi-1", second.metadata.message_id)
    post.step(2)
    assert start_of(post.send(3)[0], toy_plan) == version_1


def test_a_late_reply_to_an_older_message_does_not_tell_that_a_newer_one_came(
    outbox, post, toy_plan, initial
):
    version_0 = outbox.versions.newest
    (first,) = post.send(1)
    post.step(1)
    post.send(2)  # is lost on its way
    outbox.arrived("pi-1", first.metadata.message_id)
    post.step(2)
    (third,) = post.send(3)
    assert start_of(third, toy_plan) == version_0
    # What the client holds is enough to follow.
    state = follow(read_state(third.content, toy_plan.digest), toy_plan, [initial])
    newest = outbox.versions.state.tensors
    assert all((state.tensors[name] == array).all() for name, array in newest.items())


@pytest.mark.parametrize("message_id", ["", "id-9"])
def test_an_answer_to_no_message_tells_nothing(outbox, post, toy_plan, message_id):
    version_0 = outbox.versions.newest
    post.step(1)
    post.send(1)
    outbox.arrived("pi-1", message_id)
    outbox.arrived("pi-2", message_id)
    post.step(2)
    assert start_of(post.send(2)[0], toy_plan) == version_0


def test_a_client_that_lost_its_version_is_sent_the_state(outbox, post, toy_plan):
    ledger = Ledger()
    outbox.lost("pi-2")
    one, two = post.send(1, ("pi-1", "pi-2"), ledger)
    assert start_of(one, toy_plan) == outbox.versions.newest
    assert start_of(two, toy_plan) is None
    assert ledger.full_state == {"pi-2"}


def test_bytes_booked_are_those_of_every_whole_message(outbox, post):
    names = ("pi-1", "pi-22", f"pi-{'x' * 40}", "pi-lost", "pi-acknowledged")
    outbox.lost("pi-lost")
    outbox.acknowledge(["pi-acknowledged"], 10**9)  # takes more bytes in a task than 0
    for server_round in (1, 2, 300, 10**6):
        ledger = Ledger()
        messages = post.send(server_round, names, ledger)
        sizes = {n: content_bytes(m.content) for n, m in zip(names, messages, strict=True)}
        assert dict(ledger.down.by_client) == sizes
        assert ledger.down.total == sum(ledger.down.by_role.values())
        post.step(server_round)


def test_a_message_without_a_state_is_booked_and_says_more(outbox):
    ledger = Ledger()
    messages = outbox.ask({"pi-1": 1}, "query.moments", write_exponent(-7), ledger)
    content = messages["pi-1"].content
    assert ledger.down.by_client["pi-1"] == content_bytes(content)
    assert content["moments"]["exponent"] == -7
    assert read_task(content).server_round == 0


def test_every_message_has_a_token_of_its_own(post):
    messages = post.send(1, ("pi-1", "pi-2")) + post.send(2, ("pi-1", "pi-2"))
    assert len({read_task(message.content).token for message in messages}) == 4
