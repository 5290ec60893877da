import faulthandler
import gc
import os
import signal
import tempfile
import threading
import time
from functools import partial

import numpy as np
import psutil
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import ServerApp
from flwr.supercore.task_identity import TaskIdentity

from fleet.errors import ConfigError
from fleet.message import read_metrics, write_metrics
from simulations.footprint import footprint
from simulations.local_clients import SERVER_NODE_ID, LocalClients
from simulations.local_engine import LocalGrid, run_local
from simulations.workers import WorkerPool, read_workers
from tests.forked import Forked


@pytest.fixture(autouse=True)
def task_identity(monkeypatch):
    for field in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, field, 1)


@pytest.fixture
def grid_of():
    """Makes grids with workers, and ends them."""
    grids = []

    def make(answer, clients=4, workers=2, **options):
        app = ClientApp()

        @app.train()
        def train(message, context):
            return Message(write_metrics(answer(message, context)), reply_to=message)

        grids.append(LocalGrid(app, clients, {"rounds": 3}, workers=workers, **options))
        return grids[-1]

    yield make
    for grid in grids:
        grid.close()


def number(context):
    return context.node_config["partition-id"]


def questions(grid, nodes=None):
    return [Message(RecordDict(), node, "train") for node in nodes or grid.get_node_ids()]


def answers(replies, key="answer"):
    return [read_metrics(reply.content)[key] for reply in replies]


def children():
    return psutil.Process().children()


def test_replies_come_in_the_order_asked_though_the_first_client_is_the_slowest(grid_of):
    def answer(message, context):
        time.sleep(0.2 if number(context) == 0 else 0)
        return {"answer": number(context), "at": time.monotonic(), "process": os.getpid()}

    grid = grid_of(answer)
    replies = list(grid.send_and_receive(questions(grid)))
    assert answers(replies) == [0, 1, 2, 3]
    ended = answers(replies, "at")
    assert ended[1] < ended[0]
    assert os.getpid() not in answers(replies, "process")
    assert len(set(answers(replies, "process"))) == 2


def test_workers_are_kept_from_round_to_round_and_end_with_the_grid(grid_of):
    before = children()
    grid = grid_of(lambda message, context: {"answer": os.getpid()}, workers=3)
    assert children() == before  # nobody was asked yet
    seen = {pid for _ in range(4) for pid in answers(grid.send_and_receive(questions(grid)))}
    ours = {process.pid for process in children()} - {process.pid for process in before}
    assert seen <= ours and len(ours) == 3
    grid.close()
    assert children() == before


@pytest.fixture
def thawed():
    """Nothing is left out of collections, as in a process that is no test's."""
    gc.unfreeze()
    yield
    gc.freeze()


@pytest.mark.slow  # it is why collections leave out what is there, which the next test holds
def test_pages_that_workers_share_are_not_copied_by_a_collection(grid_of, thawed):
    objects = [[i] for i in range(400_000)]  # a collection writes to the head of each
    grid = grid_of(lambda message, context: {"answer": 1})
    grid.send_and_receive(questions(grid))
    before = footprint()
    gc.collect()
    assert before.processes >= 3
    assert footprint().anonymous - before.anonymous < len(objects) * 16 < 2**24
    grid.close()
    assert not gc.get_freeze_count()


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_is_there_before_the_first_client_is_left_out_of_collections(grid_of, thawed, workers):
    grid = grid_of(lambda message, context: {"answer": gc.get_freeze_count()}, workers=workers)
    assert not gc.get_freeze_count()
    replies = grid.send_and_receive(questions(grid))
    assert all(count > 10_000 for count in answers(replies))
    grid.close()
    assert not gc.get_freeze_count()


def test_what_somebody_else_has_frozen_stays_so(grid_of):
    mark = [object()]
    assert not is_frozen(mark)
    gc.freeze()
    grid = grid_of(lambda message, context: {"answer": 1})
    grid.send_and_receive(questions(grid))
    grid.close()
    assert is_frozen(mark)


