from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from clients.client import Client
from clients.local_data import local_data
from clients.local_update import enrol, evaluate_task, train_task
from clients.model import receive
from fleet.backbones import load_backbone
from fleet.codec import Versions, decode
from fleet.config import default_settings, read_config
from fleet.errors import ConfigError, PlanError, UpdateError
from fleet.evaluation import evaluate
from fleet.message import Task
from fleet.plan import make_plan
from fleet.state import capture

pytestmark = pytest.mark.usefixtures("quick_runs")

SMALL = {
    "backbone": "mobilenet_v3_small",
    "weights": "none",
    "image-size": 32,
    "train-examples": 60,
    "partition": "iid",
    "local-epochs": 1,
    "blocks": 2,
}
CLASSES = tuple("0123456789")
OWN = {"partition-id": 1, "num-partitions": 3}


def client(node=OWN, **settings):
    settings = {key.replace("_", "-"): value for key, value in settings.items()}
    return Client.of(7, node, read_config(default_settings() | SMALL | settings))


def server(method="mobiletl", blocks=2, classes=CLASSES, **options):
    """Backbone, plan, task and payload of the first round."""
    sizes = {"num_classes": len(classes), "image_size": 32, "weights": "none"}
    backbone = load_backbone("mobilenet_v3_small", **(sizes | options))
    plan = make_plan(backbone, method=method, blocks=blocks)
    state = capture(backbone.model, plan)
    return backbone, plan, Task(plan.summary(), classes, 1, "ab12"), whole(state)


def whole(state):
    """A download that is a state itself."""
    return Versions(state, "float32").download(None)


def received_by(download, plan):
    """The tensors that a client receives."""
    return decode(download.payloads[0], plan)


@pytest.fixture(autouse=True)
def memory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEET_STATE", str(tmp_path / "state"))


def test_a_client_is_named_by_its_configuration_its_partition_or_its_node():
    assert client({"name": "attic", "partition-id": 3}).name == "attic"
    assert client({"partition-id": 3}).name == "client-0003"
    assert client({}).name == "node-7"


@pytest.mark.parametrize(
    ("node", "widest", "expected"),
    [
        ({}, 5, 5),
        ({"blocks": 2}, 5, 2),
        ({"blocks": 9}, 5, 5),
        ({"partition-id": 0}, 5, 1),
        ({"partition-id": 1}, 5, 3),
        ({"partition-id": 5}, 5, 5),
        ({"partition-id": 5}, 2, 2),
        ({"partition-id": 0, "blocks": 4}, 5, 4),
    ],
)
def test_blocks_come_from_the_device_then_from_the_run(node, widest, expected):
    assert client(node, blocks="1,3,5").blocks(widest) == expected


def test_enrolment_says_who_has_what():
    enrolment = enrol(client())
    assert (enrolment.name, enrolment.num_examples) == ("client-0001", 18)
    assert enrolment.classes == CLASSES


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_an_update_is_what_changed_and_statistics_as_they_are(blocks):
    _, plan, task, payload = server()
    update, metrics = train_task(client(OWN | {"blocks": blocks}), task, payload)
    narrow = plan.narrow(blocks)
    delta, received = decode(update, narrow), received_by(payload, plan)
    assert metrics["blocks"] == blocks
    for spec in narrow.specs:
        if spec.role == "var":
            assert (delta[spec.name] > 0).all()
        elif spec.role == "weight" and "classifier" in spec.name:
            assert 0 < np.abs(delta[spec.name]).max() < 1
    if blocks:
        name = next(spec.name for spec in narrow.specs if spec.role == "scale")
        assert np.abs(delta[name]).max() < 0.5 < received[name].min()  # not the scale itself


def test_the_delta_leads_from_the_received_state_to_the_trained_one():
    backbone, _, task, payload = server("head", 0)
    with torch.no_grad():
        backbone.head.weight.normal_()
    plan = make_plan(backbone, method="head")
    offset = whole(capture(backbone.model, plan))
    from_zero = decode(train_task(client(learning_rate=1e-30), task, offset)[0], plan)
    assert all((np.abs(array) < 1e-20).all() for array in from_zero.values())
    moved = decode(train_task(client(), task, payload)[0], plan)
    assert any((array != 0).any() for array in moved.values())


def test_training_is_the_same_for_seed_round_and_name_and_no_other():
    _, _, task, payload = server()

    def trained(task=task, **options):
        return train_task(client(**options), task, payload)[0].data

    assert trained() == trained()
    assert trained() != trained(Task(task.plan, task.classes, 2, task.run))
    assert trained() != trained(node=OWN | {"name": "another"})


def test_a_plan_in_between_changes_nothing():
    _, _, task, payload = server("head", 0)
    before = train_task(client(), task, payload)[0]
    train_task(client(), *server("full")[2:])
    assert train_task(client(), task, payload)[0].data == before.data


