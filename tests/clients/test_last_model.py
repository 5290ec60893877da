import os
import re
import time
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from clients.client import Client
from clients.last_model import newest_model
from clients.model import receive
from clients.personal import keep_norms
from fleet.backbones import load_backbone
from fleet.cli import main
from fleet.codec import Versions
from fleet.config import default_settings, read_config
from fleet.errors import ConfigError
from fleet.message import Task
from fleet.plan import make_plan
from fleet.state import TrainableState, capture

pytestmark = pytest.mark.usefixtures("quick_runs")

CLASSES = ("cat", "dog", "yak")
SMALL = {"backbone": "mobilenet_v3_small", "weights": "none", "image-size": 32}


@pytest.fixture(autouse=True)
def state_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEET_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def client(node, **settings):
    settings = {key.replace("_", "-"): value for key, value in settings.items()}
    return Client.of(7, node, read_config(default_settings() | SMALL | settings))


def sent(bias=(0.0, 1.0, 2.0), **options):
    """A server's task and download; its state has the head's biases as given."""
    backbone = load_backbone("mobilenet_v3_small", num_classes=3, image_size=32, weights="none")
    plan = make_plan(backbone, method="mobiletl", blocks=1, **options)
    tensors = dict(capture(backbone.model, plan).tensors)
    name = next(name for name in tensors if name.endswith("3.bias"))
    tensors[name] = torch.tensor(bias).numpy()
    state = TrainableState(plan, tensors)
    return Task(plan.summary(), CLASSES, 1, "ab12"), Versions(state, "float32").download(None)


def take(own, task, download):
    """Receive the state of a task."""
    return receive(own, task, download, own.round_memory(task))


def test_a_device_keeps_the_model_that_it_received(state_dir):
    backbone, _, _ = take(client({"name": "attic"}), *sent())
    path, trained = newest_model(state_dir)
    assert path.is_relative_to(state_dir) and path.name.startswith("attic-")
    assert (trained.backbone, trained.classes) == ("mobilenet_v3_small", CLASSES)
    assert trained.preprocessing == backbone.preprocessing
    for name, tensor in backbone.model.state_dict().items():
        assert torch.equal(trained.model.state_dict()[name], tensor)


def test_the_newest_takes_the_place_of_the_one_before(state_dir):
    for bias in ((0.0, 1.0, 2.0), (2.0, 1.0, 0.0)):
        take(client({"name": "attic"}), *sent(bias))
    path, trained = newest_model(state_dir)
    assert trained.model.classifier[3].bias.tolist() == [2.0, 1.0, 0.0]
    assert list(path.parent.iterdir()) == [path]


def test_its_own_norms_are_in_it(state_dir):
    own = client({"name": "attic"}, local_norms=True, evaluation="clients")
    task, download = sent(local_norms=True)
    backbone, plan, _ = take(own, task, download)
    name = next(spec.name for spec in plan.local_specs if spec.role == "shift")
    with torch.no_grad():
        backbone.model.state_dict()[name].fill_(0.25)
    keep_norms(backbone.model, plan, plan, own.round_memory(task))
    take(own, replace(task, server_round=task.server_round + 1), download)
    assert (newest_model(state_dir)[1].model.state_dict()[name] == 0.25).all()


def test_the_same_model_is_not_written_again(state_dir):
    own = client({"name": "attic"})
    take(own, *sent())
    path, _ = newest_model(state_dir)
    before = path.stat()
    os.utime(path, (0, 0))
    take(own, *sent())
    assert path.stat().st_ino == before.st_ino
    assert path.stat().st_mtime > time.time() - 600  # and yet it is the last received


def test_a_simulated_client_keeps_none(state_dir):
    take(client({"partition-id": 0, "num-partitions": 2}), *sent())
    assert not (state_dir / "models").exists()


def test_a_state_that_is_not_finite_is_not_kept(state_dir):
    take(client({"name": "attic"}), *sent())
    take(client({"name": "attic"}), *sent((float("nan"), 0.0, 0.0)))
    assert newest_model(state_dir)[1].model.classifier[3].bias.tolist() == [0.0, 1.0, 2.0]


def test_of_several_clients_the_last_that_received_counts(state_dir):
    take(client({"name": "one"}), *sent())
    take(client({"name": "two"}), *sent())
    one, two = (next((state_dir / "models").glob(f"{name}-*")) for name in ("one", "two"))
    os.utime(two, (1, 1))
    assert newest_model(state_dir)[0] == one
    one.write_bytes(one.read_bytes()[:100])
    os.utime(one)
    assert newest_model(state_dir)[0] == two


def test_a_model_that_cannot_be_kept_costs_a_warning(state_dir, caplog):
    state_dir.mkdir()
    (state_dir / "models").write_text("a file in the way")
    take(client({"name": "attic"}), *sent())
    assert "kept no model for predictions: " in caplog.text


def test_a_device_that_has_received_none_says_so(state_dir):
    text = f"this device has received no model yet: there is none in {state_dir / 'models'}; a "
    with pytest.raises(ConfigError, match=re.escape(text)):
        newest_model(state_dir)


def test_a_damaged_model_is_named(state_dir):
    take(client({"name": "attic"}), *sent())
    path, _ = newest_model(state_dir)
    data = bytearray(path.read_bytes())
    data[-9] ^= 4
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=f"this device has no good model: {path} is damaged"):
        newest_model(state_dir)


def test_fleet_predict_on_the_device(state_dir, tmp_path):
    take(client({"name": "attic"}), *sent((0.0, 9.0, 0.0)))
    Image.new("RGB", (20, 20), "red").save(tmp_path / "photo.png")
    arguments = ["predict", "--state", str(state_dir), str(tmp_path / "photo.png")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "dog" in result.stdout
    result = CliRunner().invoke(main, ["predict", "--state", str(tmp_path), arguments[-1]])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: this device has received no model yet")
