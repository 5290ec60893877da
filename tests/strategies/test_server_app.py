"""Whole runs of the server app over simulated clients, small enough to run often."""

import json
import re
import tomllib
from logging import INFO

import numpy as np
import pytest
import torch
from flwr.common.logger import log
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from clients.client_app import app as client_app
from clients.local_update import train_task
from fleet.backbones import load_backbone
from fleet.config import default_settings, read_config
from fleet.data import load_data
from fleet.errors import CANNOT_BEGIN, ConfigError, PlanError, UpdateError
from fleet.evaluation import evaluate
from fleet.plan import make_plan
from fleet.records import RoundReport, RunRecord
from fleet.remarks import Remarks, read_remarks
from simulations.local_engine import run_local
from strategies.fleet_strategy import FleetStrategy
from strategies.prompt_grid import PromptGrid
from strategies.server_app import _check_trained, _followed, run
from strategies.server_app import app as server_app
from strategies.server_opt import server_optimizer

pytestmark = pytest.mark.usefixtures("quick_runs")

SMALL = {
    "backbone": "mobilenet_v3_small",
    "weights": "none",
    "train-examples": 120,
    "test-examples": 40,
    "image-size": 32,
    "clients": 3,
    "rounds": 2,
    "local-epochs": 1,
    "blocks": "0,1,2",
}
PRETRAINED = {"backbone": "efficientnet_lite0", "weights": "default"}
SUMMARY_KEYS = {
    "accuracy",
    "loss",
    "rounds",
    "bytes_up",
    "bytes_down",
    "peak_client_bytes",
    "seconds",
    "refused",
    "late",
    "full_states",
    "abandoned_rounds",
    "strategy",
    "seed",
    "plan_digest",
}


@pytest.fixture(autouse=True)
def one_thread(task_identity):
    torch.set_num_threads(1)


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Function of settings → the record of a run; `nodes` changes clients' configurations."""
    count = iter(range(100))

    def launch(nodes=None, **settings):
        settings = {key.replace("_", "-"): value for key, value in settings.items()}
        settings = {"run-dir": str(tmp_path / f"run-{next(count)}")} | SMALL | settings

        def as_configured(message, context):
            context.node_config.update((nodes or {}).get(context.node_config["partition-id"], {}))
            return client_app(message, context)

        run_local(server_app, as_configured, default_settings() | settings, settings["clients"])
        return RunRecord(type(tmp_path)(settings["run-dir"]))

    return launch


def tensors_of(record):
    return load_file(record.model_path)


def same(record, other):
    ours, theirs = tensors_of(record), tensors_of(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_a_run_of_the_default_backbone_leaves_its_records_and_a_model_that_works(launch):
    record = launch(**PRETRAINED)
    assert {path.name for path in record.path.iterdir()} == {
        "config.toml",
        "rounds.jsonl",
        "summary.json",
        "report.html",
        "model.safetensors",
        "checkpoints",
    }
    facts = tomllib.loads(record.config_path.read_text())
    assert facts["settings"].keys() == default_settings().keys()
    assert facts["settings"]["run-dir"] == str(record.path)
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0]
    assert facts["versions"].keys() >= {"fleet-mobiletl", "flwr", "timm", "numpy"}

    rounds, summary = list(record.rounds()), record.summary()
    assert [report.server_round for report in rounds] == [0, 1, 2]
    assert summary.keys() == SUMMARY_KEYS
    assert (summary["rounds"], summary["refused"], summary["seed"]) == (2, 0, 0)
    assert summary["bytes_up"] == sum(report.bytes_up for report in rounds) > 0
    assert summary["accuracy"] == rounds[-1].accuracy > rounds[0].accuracy + 0.1

    model = load_backbone(
        "efficientnet_lite0", num_classes=10, image_size=32, weights=str(record.model_path)
    )
    test = load_data("digits", "test", limit=40)
    result = evaluate(model.model, test, model.preprocessing)
    assert result.accuracy == summary["accuracy"]
    assert result.loss == pytest.approx(summary["loss"], rel=1e-5)
    with safe_open(record.model_path, "pt") as file:
        assert json.loads(file.metadata()["classes"]) == list(test.classes)

    pretrained = load_backbone("efficientnet_lite0", num_classes=10, image_size=32)
    plan = make_plan(pretrained, method="mobiletl", blocks=2)
    assert summary["plan_digest"] == plan.digest
    trained = tensors_of(record)
    for name, before in pretrained.model.state_dict().items():
        assert torch.equal(trained[name], before) == (name not in plan.by_name), name


