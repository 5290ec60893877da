"""A device that is asked for a round again offers the update that it has made."""

import dataclasses
import json

import pytest

from clients import local_update
from clients.client import Client
from clients.journal import note, noted
from clients.local_update import train_task
from clients.memory import ClientMemory
from fleet.backbones import load_backbone
from fleet.codec import Download, Payload, Versions
from fleet.config import default_settings, read_config
from fleet.message import Task
from fleet.plan import make_plan
from fleet.state import TrainableState, capture

pytestmark = pytest.mark.usefixtures("quick_runs")

TASK = Task({"digest": "d" * 64}, ("cat", "dog"), 3, "0f", token="first", acknowledged=2)
DOWNLOAD = Download(("a" * 16, "b" * 16), (Payload("int8", "d" * 64, b"step"),))
PAYLOAD = Payload("int4+feedback", "e" * 64, bytes(range(256)))
METRICS = {"num-examples": 7, "loss": 0.1 + 0.2, "peak-bytes": 2**40, "kelvin": float("nan")}


@pytest.fixture
def memory(tmp_path):
    return ClientMemory(tmp_path, "0f", "pi-1")


def test_what_was_noted_comes_back_as_it_was(memory):
    assert noted(memory, TASK, DOWNLOAD) is None
    note(memory, TASK, DOWNLOAD, PAYLOAD, METRICS)
    payload, metrics = noted(memory, TASK, DOWNLOAD)
    assert payload == PAYLOAD
    assert json.dumps(metrics) == json.dumps(METRICS)
    assert [type(value) for value in metrics.values()] == [int, float, int, float]


def test_another_token_is_the_same_task(memory):
    note(memory, TASK, DOWNLOAD, PAYLOAD, METRICS)
    assert noted(memory, dataclasses.replace(TASK, token="second"), DOWNLOAD) is not None


@pytest.mark.parametrize(
    "change",
    [{"server_round": 4}, {"plan": {"digest": "f" * 64}}, {"acknowledged": 1}],
)
def test_another_task_is_trained(memory, change):
    note(memory, TASK, DOWNLOAD, PAYLOAD, METRICS)
    assert noted(memory, dataclasses.replace(TASK, **change), DOWNLOAD) is None


def test_another_state_is_trained_whatever_steps_lead_to_the_same(memory):
    note(memory, TASK, DOWNLOAD, PAYLOAD, METRICS)
    assert noted(memory, TASK, Download(("b" * 16,), DOWNLOAD.payloads)) is not None
    assert noted(memory, TASK, Download(("b" * 16, "c" * 16), DOWNLOAD.payloads)) is None


def test_the_next_update_takes_the_place_of_the_last(memory, tmp_path):
    note(memory, TASK, DOWNLOAD, PAYLOAD, METRICS)
    later = dataclasses.replace(TASK, server_round=4)
    note(memory, later, DOWNLOAD, dataclasses.replace(PAYLOAD, data=b"new"), METRICS)
    assert noted(memory, TASK, DOWNLOAD) is None
    assert noted(memory, later, DOWNLOAD)[0].data == b"new"
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


# Whole rounds of a device


@pytest.fixture
def device(image_folder, monkeypatch, tmp_path):
    """A device with images of its own, and a count of its trainings."""
    monkeypatch.setenv("FLEET_STATE", str(tmp_path / "state"))
    settings = {
        "backbone": "mobilenet_v3_small",
        "weights": "none",
        "image-size": 32,
        "local-epochs": 1,
        "codec-up": "int4+feedback",
        "codec-down": "int8",
    }
    config = read_config(default_settings() | settings)
    client = Client.of(1, {"name": "pi-1", "data": image_folder("cat", "dog")}, config)
    trained = []
    plain = local_update.train_locally
    monkeypatch.setattr(
        local_update, "train_locally", lambda *a, **k: trained.append(1) or plain(*a, **k)
    )
    return client, trained


@pytest.fixture
def ask(device):
    """Function of a round, token and run → task and download."""
    backbone = load_backbone(
        "mobilenet_v3_small", num_classes=2, image_size=32, weights="none", classes=("cat", "dog")
    )
    plan = make_plan(backbone, method="mobiletl", blocks=1)
    versions = Versions(TrainableState(plan, capture(backbone.model, plan).tensors), "float32")

    def ask(server_round, token="t", run="0f"):
        task = Task(plan.summary(), ("cat", "dog"), server_round, run, token)
        return task, versions.download(None)

    return ask


def test_a_round_that_is_asked_for_again_is_trained_once(device, ask):
    client, trained = device
    first = train_task(client, *ask(1, "one"))
    again = train_task(client, *ask(1, "two"))
    assert trained == [1]
    assert again == first
    train_task(client, *ask(2))
    assert trained == [1, 1]


def test_a_device_that_was_killed_before_it_noted_trains_again_to_the_same_update(
    device, ask, monkeypatch
):
    client, trained = device
    train_task(client, *ask(1))
    with monkeypatch.context() as patch:

        def killed(*arguments):
            raise KeyboardInterrupt

        patch.setattr(local_update, "note", killed)
        with pytest.raises(KeyboardInterrupt):
            train_task(client, *ask(2))
    payload, _ = train_task(client, *ask(2))
    assert trained == [1, 1, 1]
    never_killed = [train_task(client, *ask(n, run="1f"))[0] for n in (1, 2)]
    assert payload == never_killed[1]


def test_a_simulated_client_notes_nothing(device, ask, tmp_path):
    client, trained = device
    node = client.node_config | {"partition-id": 0, "num-partitions": 1}
    simulated = dataclasses.replace(client, node_config=node)
    first, _ = train_task(simulated, *ask(1))
    again, _ = train_task(simulated, *ask(1))
    assert trained == [1, 1]
    assert first == again  # what it left out of the first is not in the second
    assert not list(tmp_path.rglob("journal*"))
    assert len(list(tmp_path.rglob("feedback-*"))) == 1