def test_metrics_of_a_round():
    _, _, task, payload = server()
    _, metrics = train_task(client(), task, payload)
    assert metrics["num-examples"] == 18
    assert 1.5 < metrics["loss"] < 4  # ln 10 = 2.3 before any training
    assert metrics["peak-bytes"] > 100_000
    assert metrics["seconds"] > 0
    assert "resident-peak-bytes" in metrics


def test_evaluation_is_that_of_the_state_on_the_validation_images():
    backbone, _, task, payload = server()
    own = client(validation_fraction=0.5)
    result = evaluate_task(own, task, payload)
    _, validation = local_data(own.node_config, own.config.data, own.config.seed)
    assert result.num_examples == len(validation) == 9
    assert result.loss == pytest.approx(np.log(10), rel=1e-5)  # the head starts at even odds
    assert result == evaluate(backbone.model, validation, backbone.preprocessing)


def test_other_weights_are_refused_by_the_part_that_differs(tmp_path):
    backbone, _, task, payload = server()
    state = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    name = f"{backbone.blocks[3].name}.block.0.0.weight"
    state[name].flatten()[0] += 1
    torch.save(state, tmp_path / "other.pth")
    own = client(OWN | {"weights": str(tmp_path / "other.pth")})
    with pytest.raises(
        PlanError, match=rf"match the server's plan: weights of {backbone.blocks[3].name} is"
    ):
        train_task(own, task, payload)


def test_another_image_size_is_refused():
    _, _, task, payload = server()
    with pytest.raises(PlanError, match="image_size is 64 here, 32 in the plan"):
        train_task(client(image_size=64), task, payload)


def test_a_state_that_does_not_fit_is_refused():
    _, plan, task, _ = server()
    other = server(blocks=1)[3]
    with pytest.raises(UpdateError, match=f"payload is of plan .*, expected {plan.digest[:8]}"):
        train_task(client(), task, other)


def test_classes_unknown_to_the_server_are_refused():
    _, _, task, payload = server(classes=("0", "1", "2"))
    with pytest.raises(ConfigError, match="has classes 3, 4, 5, 6, 7, which the server does not"):
        train_task(client(), task, payload)


def test_a_wider_request_than_the_servers_plan_is_cut_to_it():
    _, plan, task, payload = server(blocks=1)
    update, metrics = train_task(client(OWN | {"blocks": 5}), task, payload)
    assert (metrics["blocks"], update.plan_digest) == (1, plan.digest)


def test_methods_without_blocks_train_their_whole_plan():
    for method in ("head", "full"):
        _, plan, task, payload = server(method)
        update, _ = train_task(client(OWN | {"blocks": 1}), task, payload)
        assert update.plan_digest == plan.digest


def test_what_the_plan_leaves_out_is_not_trained():
    own = client()
    backbone, plan, task, payload = server()
    train_task(own, task, payload)
    used, _, _ = receive(own, task, payload, own.round_memory(task))
    for name, tensor in backbone.model.state_dict().items():
        if name not in plan.by_name and not name.endswith("num_batches_tracked"):
            assert_array_equal(used.model.state_dict()[name], tensor, err_msg=name)


@pytest.mark.parametrize("blocks", ["many", -1, 1.5])
def test_a_device_that_misstates_its_blocks_is_told_so(blocks):
    client = Client("pi-01", {"blocks": blocks}, read_config(default_settings()))
    with pytest.raises(ConfigError, match=f"blocks in this node's configuration .* {blocks!r}"):
        client.blocks(5)


@pytest.mark.parametrize(
    ("node", "setting", "expected"),
    [
        ({}, "off", None),
        ({}, "24", 24 * 2**20),
        ({"partition-id": 3}, "8,16.5", round(16.5 * 2**20)),
        ({"partition-id": 4}, "8,off", 8 * 2**20),
        ({"partition-id": 3}, "8,off", None),
        ({"budget-mib": 32}, "off", 32 * 2**20),
        ({"budget-mib": "off"}, "64", None),
        ({"budget-mib": 1.5}, "auto", round(1.5 * 2**20)),
    ],
)
def test_a_budget_is_the_device_s_own_or_the_run_s(node, setting, expected):
    assert client(node, budget_mib=setting).budget_bytes() == expected


def test_an_automatic_budget_is_what_is_free_less_the_reserve(monkeypatch):
    free = SimpleNamespace(available=2**30)
    monkeypatch.setattr("fleet.planner.psutil.virtual_memory", lambda: free)
    own = client(budget_mib="auto", reserve_mib=24.0)
    assert own.budget_bytes() <= 2**30 - 24 * 2**20
    free.available = 2**20
    with pytest.raises(ConfigError, match=r"1.0 MiB of memory are free here and reserve-mib keep"):
        own.budget_bytes()