def test_the_seed_decides_every_bit(launch):
    first = launch(seed=1)
    assert same(first, launch(seed=1))
    assert not same(first, launch(seed=2))


def test_a_run_of_another_method_in_between_changes_nothing(launch):
    first = launch(method="head")
    launch(method="full", rounds=1)
    assert same(first, launch(method="head"))


def test_a_directory_that_holds_a_run_is_left_alone(launch):
    record = launch(method="head", rounds=1)
    files = {path: path.read_bytes() for path in record.path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=f"{record.path} holds a run already; name another"):
        launch(run_dir=str(record.path))
    there = {path: path.read_bytes() for path in record.path.rglob("*") if path.is_file()}
    assert there == files


def test_every_strategy_moves_the_model_its_own_way(launch):
    others = [launch(method="head")]
    for strategy in ("fedavgm", "fedadam", "fedyogi", "fedadagrad"):
        record = launch(method="head", strategy=strategy)
        assert record.summary()["strategy"] == strategy
        assert np.isfinite(record.summary()["loss"])
        assert not any(same(record, other) for other in others), strategy
        others.append(record)


def test_an_unknown_strategy_is_refused_before_anything_is_written(launch, tmp_path):
    with pytest.raises(ConfigError, match="unknown strategy krum; known: fedavg"):
        launch(strategy="krum")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["head", "shifts", "blocks", "full"])
def test_every_method_trains_its_tensors_and_no_other(launch, method):
    record = launch(method=method, blocks=1, rounds=1, train_examples=48, **PRETRAINED)
    start = load_backbone("efficientnet_lite0", num_classes=10, image_size=32)
    plan = make_plan(start, method=method, blocks=1)
    trained = tensors_of(record)
    changed = {
        name
        for name, before in start.model.state_dict().items()
        if not torch.equal(trained[name], before)
    }
    assert changed <= plan.by_name.keys()
    assert len(changed) > 0.9 * len(plan.by_name)
    assert record.summary()["refused"] == 0


def test_clients_of_one_three_and_five_blocks_take_part_together(launch):
    record = launch(blocks="1,3,5", rounds=1)
    report = list(record.rounds())[1]
    assert [client.blocks for client in report.clients] == [1, 3, 5]
    assert set(report.coverage.values()) == {1, 2, 3}
    peaks = [client.peak_bytes for client in report.clients]
    assert report.peak_client_bytes == max(peaks) == peaks[2] > peaks[0]


def test_clients_evaluate_when_asked_to(launch):
    record = launch(evaluation="clients", method="head", rounds=1)
    before, after = record.rounds()
    assert before.accuracy is None
    assert 0 <= after.accuracy <= 1
    total = sum(images for images, _ in after.accuracy_by_client.values())
    right = sum(images * accuracy for images, accuracy in after.accuracy_by_client.values())
    assert len(after.accuracy_by_client) == len(after.clients)
    assert after.accuracy == pytest.approx(right / total)
    by_server = launch(method="head", rounds=1)
    assert after.bytes_down > list(by_server.rounds())[1].bytes_down
    assert all(not report.accuracy_by_client for report in by_server.rounds())
    assert same(record, by_server)