def is_frozen(thing):
    """Whether collections leave it out; a count of all such sinks as others are released."""
    return not any(one is thing for one in gc.get_objects())


@pytest.mark.parametrize("by_somebody_else", [False, True])
def test_what_is_frozen_is_not_counted_at_every_push(
    grid_of, thawed, monkeypatch, by_somebody_else
):
    counts, count = [], gc.get_freeze_count
    monkeypatch.setattr(gc, "get_freeze_count", lambda: counts.append(count()) or counts[-1])
    if by_somebody_else:
        gc.freeze()
    grid = grid_of(lambda message, context: {"answer": 1})
    for _ in range(3):
        grid.send_and_receive(questions(grid))
    grid.close()
    assert [number > 0 for number in counts] == [by_somebody_else]


def test_there_are_never_more_workers_than_clients(grid_of):
    before = len(children())
    grid = grid_of(lambda message, context: {"answer": 1}, clients=2, workers=7)
    grid.send_and_receive(questions(grid))
    assert len(children()) - before == 2


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_clients_state_is_there_whichever_worker_runs_it(grid_of, workers):
    def count(message, context):
        seen = context.state.setdefault("seen", ConfigRecord({"n": 0, "pids": []}))
        seen["n"] += 1
        seen["pids"] = [*seen["pids"], os.getpid()]
        time.sleep(0.002 * (7 * number(context) + seen["n"]) % 0.01)
        own = np.full(number(context), seen["n"])  # of every client another size
        context.state["own"] = ArrayRecord([own])
        return {"answer": seen["n"] * 10 + number(context), "processes": len(set(seen["pids"]))}

    grid = grid_of(count, clients=5, workers=workers)
    rounds = [list(grid.send_and_receive(questions(grid))) for _ in range(6)]
    assert [answers(replies) for replies in rounds] == [
        [n * 10 + client for client in range(5)] for n in range(1, 7)
    ]
    assert max(answers(rounds[-1], "processes")) == min(workers, 2) or workers == 3


def test_messages_to_one_client_are_answered_in_turn_whatever_is_pulled_first(grid_of):
    def count(message, context):
        seen = context.state.setdefault("seen", ConfigRecord({"n": 0}))
        time.sleep(0.02)
        seen["n"] += 1
        return {"answer": seen["n"]}

    grid = grid_of(count, clients=3, workers=3)
    asked = questions(grid, [2, 2, 3, 2])
    ids = list(grid.push_messages(asked))
    assert [answers(grid.pull_messages({ids[i]})) for i in (3, 0, 2, 1)] == [[3], [1], [1], [2]]


def test_what_a_worker_ran_that_was_killed_is_run_again_as_if_nothing_had_happened(
    grid_of, tmp_path
):
    def answer(message, context):
        seen = context.state.setdefault("seen", ConfigRecord({"n": 0}))
        seen["n"] += 1
        once = tmp_path / f"{number(context)}-{message.metadata.group_id}"
        if number(context) in (1, 2) and message.metadata.group_id in "23" and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"answer": seen["n"]}

    grid = grid_of(answer)
    before = len(children())
    for server_round in "123":
        asked = [
            Message(RecordDict(), node, "train", group_id=server_round)
            for node in grid.get_node_ids()
        ]
        replies = list(grid.send_and_receive(asked))
        assert [r.metadata.dst_node_id for r in replies] == [SERVER_NODE_ID] * 4
        assert answers(replies) == [int(server_round)] * 4
    assert len([*tmp_path.iterdir()]) == 4  # so often one was killed
    assert len(children()) - before == 2


