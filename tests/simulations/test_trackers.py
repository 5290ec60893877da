"""Each tracker against its own library, read back with that library's own reader."""

import json
import shutil
import struct
import sys

import pytest
from click.testing import CliRunner

from fleet.cli import main
from fleet.errors import ConfigError
from fleet.records import RunRecord
from simulations import simulate
from simulations.trackers import MLflow, TensorBoard, WandB, read_tracker
from tests.runs import SMALL

pytestmark = pytest.mark.usefixtures("quick_runs")


def run(tmp_path, tracker, **settings):
    return simulate(SMALL | {"run-dir": str(tmp_path / "first")} | settings, callbacks=[tracker])


def run_that_fails(tmp_path, tracker, error):
    def fail(report):
        if report.server_round == 1:
            raise error

    with pytest.raises(type(error)):
        simulate(SMALL | {"run-dir": str(tmp_path / "second")}, "local", fail, callbacks=[tracker])


def on_record(record, name):
    return {r.server_round: getattr(r, name) for r in record.rounds()}


def scalars(folder):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="TensorBoard is an extra: tensorboard",
    )
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return events


def test_tensorboard_reads_the_rounds_from_its_event_file(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is an extra: tensorboard")
    record = run(tmp_path, TensorBoard(str(tmp_path / "tb")))
    events = scalars(tmp_path / "tb" / "first")
    for name in ("accuracy", "loss", "bytes_up", "seconds"):
        read = {event.step: event.value for event in events.Scalars(name)}
        assert read == pytest.approx(on_record(record, name), rel=1e-6)
    # Round 0 trains nobody: there is nothing to show for it.
    assert [event.step for event in events.Scalars("train_loss")] == [1, 2]
    text = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| image-size | 32 |" in text


def test_tensorboard_from_the_command_line_writes_into_the_run_s_folder(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is an extra: tensorboard")
    options = [part for key, value in SMALL.items() for part in (f"--{key}", str(value))]
    options += ["--run-dir", str(tmp_path / "run"), "--log-to", "tensorboard"]
    result = CliRunner().invoke(main, ["simulate", *options])
    assert result.exit_code == 0, result.output
    events = scalars(tmp_path / "run" / "tensorboard")
    record = RunRecord(tmp_path / "run")
    read = {event.step: event.value for event in events.Scalars("accuracy")}
    assert read == pytest.approx(on_record(record, "accuracy"))


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """To make its tables takes seconds."""
    mlflow = pytest.importorskip("mlflow", reason="MLflow is an extra: mlflow")
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def mlflow(empty_store, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="MLflow is an extra: mlflow")
    monkeypatch.chdir(tmp_path)
    before = mlflow.get_tracking_uri()
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    yield mlflow
    mlflow.set_tracking_uri(before)


def test_mlflow_reads_the_rounds_from_its_store(mlflow, tmp_path):
    record = run(tmp_path, MLflow("fleets"))
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("fleets").experiment_id
    (logged,) = client.search_runs([experiment])
    assert logged.info.run_name == "first" and logged.info.status == "FINISHED"
    for name in ("accuracy", "loss", "bytes_up"):
        history = client.get_metric_history(logged.info.run_id, name)
        assert {m.step: m.value for m in history} == pytest.approx(on_record(record, name))
    assert logged.data.metrics["total_bytes_up"] == record.summary()["bytes_up"]
    assert logged.data.params["image-size"] == "32"
    assert logged.data.tags["run_dir"] == str(record.path)


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), "KILLED"), (ValueError("no"), "FAILED")]
)
def test_mlflow_knows_how_a_run_ended_and_leaves_the_user_s_own_alone(
    mlflow, tmp_path, error, status
):
    with mlflow.start_run() as own:
        run_that_fails(tmp_path, read_tracker("mlflow"), error)
        mlflow.log_metric("mine", 1.0)
    client = mlflow.MlflowClient()
    by_name = {run.info.run_name: run for run in client.search_runs(["0"])}
    assert by_name["second"].info.status == status
    assert client.get_run(own.info.run_id).data.metrics == {"mine": 1.0}


def offline_history(folder):
    """Rounds, configuration and exit codes of an offline run, from the file that wandb syncs.

    wandb has no reader of it in Python. It is a log as LevelDB's, of wandb's own protobuf
    records, behind seven bytes: in blocks of 32 KiB, each piece with checksum, length and kind.
    """
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its own process has written all of the file once it has ended
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    content, at, whole = path.read_bytes(), 7, b""
    history, config, exits = [], {}, []
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind not in (1, 4):  # the whole of a record, or its end
            continue
        record, whole = Record.FromString(whole), b""
        if record.HasField("history"):
            items = record.history.item
            history.append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in items})
        config |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
        if record.HasField("exit"):
            exits.append(record.exit.exit_code)
    return history, config, exits


@pytest.fixture
def offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="Weights & Biases is an extra: wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.teardown()  # it would go on writing to this test's folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb_keeps_the_rounds_in_its_offline_file(offline, tmp_path):
    record = run(tmp_path, WandB("fleets"))
    history, config, exits = offline_history(tmp_path)
    assert {h["_step"]: h["accuracy"] for h in history} == on_record(record, "accuracy")
    assert {h["_step"]: h["bytes_up"] for h in history} == on_record(record, "bytes_up")
    assert config["image-size"] == 32
    assert exits == [0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb_is_told_that_a_run_failed(offline, tmp_path):
    run_that_fails(tmp_path, WandB(), KeyboardInterrupt())
    history, _, exits = offline_history(tmp_path)
    assert [h["_step"] for h in history] == [0]
    assert exits == [1]


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_package_that_is_missing_names_its_extra(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)  # what an import of it finds
    text = rf"{name} is not installed: pip install 'fleet-mobiletl\[{name}\]'"
    with pytest.raises(ConfigError, match=text):
        read_tracker(f"{name}:somewhere")


def test_a_folder_that_a_tracker_once_made_is_not_its_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match="wandb is not installed"):
        WandB()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)


@pytest.mark.parametrize("text", ["", "comet", "WandB", ":fleets"])
def test_an_unknown_tracker_is_refused_with_the_known_ones(text):
    with pytest.raises(ConfigError, match=r"unknown tracker .*; known: tensorboard\[:FOLDER\], ml"):
        read_tracker(text)