def test_a_client_with_other_weights_is_refused_by_the_part_that_differs(launch, tmp_path):
    backbone = load_backbone("mobilenet_v3_small", num_classes=10, image_size=32, weights="none")
    state = {name: t.clone().contiguous() for name, t in backbone.model.state_dict().items()}
    block = backbone.blocks[4].name
    next(t for n, t in state.items() if n.startswith(f"{block}."))[0] += 1
    save_file(state, tmp_path / "other.safetensors")
    record = launch(nodes={1: {"weights": str(tmp_path / "other.safetensors")}}, rounds=1)
    report = list(record.rounds())[1]
    assert report.refused.keys() == {"client-0001"}
    assert f"match the server's plan: weights of {block} is" in report.refused["client-0001"]
    assert [client.name for client in report.clients] == ["client-0000", "client-0002"]
    assert record.summary()["refused"] == 1


def test_a_client_with_an_unknown_class_is_refused_by_name(launch, tmp_path):
    for name in ("3", "yak"):
        (tmp_path / "own" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (8, 8)).save(tmp_path / "own" / name / f"{i}.png")
    nodes = {2: {"data": str(tmp_path / "own"), "name": "farm"}}
    report = list(launch(nodes=nodes, method="head", rounds=1).rounds())[1]
    assert report.refused.keys() == {"farm"}
    assert "has classes yak, which the server does not know" in report.refused["farm"]


def test_a_client_that_fails_is_refused_with_its_traceback(launch, monkeypatch):
    def fails_once(client, *rest):
        if client.name == "client-0000":
            raise ZeroDivisionError("a fault of the code")
        return train_task(client, *rest)

    monkeypatch.setattr("clients.client_app.train_task", fails_once)
    report = list(launch(rounds=1).rounds())[1]
    assert "ZeroDivisionError: a fault of the code" in report.refused["client-0000"]


def test_a_device_that_misstates_its_blocks_is_refused_with_the_reason(launch):
    report = list(launch(nodes={0: {"blocks": "many"}}, rounds=1).rounds())[1]
    assert report.refused.keys() == {"client-0000"}
    assert "must be a whole number from 0 on, got 'many'" in report.refused["client-0000"]


def test_more_blocks_than_there_are_end_the_run_before_it_starts(launch, tmp_path):
    with pytest.raises(PlanError, match="blocks is 99, mobilenet_v3_small has 11"):
        launch(blocks="1,99")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"data": "no/such/images"}, "data no/such/images does not exist"),
        ({"weights": "no.pth"}, "no weights file no.pth"),
        ({"strategy": "feddyn"}, "objective is plain and strategy is feddyn"),
        ({"blocks": "99"}, "blocks is 99, mobilenet_v3_small has 11"),
    ],
)
def test_what_keeps_a_run_from_beginning_is_told_as_such(launch, setting, why):
    """Of an error Flower passes on the text: the server knows it by its first words."""
    with pytest.raises((ConfigError, PlanError)) as caught:
        launch(**setting)
    assert str(caught.value).startswith(f"{CANNOT_BEGIN}{why}")


def test_too_few_clients_do_not_keep_a_run_from_beginning(launch):
    with pytest.raises(ConfigError, match="3 online after 1 s") as caught:
        launch(min_clients=4, round_timeout=1.0)
    assert CANNOT_BEGIN not in str(caught.value)


def test_feddyn_is_told_how_many_clients_the_fleet_has(launch, monkeypatch):
    seen = []

    def spy(name, **settings):
        seen.append((name, settings["clients"]))
        return server_optimizer(name, **settings)

    monkeypatch.setattr("strategies.algorithm.server_optimizer", spy)
    launch(objective="feddyn", strategy="feddyn", rule="mean", sampled=2, rounds=1)
    assert seen[-1] == ("feddyn", 3)


def test_every_run_has_an_id_of_its_own(launch, monkeypatch):
    runs = []

    class Spy(FleetStrategy):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            runs.append(kwargs["run"])

    monkeypatch.setattr("strategies.server_app.FleetStrategy", Spy)
    for _ in range(2):
        launch(rounds=1)
    assert len(set(runs)) == 2 and all(re.fullmatch("[0-9a-f]{16}", run) for run in runs)


