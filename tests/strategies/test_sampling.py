import random

import numpy as np
import pytest
from flwr.app import Error, Message

from fleet.errors import ConfigError
from fleet.message import Enrolment, refusal, write_enrolment, write_metrics
from strategies import sampling
from strategies.sampling import Roster, sample

NAMES = [f"pi-{i:02d}" for i in range(20)]


@pytest.fixture(autouse=True)
def short_polls(monkeypatch):
    monkeypatch.setattr(sampling, "_POLL_SECONDS", 0.01)


def enrols(name, classes=("cat", "dog")):
    return lambda message: write_enrolment(Enrolment(name, 10, classes))


def test_a_cohort_is_the_same_for_seed_and_round_whatever_the_order():
    shuffled = random.Random(0).sample(NAMES, len(NAMES))
    assert sample(NAMES, 5, seed=3, server_round=2) == sample(shuffled, 5, seed=3, server_round=2)


def test_cohorts_change_with_seed_and_round():
    assert len({tuple(sample(NAMES, 5, 3, r)) for r in range(1, 30)}) > 25
    assert len({tuple(sample(NAMES, 5, s, 1)) for s in range(30)}) > 25


@pytest.mark.parametrize("count", [1, 5, 20])
def test_a_cohort_has_as_many_as_asked_for_each_once(count):
    cohort = sample(NAMES, count, 0, 1)
    assert len(set(cohort)) == len(cohort) == count
    assert set(cohort) <= set(NAMES)


@pytest.mark.parametrize("count", [0, 20, 99])
def test_all_train_if_none_or_too_many_are_asked_for(count):
    assert sorted(sample(NAMES[::-1], count, 0, 1)) == sorted(NAMES)


def test_no_name_comes_first_more_often_than_another():
    first = [sample(NAMES, 0, 0, r)[0] for r in range(2000)]
    assert all(60 < first.count(name) < 140 for name in NAMES)  # 100 is expected


def test_every_client_is_drawn_in_the_long_run():
    drawn = [name for r in range(400) for name in sample(NAMES, 5, 0, r)]
    assert all(60 < drawn.count(name) < 140 for name in NAMES)  # 100 is expected


def test_clients_are_known_by_name_and_asked_once(scripted_grid):
    grid = scripted_grid({8: enrols("b", ("owl",)), 5: enrols("c"), 9: enrols("a")})
    roster = Roster(grid, timeout=5)
    assert list(roster.online(3).items()) == [("a", 9), ("b", 8), ("c", 5)]
    assert roster.online(3) == {"a": 9, "b": 8, "c": 5}
    assert len(grid.sent) == 3
    assert roster.classes() == ("cat", "dog", "owl")


def test_the_roster_waits_for_enough_clients(scripted_grid):
    grid = scripted_grid({1: enrols("a")})
    polls = []

    def node_ids():
        polls.append(None)
        if len(polls) == 3:
            grid.nodes[2] = enrols("b")
        return list(grid.nodes)

    grid.get_node_ids = node_ids
    assert Roster(grid, timeout=30).online(2) == {"a": 1, "b": 2}
    assert len(polls) == 3


def test_too_few_clients_end_the_wait_with_the_reasons(scripted_grid):
    grid = scripted_grid(
        {
            1: enrols("a"),
            2: lambda m: refusal(ConfigError("pi-2 has no images"), m),
            3: lambda m: Message(Error(2, "its app crashed"), reply_to=m),
            4: lambda m: write_metrics({"loss": 1.0}),
            5: lambda m: None,
        }
    )
    with pytest.raises(
        ConfigError, match=r"too few clients came: 1 online after 0 s, min-clients is 3"
    ) as e:
        Roster(grid, timeout=0.05).online(3)
    reasons = str(e.value).splitlines()[1:]
    assert len(reasons) == 3
    for reason in ("pi-2 has no images", "its app crashed", "reply holds no readable enrolment"):
        assert any(line.startswith(f"  refused: {reason}") for line in reasons)


def refused_once():
    """A client that is turned away when it is first asked, and then enrols."""
    answers = iter([lambda m: refusal(ConfigError("no images yet"), m), enrols("a")])
    return {1: lambda message: next(answers)(message)}


def test_a_client_that_was_refused_is_asked_again(scripted_grid, monkeypatch):
    monkeypatch.setattr(sampling, "_PATIENCE_SECONDS", 0.02)
    assert Roster(scripted_grid(refused_once()), timeout=10).online(1) == {"a": 1}