def test_a_client_whose_workers_are_killed_twice_has_an_error_as_its_reply(grid_of):
    def answer(message, context):
        seen = context.state.setdefault("seen", ConfigRecord({"n": 0}))
        seen["n"] += 1
        if number(context) == 1 and message.metadata.group_id == "2":
            os.kill(os.getpid(), signal.SIGKILL)
        return {"answer": seen["n"]}

    grid = grid_of(answer)
    before = len(children())
    replies = []
    for server_round in "123":
        asked = [
            Message(RecordDict(), node, "train", group_id=server_round)
            for node in grid.get_node_ids()
        ]
        replies.append(list(grid.send_and_receive(asked)))
    bad = replies[1].pop(1)
    assert bad.error.code == ErrorCode.CLIENT_APP_CRASHED
    assert bad.error.reason == (
        "two worker processes that ran client 1 ended, one after the other; the last was killed "
        "(SIGKILL), as the system does where memory runs out; use fewer workers"
    )
    # What it had changed of its state by then is as it was.
    assert [answers(r) for r in replies] == [[1, 1, 1, 1], [2, 2, 2], [3, 2, 3, 3]]
    assert len(children()) - before == 2


def crash():
    faulthandler.disable()  # pytest's would print the stack of what is meant to crash
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (lambda: os._exit(7), "ended with exit code 7; it called exit, or a library did"),
        (crash, "crashed (SIGSEGV); run it with workers 1"),
    ],
)
def test_how_a_worker_ended_is_in_the_reply(grid_of, end, reason):
    grid = grid_of(lambda message, context: end())
    replies = list(grid.send_and_receive(questions(grid)))
    assert len(replies) == 4
    assert all(reason in reply.error.reason for reply in replies)


def test_a_worker_that_dies_between_messages_costs_no_reply(grid_of):
    grid = grid_of(lambda message, context: {"answer": os.getpid()})
    (pid,) = answers(grid.send_and_receive(questions(grid, [2])))
    os.kill(pid, signal.SIGKILL)
    while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    replies = answers(grid.send_and_receive(questions(grid)))
    assert len(replies) == 4 and pid not in replies


def test_what_a_client_raises_comes_with_its_traceback(grid_of):
    def answer(message, context):
        if number(context) == 2:
            raise ValueError("out of paper")
        return {"answer": 5}

    grid = grid_of(answer)
    *good, bad, last = grid.send_and_receive(questions(grid))
    assert answers([*good, last]) == [5, 5, 5]
    assert bad.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert "Traceback" in bad.error.reason and "in answer" in bad.error.reason
    assert "ValueError: out of paper" in bad.error.reason


def test_a_reply_that_cannot_be_sent_is_an_error(grid_of):
    grid = LocalGrid(lambda message, context: threading.Lock(), 2, {}, workers=2)
    try:
        for reply in grid.send_and_receive(questions(grid)):
            assert "reply cannot be sent to the server's process" in reply.error.reason
    finally:
        grid.close()


def test_a_message_that_was_measured_can_be_sent(grid_of):
    from fleet.message import content_bytes, write_bytes

    def answer(message, context):
        return {"answer": len(message.content["tensors"]["packed"].data)}

    grid = grid_of(answer)
    content = write_bytes(bytes(1000))
    content_bytes(content)  # leaves views of the array in it, which do not pickle
    (reply,) = grid.send_and_receive([Message(content, 2, "train")])
    assert answers([reply]) == [1000 + 128]


def test_workers_run_ahead_a_few_replies_and_no_further(grid_of, tmp_path):
    def answer(message, context):
        if number(context) == 0:
            while not (tmp_path / "go").exists():
                time.sleep(0.01)
        (tmp_path / str(number(context))).touch()
        return {"answer": number(context)}

    grid = grid_of(answer, clients=60)
    told = []

    def look():
        deadline = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.5)  # for those who would run on
        told.append(len(list(tmp_path.iterdir())))
        (tmp_path / "go").touch()

    threading.Thread(target=look).start()
    replies = answers(grid.send_and_receive(questions(grid)))
    assert replies == list(range(60))
    assert 8 <= told[0] <= 17