def test_a_head_start_is_round_0_and_its_head_is_the_one_in_closed_form(launch):
    own = {"head-start": True, "rounds": 1, "train-examples": 300, "validation-fraction": 0.0}
    own["blocks"] = "0"
    settings = PRETRAINED | own
    record = launch(**settings)
    before, first = record.rounds()
    assert before.stepped and not before.refused
    assert before.asked == ("client-0000", "client-0001", "client-0002")
    assert 3 * 5_000 < before.bytes_up < 3 * 500_000
    assert 0 < before.bytes_down < 20_000
    # The same from all images at once: what clients send adds up exactly.
    plain = next(iter(launch(**settings | {"head-start": False}).rounds()))
    alone = next(iter(launch(**settings | {"clients": 2, "min-clients": 1}).rounds()))
    assert before.accuracy == alone.accuracy > plain.accuracy + 0.3
    assert before.loss == alone.loss
    assert first.stepped


def test_a_head_start_goes_on_without_the_clients_that_cannot_send_moments(launch):
    nodes = {1: {"weights": "none"}}
    record = launch(nodes, **PRETRAINED, **{"head-start": True, "rounds": 1})
    before, _ = record.rounds()
    assert before.refused.keys() == {"client-0001"}
    assert "backbone does not match the server's plan" in before.refused["client-0001"]
    assert before.stepped


def test_codecs_on_both_links_save_bytes_and_clients_clean_up(launch):
    settings = PRETRAINED | {"rounds": 2, "blocks": "1"}
    plain = launch(**settings).summary()
    lossy = launch(**settings, **{"codec-up": "topk:0.02+int4", "codec-down": "topk:0.02+int4"})
    summary = lossy.summary()
    assert summary["bytes_up"] < plain["bytes_up"] / 50
    assert summary["bytes_down"] < plain["bytes_down"] / 50
    assert summary["full_states"] == 0
    rounds = list(lossy.rounds())
    assert rounds[-1].loss < rounds[0].loss


@pytest.mark.parametrize("key", ["data", "weights"])
def test_a_path_that_a_server_with_devices_does_not_see_is_named_with_the_way_out(tmp_path, key):
    """What fleet run saw may be hidden from a service; nobody is asked for anything."""
    grid = PromptGrid.__new__(PromptGrid)
    gone = str(tmp_path / "gone.pth")
    config = read_config(default_settings() | {"run-dir": str(tmp_path / "run"), key: gone})
    text = (
        f"the run cannot begin: {key} {gone} is not there for the server's process. A service sees "
        f"nothing of homes and /tmp but what it was installed with: fleet service install server "
        f"--readable {gone}, then restart it"
    )
    with pytest.raises(ConfigError, match=re.escape(text)):
        run(grid, config, Remarks(None))


def test_a_run_with_devices_has_log_and_remarks_in_its_folder_and_a_simulation_has_neither(
    tmp_path, caplog
):
    config = read_config(default_settings() | {"run-dir": str(tmp_path / "run")})
    with _followed(object(), config) as remarks:
        remarks.say("devices", ["waiting"])
    assert not (tmp_path / "run").exists()
    with _followed(PromptGrid.__new__(PromptGrid), config) as remarks:
        remarks.say("devices", ["waiting"])
        assert read_remarks(tmp_path / "run") == ("waiting",)
        log(INFO, "records go to %s", tmp_path)
    assert read_remarks(tmp_path / "run") == ()
    assert f"records go to {tmp_path}" in (tmp_path / "run" / "server.log").read_text()


@pytest.mark.parametrize(
    ("refused", "text"),
    [
        ([["late"]], "in the only round; once the reason was: late"),
        ([["late", "late"]], "in the only round; 2 times the reason was: late"),
        ([["late"], []], "in any of 2 rounds; once the reason was: late"),
        ([[]], "in the only round; once the reason was: fewer updates than min-updates or quorum"),
    ],
)
def test_a_run_that_moved_nothing_says_how_often_and_why(refused, text):
    reports = [
        RoundReport(
            server_round=number,
            accuracy=None,
            loss=None,
            refused={f"pi-{i}": reason for i, reason in enumerate(reasons)},
        )
        for number, reasons in enumerate(refused, start=1)
    ]
    with pytest.raises(UpdateError, match=f"no client's update was admitted {text}"):
        _check_trained(reports)
