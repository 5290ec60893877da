import numpy as np
import pytest
from numpy.testing import assert_array_equal

from clients.client import Client
from clients.head_start import moments_task
from clients.local_data import local_data
from clients.local_update import train_task
from fleet.backbones import load_backbone
from fleet.closed_form import decode_moments, moments_of
from fleet.codec import Versions
from fleet.config import default_settings, read_config
from fleet.errors import ConfigError, PlanError
from fleet.message import Task
from fleet.mobiletl import TransferModel, first_trained_step
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
}
CLASSES = tuple("0123456789")
EXPONENT = -32  # random weights leave next to nothing of an image


def client(number=1, **settings):
    settings = {key.replace("_", "-"): value for key, value in settings.items()}
    node = {"partition-id": number, "num-partitions": 3}
    return Client.of(7, node, read_config(default_settings() | SMALL | settings))


def server(classes=CLASSES):
    """Backbone, plan and task of the first round."""
    backbone = load_backbone(
        "mobilenet_v3_small", num_classes=len(classes), image_size=32, weights="none"
    )
    plan = make_plan(backbone, method="mobiletl", blocks=2)
    return backbone, plan, Task(plan.summary(), classes, 0, "0f")


def read(data, classes=10):
    return decode_moments(
        data, features=1024, classes=classes, exponent=EXPONENT, max_examples=1000
    )


def test_moments_are_those_of_the_client_s_training_images():
    backbone, plan, task = server()
    own = client()
    found = read(moments_task(own, task, EXPONENT))
    training, _ = local_data(own.node_config, own.config.data, own.config.seed)
    model = TransferModel(backbone, plan, cut=first_trained_step(backbone.steps, plan))
    expected = moments_of(model, training, backbone.preprocessing, EXPONENT, own.config.features)
    assert found.num_examples == len(training) == 18
    assert np.abs(found.class_sums).max() > 10
    for name in ("gram", "class_sums", "counts"):
        assert_array_equal(getattr(found, name), getattr(expected, name))


def test_they_are_of_the_pretrained_weights_whatever_was_trained_before():
    backbone, plan, task = server()
    before = moments_task(client(), task, EXPONENT)
    state = Versions(capture(backbone.model, plan), "float32").download(None)
    train_task(client(learning_rate=0.5), task, state)
    assert moments_task(client(), task, EXPONENT) == before


def test_labels_count_in_the_server_s_classes():
    classes = ("a new one", *reversed(CLASSES))
    plain = read(moments_task(client(), server()[2], EXPONENT))
    found = read(moments_task(client(), server(classes)[2], EXPONENT), classes=11)
    assert_array_equal(found.counts, [0, *plain.counts[::-1]])
    assert_array_equal(found.class_sums[1:], plain.class_sums[::-1])
    assert_array_equal(found.gram, plain.gram)


def test_what_round_1_needs_of_the_frozen_part_is_cached_by_then(monkeypatch, tmp_path):
    monkeypatch.setenv("FLEET_CACHE", str(tmp_path))
    backbone, plan, task = server()
    moments_task(client(), task, EXPONENT)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert files
    train_task(client(), task, Versions(capture(backbone.model, plan), "float32").download(None))
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == files


def test_what_does_not_fit_is_refused():
    _, _, task = server()
    with pytest.raises(PlanError, match="image_size is 64 here, 32 in the plan"):
        moments_task(client(image_size=64), task, EXPONENT)
    few = server(("0", "1"))[2]
    with pytest.raises(ConfigError, match="has classes 2, 3, 4, 5, 6, which the server does not"):
        moments_task(client(), few, EXPONENT)
