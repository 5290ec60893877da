import pytest

from fleet.records import ClientReport, RoundReport
from strategies.patience import Patience

CLIENT = ClientReport(
    name="pi-1", blocks=1, num_examples=8, loss=1.0, peak_bytes=0, seconds=1.0, metrics={}
)


@pytest.fixture
def slept():
    """What a patient server slept, by round."""
    return {}


def go_through(slept, reports, rounds=500):
    patience = Patience(rounds, sleep=lambda seconds: slept.update({number: seconds}))
    for number, clients, seconds in reports:
        patience.after(
            RoundReport(
                server_round=number, accuracy=None, loss=None, clients=clients, seconds=seconds
            )
        )
    return slept


def test_rounds_that_nobody_counts_in_last_longer_and_longer(slept):
    go_through(slept, [(number, (), 0.5) for number in range(1, 10)])
    assert [slept[n] + 0.5 for n in range(1, 10)] == [5, 10, 20, 40, 80, 160, 300, 300, 300]


def test_an_update_begins_anew(slept):
    go_through(slept, [(1, (), 0.0), (2, (), 0.0), (3, (CLIENT,), 0.0), (4, (), 0.0)])
    assert slept == {1: 5, 2: 10, 4: 5}


def test_a_round_that_waited_for_replies_has_waited_enough(slept):
    go_through(slept, [(1, (), 600.0), (2, (), 7.0), (3, (), 600.0)])
    assert slept == {2: 3.0}


def test_nothing_is_waited_for_before_the_first_round_and_after_the_last(slept):
    assert not go_through(slept, [(0, (), 0.0), (3, (), 0.0)], rounds=3)


def test_who_follows_is_told_what_is_waited_for_and_why_until_it_is_over():
    told = []
    patience = Patience(9, sleep=lambda seconds: told.append(seconds), tell=told.append)
    reasons = {f"pi-0{i}": f"its battery is at {i} %" for i in range(1, 6)}
    reasons["pi-02"] = "Traceback\n  …\nOSError: no such file"
    empty = {"accuracy": None, "loss": None, "clients": (), "seconds": 0.0}
    patience.after(RoundReport(server_round=3, refused=reasons, **empty))
    patience.after(RoundReport(server_round=4, **empty))
    assert told == [
        (
            "waiting 5 s, because no update of round 3 counts (pi-01: its battery is at 1 %; "
            "pi-02: OSError: no such file; pi-03: its battery is at 3 %; and 2 more)",
        ),
        5.0,
        (),
        ("waiting 10 s, because no update of round 4 counts",),
        10.0,
        (),
    ]
