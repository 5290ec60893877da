import math

import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fleet.message import Task, write_task
from simulations.faults import dropping
from simulations.local_engine import Exchange
from tests.many import many


@pytest.fixture(autouse=True)
def task_identity(monkeypatch):
    for field in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, field, 1)


def round_of(server_round, clients=20, kind="train"):
    """A cohort's exchanges; what the replies hold does not matter."""
    content = write_task(Task({}, (), server_round))
    for client in range(clients):
        message = Message(content, client + 2, kind)
        yield Exchange(client, message, Message(RecordDict(), reply_to=message))


def arrived(share, seed, server_round, order=1):
    exchanges = list(round_of(server_round))[::order]
    return [exchange.client for exchange in dropping(share, seed)(exchanges)]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.8])
def test_the_share_of_replies_is_lost_and_every_client_s_alike(share):
    rounds = [arrived(share, 0, r) for r in range(1, 201)]
    lost = 20 * 200 - sum(map(len, rounds))
    assert abs(lost - 4000 * share) < 4 * math.sqrt(4000 * share * (1 - share))
    times = [sum(client in clients for clients in rounds) for client in range(20)]
    sigma = math.sqrt(200 * share * (1 - share))
    assert max(abs(n - 200 * (1 - share)) for n in times) < 4 * sigma


def test_seed_round_and_client_decide_and_nothing_else():
    assert arrived(0.5, 0, 1) == arrived(0.5, 0, 1) == arrived(0.5, 0, 1, order=-1)[::-1]
    others = [arrived(0.5, 1, 1), arrived(0.5, 0, 2), arrived(0.5, 1, 2)]
    assert len({tuple(clients) for clients in [arrived(0.5, 0, 1), *others]}) == 4


@many("server_round", range(1, 20))
def test_what_is_lost_at_a_smaller_share_is_lost_at_a_larger_one(server_round):
    assert set(arrived(0.3, 0, server_round)) >= set(arrived(0.6, 0, server_round))


@pytest.mark.parametrize("kind", ["query", "evaluate"])
def test_other_messages_are_answered(kind):
    exchanges = list(round_of(1, kind=kind))
    assert list(dropping(0.9, 0)(exchanges)) == exchanges
