from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import ServerApp
from flwr.supercore.task_identity import TaskIdentity

from fleet.message import read_metrics, write_metrics
from simulations.local_engine import LocalGrid, run_local

REPO = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def task_identity(monkeypatch):
    for field in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, field, 1)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


def app_of(answer):
    """A ClientApp whose train handler replies with the number that `answer` gives."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(write_metrics({"answer": answer(message, context)}), reply_to=message)

    return app


def partition_of(message, context):
    return context.node_config["partition-id"]


def questions(grid):
    return [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]


def numbers(replies):
    return [read_metrics(reply.content)["answer"] for reply in replies]


def test_every_client_is_a_partition_and_answers_in_turn():
    grid = LocalGrid(app_of(partition_of), 4, {})
    asked = questions(grid)
    replies = list(grid.send_and_receive(asked))
    assert numbers(replies) == [0, 1, 2, 3]
    for question, reply in zip(asked, replies, strict=True):
        assert reply.metadata.reply_to_message_id == question.metadata.message_id != ""
        assert reply.metadata.src_node_id == question.metadata.dst_node_id
    assert numbers(grid.send_and_receive(asked[::-1])) == [3, 2, 1, 0]


def test_message_ids_are_never_given_twice():
    grid = LocalGrid(app_of(partition_of), 3, {})
    ids = [
        reply.metadata.reply_to_message_id
        for _ in range(3)
        for reply in grid.send_and_receive(questions(grid))
    ]
    assert len(set(ids)) == 9


def test_clients_see_the_run_and_their_partition():
    seen = []

    def answer(message, context):
        seen.append((context.node_id, dict(context.node_config), dict(context.run_config)))
        return 0

    grid = LocalGrid(app_of(answer), 2, {"rounds": 3})
    grid.send_and_receive(questions(grid))
    nodes = list(grid.get_node_ids())
    assert seen == [
        (nodes[i], {"partition-id": i, "num-partitions": 2}, {"rounds": 3}) for i in range(2)
    ]


def test_a_client_keeps_its_state_between_messages():
    def count(message, context):
        seen = context.state.get("seen", write_metrics({"n": 0})["metrics"])
        seen["n"] += 1
        context.state["seen"] = seen
        return seen["n"]

    grid = LocalGrid(app_of(count), 2, {})
    (first, second), (again, _) = questions(grid), questions(grid)
    assert numbers(grid.send_and_receive([first, again, second])) == [1, 2, 1]


def test_what_a_client_raises_is_its_reply_and_the_others_go_on():
    def answer(message, context):
        if context.node_config["partition-id"] == 1:
            raise ValueError("out of paper")
        return 5

    grid = LocalGrid(app_of(answer), 3, {})
    good, bad, last = grid.send_and_receive(questions(grid))
    assert numbers([good, last]) == [5, 5]
    assert bad.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert "out of paper" in bad.error.reason
    assert TaskIdentity.node_id == 1


def test_a_message_that_the_app_has_no_handler_for_is_an_error():
    grid = LocalGrid(app_of(partition_of), 1, {})
    (reply,) = grid.send_and_receive([Message(RecordDict(), 2, "evaluate")])
    assert reply.has_error()


def test_clients_after_the_deadline_are_not_run(monkeypatch):
    ran = []
    clock = SimpleNamespace(now=0.0)  # that of a busy machine may jump over a deadline
    engine_time = SimpleNamespace(monotonic=lambda: clock.now)
    monkeypatch.setattr("simulations.local_engine.time", engine_time)

    def slow(message, context):
        ran.append(partition_of(message, context))
        clock.now += 0.2
        return 0

    grid = LocalGrid(app_of(slow), 5, {})
    replies = list(grid.send_and_receive(questions(grid), timeout=0.3))
    assert ran == [0, 1]
    assert len(replies) == 2


def test_pushed_messages_are_answered_once_when_pulled():
    grid = LocalGrid(app_of(partition_of), 3, {})
    asked = questions(grid)
    ids = list(grid.push_messages(asked))
    assert ids == [question.metadata.message_id for question in asked]
    assert [numbers(grid.pull_messages(ids[1:])) for _ in range(2)] == [[1], [2]]
    assert numbers(grid.pull_messages(ids)) == [0]
    assert list(grid.pull_messages([*ids, "none such"])) == []


def test_progress_is_told_after_every_reply():
    told = []
    grid = LocalGrid(app_of(partition_of), 3, {}, lambda *counts: told.append(counts))
    grid.send_and_receive(questions(grid))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_a_run_hands_grid_and_settings_to_the_server_app():
    server, seen = ServerApp(), []

    @server.main()
    def main(grid, context):
        message = grid.create_message(RecordDict(), "train", list(grid.get_node_ids())[1], "1")
        seen.append((dict(context.run_config), numbers(grid.send_and_receive([message]))))

    run_local(server, app_of(partition_of), {"rounds": 3}, 2)
    assert seen == [({"rounds": 3}, [1])]


def test_what_the_server_app_raises_ends_the_run():
    server = ServerApp()

    @server.main()
    def main(grid, context):
        raise ValueError("no disk")

    with pytest.raises(ValueError, match="no disk"):
        run_local(server, app_of(partition_of), {}, 1)


def test_interferences_see_the_cohort_once_all_have_answered_and_may_lose_replies():
    answered = []

    def answer(message, context):
        answered.append(partition_of(message, context))
        return answered[-1]

    def first(exchanges):
        assert answered == [0, 1, 2, 3]
        assert [e.client for e in exchanges] == numbers(e.reply for e in exchanges) == answered
        assert all(
            e.reply.metadata.reply_to_message_id == e.message.metadata.message_id for e in exchanges
        )
        return exchanges[1:]

    grid = LocalGrid(app_of(answer), 4, {}, interferences=[first, lambda rest: rest[1:]])
    assert numbers(grid.send_and_receive(questions(grid))) == [2, 3]


def test_a_pushed_message_whose_reply_is_lost_has_an_id_all_the_same():
    grid = LocalGrid(app_of(partition_of), 3, {}, interferences=[lambda all_of: all_of[1:]])
    ids = list(grid.push_messages(questions(grid)))
    assert len(set(ids)) == 3
    assert numbers(grid.pull_messages(ids)) == [1, 2]