def test_a_device_trains_what_its_budget_allows():
    _, _, task, payload = server(blocks=11)
    seen = []
    for mib in ("2", "8", "off"):
        own = client({"partition-id": 0, "num-partitions": 3}, blocks="11", budget_mib=mib)
        _, metrics = train_task(own, task, payload)
        seen.append(metrics["blocks"])
        if mib != "off":
            assert metrics["peak-bytes"] <= 1.02 * metrics["planned-peak-bytes"]
            assert metrics["planned-peak-bytes"] <= metrics["budget-bytes"] == int(mib) * 2**20
    assert seen == sorted(seen) and seen[0] < seen[1] <= seen[2] == 11


def test_a_budget_does_not_widen_what_a_device_was_told_to_train():
    _, _, task, payload = server(blocks=5)
    own = client(OWN | {"blocks": 2, "budget-mib": 500})
    _, metrics = train_task(own, task, payload)
    assert metrics["blocks"] == 2


def test_a_budget_below_the_floor_is_a_refusal_with_its_reason():
    _, _, task, payload = server()
    with pytest.raises(ConfigError, match=r"budget-mib 0\.01 is below the floor of \d"):
        train_task(client(OWN | {"budget-mib": 0.01}), task, payload)


@pytest.mark.parametrize("value", ["much", "0", "-3", "nan", "inf", "8,,16", ""])
def test_a_budget_that_is_none_is_refused(value):
    with pytest.raises(ConfigError, match="budget-mib must be off, auto or a number of MiB above"):
        client(budget_mib=value)


@pytest.mark.parametrize("value", ["much", 0, -3.5, "nan"])
def test_a_device_that_misstates_its_budget_is_told_so(value):
    with pytest.raises(ConfigError, match=f"budget-mib must be off, .* such as 64; got {value}"):
        client({"budget-mib": value}).budget_bytes()


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ({}, (70.0, 30.0)),
        ({"soft-temperature": 60, "least-battery": 0}, (60, 0)),
        (OWN, (0, 0)),  # a simulated client is not the machine that it runs on
    ],
)
def test_when_to_hold_back_is_the_device_s_own_or_the_run_s(node, expected):
    found = client(node, soft_temperature=70.0, least_battery=30.0).holds_back()
    assert (found.soft_temperature, found.least_battery) == expected


@pytest.mark.parametrize("value", ["warm", True, -1])
def test_a_device_that_misstates_when_to_hold_back_is_told_so(value):
    text = f"soft-temperature must be a number from 0 to 150, got {value!r}"
    with pytest.raises(ConfigError, match=text):
        client({"soft-temperature": value}).holds_back()


@pytest.fixture
def device(image_folder):
    """Function of its node configuration → a real device with images of two classes."""
    folder = image_folder("0", "1")
    return lambda **node: client({"name": "attic", "data": folder} | node)


def test_a_device_on_an_empty_battery_declines_before_anything_else(device, monkeypatch):
    battery = SimpleNamespace(percent=19.0, power_plugged=False)
    monkeypatch.setattr("clients.device.psutil.sensors_battery", lambda: battery, raising=False)
    _, _, task, payload = server()
    with pytest.raises(ConfigError, match="this device declines to train: its battery is at 19 %"):
        train_task(device(), task, payload)
    train_task(device(**{"least-battery": 10}), task, payload)
    train_task(client(), task, payload)  # simulated


def test_a_hot_device_pauses_and_says_for_how_long(device, monkeypatch):
    hot = SimpleNamespace(current=80.0)
    sensors = iter([[hot], [SimpleNamespace(current=70.0)]])
    monkeypatch.setattr(
        "clients.device.psutil.sensors_temperatures",
        lambda: {"cpu_thermal": next(sensors, [SimpleNamespace(current=50.0)])},
        raising=False,
    )
    monkeypatch.setattr("clients.device.time.sleep", lambda seconds: None)
    _, _, task, payload = server()
    own = device()
    _, metrics = train_task(own, task, payload)
    assert metrics["paused-seconds"] >= 0
    assert next(sensors, None) is None  # it looked until it was cooler
    assert "paused-seconds" not in train_task(client(), task, payload)[1]


def test_features_are_cut_where_the_widest_plan_is(monkeypatch, tmp_path):
    """A narrow device keeps the same features whatever others do to the blocks above."""
    monkeypatch.setenv("FLEET_CACHE", str(tmp_path))
    _, _, task, payload = server(blocks=4)
    for blocks in (1, 4):
        train_task(client(OWN | {"blocks": blocks}), task, payload)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_device_gives_memory_back_and_a_simulated_client_keeps_it(device, monkeypatch):
    trimmed = []
    monkeypatch.setattr("fleet.train.trim", lambda: trimmed.append("training"))
    monkeypatch.setattr("clients.local_update.trim", lambda: trimmed.append("reply"))
    _, _, task, payload = server()
    train_task(client(), task, payload)
    assert trimmed == []
    train_task(device(), task, payload)
    assert {*trimmed} == {"training", "reply"} and trimmed[-1] == "reply"
