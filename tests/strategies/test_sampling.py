import random

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
    with pytest.raises(ConfigError, match=r"1 clients are online after 0 s, min-clients is 3") as e:
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


def test_a_client_that_was_refused_is_not_asked_over_and_over(scripted_grid):
    grid = scripted_grid(refused_once())
    with pytest.raises(ConfigError, match=r"min-clients is 1.*\n  refused: no images yet$"):
        Roster(grid, timeout=0.1).online(1)
    assert len(grid.sent) == 1


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
