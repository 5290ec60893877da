import pytest
from flwr.app import Context, Message, RecordDict

from clients.client_app import app
from fleet.backbones import load_backbone
from fleet.codec import Versions
from fleet.config import default_settings
from fleet.message import (
    REFUSED,
    Task,
    read_enrolment,
    read_metrics,
    read_token,
    read_update,
    write_state,
    write_task,
)
from fleet.plan import make_plan
from fleet.state import capture

SETTINGS = default_settings() | {
    "backbone": "mobilenet_v3_small",
    "weights": "none",
    "image-size": 32,
    "train-examples": 60,
    "partition": "iid",
    "local-epochs": 1,
    "blocks": 1,
}


@pytest.fixture(scope="module")
def task():
    backbone = load_backbone(
        "mobilenet_v3_small", num_classes=10, image_size=32, weights="none", seed=0
    )
    plan = make_plan(backbone, method="mobiletl", blocks=1)
    state = write_state(Versions(capture(backbone.model, plan), "float32").download(None))
    task = Task(plan.summary(), tuple("0123456789"), 1, run="ab12", token="cafe")
    return plan, RecordDict({**write_task(task), **state})


@pytest.fixture(autouse=True)
def memory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEET_STATE", str(tmp_path / "state"))


@pytest.fixture
def ask(task_identity):
    """Function that sends content to the app and returns its reply."""

    def ask(kind, content=None, node=None, settings=SETTINGS):
        node = {"partition-id": 2, "num-partitions": 3} if node is None else node
        context = Context(
            run_id=1, node_id=5, node_config=node, state=RecordDict(), run_config=settings
        )
        return app(Message(content or RecordDict(), 5, kind), context)

    return ask


def test_query_introduces_the_client(ask):
    enrolment = read_enrolment(ask("query").content)
    assert (enrolment.name, enrolment.num_examples) == ("client-0002", 18)
    assert enrolment.classes == tuple("0123456789")


def test_train_replies_with_an_update(ask, task):
    plan, content = task
    reply = ask("train", content).content
    payload, metrics = read_update(reply)
    assert read_token(reply) == "cafe"
    assert payload.plan_digest == plan.digest
    assert (metrics["num-examples"], metrics["blocks"]) == (18, 1)
    assert payload.nbytes == plan.nbytes + 4 * (len(plan.specs) - 1)


def test_evaluate_replies_with_numbers_alone(ask, task):
    reply = ask("evaluate", task[1]).content
    assert set(reply) == {"metrics", "header"}
    assert read_token(reply) == "cafe"
    metrics = read_metrics(reply)
    assert metrics.keys() == {"num-examples", "loss", "accuracy"}
    assert metrics["num-examples"] == 2


@pytest.mark.parametrize("kind", ["query", "train", "evaluate"])
def test_what_goes_wrong_on_purpose_is_answered_with_its_reason(ask, task, kind):
    reply = ask(kind, task[1], node={})
    assert reply.error.code == REFUSED
    name = "node-5: " if kind == "query" else ""  # the server does not know it yet
    assert reply.error.reason.startswith(f"{name}this client knows no data")


def test_a_message_that_is_no_task_is_answered_with_its_reason(ask):
    assert "message holds no readable task" in ask("train").error.reason


def test_a_setting_that_the_client_does_not_know_is_answered_with_its_reason(ask):
    reply = ask("query", settings=SETTINGS | {"colour": "red"})
    assert reply.error.reason.startswith("unknown setting colour; fleet simulate --help lists the ")


def test_faults_of_the_program_are_not_hidden(ask, monkeypatch):
    monkeypatch.setattr("clients.client_app.enrol", lambda client: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ask("query")