def test_a_client_that_was_refused_and_comes_back_is_asked_at_once(scripted_grid, monkeypatch):
    monkeypatch.setattr(sampling, "_PATIENCE_SECONDS", 1000.0)
    grid = scripted_grid(refused_once() | {2: enrols("b")})
    roster = Roster(grid, timeout=5)
    assert roster.online(1) == roster.online(1) == {"b": 2}
    away = grid.nodes.pop(1)
    assert roster.online(1) == {"b": 2}
    grid.nodes[1] = away
    assert roster.online(1) == {"a": 1, "b": 2}


class Slow:
    """A grid on which some nodes' answers come only once they are let through."""

    def __init__(self, grid, *nodes):
        self.grid, self.nodes, self.pull = grid, set(nodes), grid.pull_messages
        grid.pull_messages = self.pull_messages

    def pull_messages(self, message_ids):
        there = {
            m.metadata.message_id
            for m in self.grid.sent
            if m.metadata.dst_node_id not in self.nodes
        }
        return self.pull(there & message_ids)


def test_an_introduction_that_took_longer_than_was_waited_for_counts_without_another(
    scripted_grid, monkeypatch
):
    monkeypatch.setattr(sampling, "_PATIENCE_SECONDS", 0.05)
    grid = scripted_grid({1: enrols("near"), 2: enrols("far")})
    slow = Slow(grid, 2)
    roster = Roster(grid, timeout=5)
    assert roster.online(1) == {"near": 1}
    monkeypatch.setattr(sampling, "_PATIENCE_SECONDS", 1000.0)
    assert roster.online(1) == {"near": 1}
    slow.nodes.clear()
    asked = len(grid.sent)
    assert roster.online(1) == {"far": 2, "near": 1}
    assert len(grid.sent) == asked


def test_a_client_that_was_asked_twice_and_answers_both_is_no_second_of_its_name(
    scripted_grid, monkeypatch
):
    monkeypatch.setattr(sampling, "_PATIENCE_SECONDS", 0.0)
    grid = scripted_grid({1: enrols("near"), 2: enrols("far")})
    slow = Slow(grid, 2)
    roster = Roster(grid, timeout=0.05)
    roster.online(1), roster.online(1)
    assert [m.metadata.dst_node_id for m in grid.sent].count(2) == 2
    slow.nodes.clear()
    assert roster.online(2) == {"far": 2, "near": 1}
    with pytest.raises(ConfigError) as error:
        roster.online(3)
    assert "refused" not in str(error.value)