def test_a_worker_has_one_thread_and_random_numbers_of_its_own(grid_of):
    def answer(message, context):
        time.sleep(0.02)
        return {"threads": torch.get_num_threads(), "drawn": float(torch.rand(1)[0])}

    grid = grid_of(answer)
    replies = list(grid.send_and_receive(questions(grid)))
    assert answers(replies, "threads") == [1] * 4
    assert len(set(answers(replies, "drawn"))) == 4


def test_a_client_can_have_processes_of_its_own(grid_of):
    def answer(message, context):
        data = torch.utils.data.TensorDataset(torch.arange(6))
        loader = torch.utils.data.DataLoader(data, num_workers=1)
        return {"answer": int(sum(x[0] for (x,) in loader))}

    grid = grid_of(answer, clients=2)
    assert answers(grid.send_and_receive(questions(grid))) == [15, 15]


def test_workers_that_start_afresh_take_an_app_that_can_be_imported(tmp_path, monkeypatch):
    (tmp_path / "app_for_workers.py").write_text(
        "from flwr.app import Message\n"
        "from fleet.message import write_metrics\n"
        "def app(message, context):\n"
        "    answer = context.node_config['partition-id'] ** 2\n"
        "    return Message(write_metrics({'answer': answer}), reply_to=message)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import app_for_workers

    pool = WorkerPool(LocalClients(app_for_workers.app, 3, {}, tmp_path), 1, "spawn")
    try:
        asked = [Message(RecordDict(), node, "train") for node in (2, 3, 4)]
        for i, message in enumerate(asked):
            message.metadata.__dict__["_message_id"] = str(i)
            pool.ask(message)
        assert [answers([pool.answer(message)]) for message in asked] == [[0], [1], [4]]
    finally:
        pool.close()


def test_an_app_that_cannot_be_sent_to_a_worker_is_refused(tmp_path):
    pool = WorkerPool(LocalClients(lambda message, context: 0, 3, {}, tmp_path), 2, "spawn")
    text = "this ClientApp cannot be sent to worker processes .*; define it in a module of its own"
    with pytest.raises(ConfigError, match=text):
        pool.ask(Message(RecordDict(), 2, "train"))


def run_in(folder, seconds):
    """A run whose clients take so long, with its temporary files in a folder."""
    tempfile.tempdir = str(folder)
    server = ServerApp()

    @server.main()
    def main(grid, context):
        grid.push_messages(questions(grid))
        list(grid.send_and_receive(questions(grid)))

    def client(message, context):
        os.write(1, b"begun\n")  # in one piece, as another process writes there too
        time.sleep(seconds)

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    run_local(server, client, {}, 4, workers=2)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_a_run_that_is_ended(how, tmp_path):
    seconds = 60 if how is signal.SIGINT else 2
    with (tmp_path / "errors").open("w") as errors:
        run = Forked(partial(run_in, tmp_path, seconds), errors)
    try:
        assert run.stdout.readline() == run.stdout.readline() == "begun\n"
        family = psutil.Process(run.pid).children(recursive=True)
        assert len(family) == 2
        if how is signal.SIGINT:
            os.killpg(run.pid, how)  # as a terminal does, workers and all
        else:
            os.kill(run.pid, how)
        assert run.wait(timeout=30) != 0  # long before a client's minute is over
        # Killed itself, a run can end nobody: workers end after the client that they run.
        _, alive = psutil.wait_procs(family, timeout=0.1 if how is signal.SIGINT else 30)
        assert not alive
        if how is signal.SIGINT:
            assert not list(tmp_path.glob("fleet-*"))
    finally:
        run.kill()
        run.wait()


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "two", "", None, "1.5"])
def test_a_number_of_workers_that_is_none_is_refused(value):
    text = f"workers must be a whole number from 1 on, or auto; got {value!r}"
    with pytest.raises(ConfigError, match=text.replace(".", r"\.")):
        read_workers(value)


def test_workers_are_a_number_or_one_a_core():
    assert [read_workers(value) for value in (1, 3, "2")] == [1, 3, 2]
    assert read_workers("auto") == len(psutil.Process().cpu_affinity())