def test_of_those_who_never_answer_the_last_are_remembered(scripted_grid, monkeypatch):
    monkeypatch.setattr(sampling, "_PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(sampling, "_REMEMBERED", 3)
    grid = scripted_grid({1: enrols("near"), 2: enrols("far")})
    Slow(grid, 2)
    roster = Roster(grid, timeout=0.02)
    for _ in range(8):
        roster.online(1)
    asked = [m.metadata.message_id for m in grid.sent if m.metadata.dst_node_id == 2]
    assert len(asked) > 3
    assert list(roster._questions) == asked[-3:]


def test_a_client_that_was_refused_is_not_asked_over_and_over(scripted_grid):
    grid = scripted_grid(refused_once())
    with pytest.raises(ConfigError, match=r"min-clients is 1.*\n  refused: no images yet$"):
        Roster(grid, timeout=0.1).online(1)
    assert len(grid.sent) == 1


def test_a_node_that_takes_no_part_is_told_with_its_reason_until_it_does_or_is_gone(
    scripted_grid, monkeypatch
):
    monkeypatch.setattr(sampling, "_PATIENCE_SECONDS", 0.0)
    has_images = False

    def attic(message):
        if has_images:
            return write_enrolment(Enrolment("attic", 10, ("cat",)))
        return refusal(ConfigError("attic: /images holds no images"), message)

    grid = scripted_grid({1: enrols("cellar"), 2: attic})
    roster = Roster(grid, timeout=5)
    roster.online(1)
    assert roster.absent == {"node 2": "attic: /images holds no images"}
    has_images = True
    assert roster.online(2).keys() == {"attic", "cellar"}
    assert roster.absent == {}


def test_a_refusal_is_told_while_others_are_still_waited_for(scripted_grid):
    told = []
    refuses = {2: lambda m: refusal(ConfigError("pi-2: /images holds no images"), m)}
    grid = scripted_grid({1: enrols("a"), 3: enrols("far")} | refuses)
    slow = Slow(grid, 3)

    def tell(lines):
        told.append(lines)
        if len(lines) == 2:  # only now does the last one answer
            slow.nodes.clear()

    assert Roster(grid, timeout=30, tell=tell).online(2) == {"a": 1, "far": 3}
    assert told[0] == ["waiting for clients: 0 of 2"]
    assert ["waiting for clients: 1 of 2", "refused: pi-2: /images holds no images"] in told
    assert told[-1] == ["refused: pi-2: /images holds no images"]


def test_what_is_told_of_a_refusal_is_one_printable_line(scripted_grid):
    told = []
    reason = "Traceback\n …\nOSError: \x1b[2Jpi-2 is full"
    grid = scripted_grid({1: enrols("a"), 2: lambda m: Message(Error(2, reason), reply_to=m)})
    Roster(grid, timeout=5, tell=told.append).online(1)
    assert told[-1] == ["refused: OSError: [2Jpi-2 is full"]


def test_a_client_that_is_gone_is_not_online(scripted_grid):
    grid = scripted_grid({1: enrols("a"), 2: enrols("b")})
    roster = Roster(grid, timeout=5)
    roster.online(2)
    del grid.nodes[1]
    assert roster.online(1) == {"b": 2}


def test_a_client_that_comes_back_keeps_its_name(scripted_grid):
    grid = scripted_grid({1: enrols("a"), 2: enrols("b")})
    roster = Roster(grid, timeout=5)
    roster.online(2)
    grid.nodes = {2: grid.nodes[2], 77: enrols("a")}
    assert roster.online(2) == {"a": 77, "b": 2}


def test_a_second_client_of_one_name_is_turned_away(scripted_grid):
    grid = scripted_grid({1: enrols("a"), 2: enrols("a"), 3: enrols("b")})
    text = "refused: a second client calls itself a; give every device a name of its own"
    with pytest.raises(ConfigError, match=text):
        Roster(grid, timeout=0.05).online(3)


def test_a_reply_counts_for_the_node_that_was_asked_not_for_the_one_it_names(scripted_grid):
    def forges(message):
        reply = Message(enrols("a")(message), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = 999
        return reply

    assert Roster(scripted_grid({1: forges}), timeout=5).online(1) == {"a": 1}


HOSTILE_ENROLMENTS = {
    "long name": (enrols("x" * 10_000_000), "an enrolment has 1000.* bytes, 1048576 at most are"),
    "name of 300": (enrols("x" * 300), "a client is called 'x{40}'; a name has 1 to 256 printable"),
    "no name": (enrols(" "), "a client is called ' '; a name has"),
    "cursor": (enrols("a\x1b[2J"), r"a client is called 'a.x1b\[2J'; a name has"),
    "class": (enrols("b", ("cat", "d\nog")), r"a class is called 'd.nog'; a name has"),
    "classes": (
        enrols("b", tuple(map(str, range(10_001)))),
        "client b has 10001 classes, 10000 at most are taken; check the labels",
    ),
    "images": (
        lambda m: write_enrolment(Enrolment("b", -1, ())),
        "client b has -1 images; expected 0 or more",
    ),
    "name is a list": (
        lambda m: write_enrolment(Enrolment(["b"], 1, ())),
        "reply holds no readable enrolment",
    ),
    "half a character": (enrols("\ud800"), "enrolment cannot be read"),
    "endless reason": (
        lambda m: Message(Error(2, "x" * 10_000_000 + "its app crashed"), reply_to=m),
        "x{500}its app crashed",
    ),
    "no reason": (lambda m: Message(Error(2, None), reply_to=m), "None"),
}


@pytest.mark.parametrize(("hostile", "text"), HOSTILE_ENROLMENTS.values(), ids=HOSTILE_ENROLMENTS)
def test_a_hostile_enrolment_is_turned_away_with_a_short_reason(scripted_grid, hostile, text):
    roster = Roster(scripted_grid({1: hostile, 2: enrols("a")}), timeout=0.05)
    assert roster.online(1) == {"a": 2}
    assert roster.classes() == ("cat", "dog")
    with pytest.raises(ConfigError, match=text) as error:
        roster.online(2)
    assert len(str(error.value)) < 1500


def test_reasons_that_are_remembered_are_few(scripted_grid):
    def refuses(i):
        return lambda m: refusal(ConfigError(f"reason {i}"), m)

    roster = Roster(scripted_grid({i: refuses(i) for i in range(300)}), timeout=0.05)
    with pytest.raises(ConfigError) as error:
        roster.online(1)
    assert len(str(error.value).splitlines()) == 101


def test_a_silent_node_is_asked_ever_more_seldom(scripted_grid, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(sampling.time, "monotonic", lambda: clock[0])
    grid = scripted_grid({1: enrols("a"), 2: lambda m: None})
    grid.answers_at_once = True  # the clock stands still
    roster = Roster(grid, timeout=5)
    asked = []
    for minute in range(1000):
        clock[0] = 60.0 * minute
        before = len(grid.sent)
        roster.online(1)
        if any(m.metadata.dst_node_id == 2 for m in grid.sent[before:]):
            asked.append(minute)
    assert asked[:8] == [0, 1, 3, 7, 15, 31, 63, 127]
    assert set(np.diff(asked[7:])) == {64}
