import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from fleet.backbones import Preprocessing, load_backbone
from fleet.errors import ConfigError
from fleet.records import RoundReport, RunRecord
from fleet.trained import facts_of, read_facts, read_trained, trained_model

CLASSES = ("cat", "dog", "yak")
TOLD = Preprocessing(48, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic")


@pytest.fixture(scope="module")
def backbone():
    loaded = load_backbone("mobilenet_v3_small", num_classes=3, image_size=48, weights="none")
    with torch.no_grad():
        loaded.head.weight.normal_()
    return loaded


@pytest.fixture
def record(backbone, tmp_path):
    """A run with a model; its preprocessing is not what its architecture says."""
    record = RunRecord.create(str(tmp_path / "run"), {})
    tensors = backbone.model.state_dict()
    record.save_model(tensors, facts_of(backbone.name, backbone.model, CLASSES, TOLD))
    return record


def rewritten(record, tensors=None, **changes):
    """The run's model with other metadata; None takes a fact away."""
    facts = facts_of("mobilenet_v3_small", torch.nn.Identity(), CLASSES, TOLD)
    facts.pop("digest")
    facts = {key: value for key, value in (facts | changes).items() if value is not None}
    save_file(tensors or load_file(record.model_path), record.model_path, facts)
    return record.model_path


def test_a_model_comes_back_with_all_that_it_takes_to_use_it(backbone, record):
    for source in (record.path, str(record.path), record.model_path):
        trained = trained_model(source)
        assert (trained.backbone, trained.classes) == ("mobilenet_v3_small", CLASSES)
        assert trained.preprocessing == TOLD
        assert not trained.model.training
        for name, tensor in backbone.model.state_dict().items():
            assert torch.equal(trained.model.state_dict()[name], tensor)


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(backbone, record, monkeypatch):
    """A device replaces its last model after a round, and may just be asked to predict."""
    newer = {
        n: t + 1 if n == "classifier.3.bias" else t for n, t in load_file(record.model_path).items()
    }
    with torch.no_grad():
        changed = load_backbone("mobilenet_v3_small", num_classes=3, image_size=48, weights="none")
        changed.model.load_state_dict(newer)
    replaced = []

    def read_and_replace(path):
        facts = read_facts(path)
        if not replaced:
            replaced.append(path)
            record.save_model(newer, facts_of(backbone.name, changed.model, CLASSES, TOLD))
        return facts

    monkeypatch.setattr("fleet.trained.read_facts", read_and_replace)
    trained = read_trained(record.model_path)
    assert replaced
    assert torch.equal(trained.model.state_dict()["classifier.3.bias"], newer["classifier.3.bias"])


def test_a_file_of_an_earlier_version_takes_its_architecture_s_preprocessing(record):
    path = rewritten(record, preprocessing=None)
    trained = read_trained(path)
    assert (
        trained.preprocessing
        == load_backbone(
            "mobilenet_v3_small", num_classes=3, image_size=48, weights="none"
        ).preprocessing
    )


def test_a_run_without_a_model_yet_says_how_far_it_is(tmp_path):
    record = RunRecord.create(str(tmp_path / "run"), {})
    record.add_round(RoundReport(server_round=0, accuracy=None, loss=None))
    text = f"run {record.path} has no model yet, and 1 rounds on record; the first is there once"
    with pytest.raises(ConfigError, match=re.escape(text)):
        trained_model(record.path)


def test_a_folder_that_holds_no_run_is_named(tmp_path):
    with pytest.raises(ConfigError, match=f"{tmp_path} holds no run: there is no config.toml"):
        trained_model(tmp_path)


@pytest.mark.parametrize("name", ["none", "none.safetensors", "model.pt"])
def test_what_is_no_model_is_named(tmp_path, name):
    (tmp_path / "model.pt").touch()
    text = f"there is no model {tmp_path / name}; name a run's folder, or a .safetensors file that"
    with pytest.raises(ConfigError, match=re.escape(text)):
        trained_model(tmp_path / name)


@pytest.mark.parametrize("length", [0, 7, 500])
def test_a_file_that_is_cut_off_is_named(record, length):
    record.model_path.write_bytes(record.model_path.read_bytes()[:length])
    text = f"{record.model_path} cannot be read as a model: .*; copy it again, or export it anew"
    with pytest.raises(ConfigError, match=text):
        trained_model(record.path)


@pytest.mark.parametrize("place", [0.3, 0.6, 0.999])
def test_a_flipped_bit_is_noticed(record, place):
    data = bytearray(record.model_path.read_bytes())
    data[int(place * len(data))] ^= 1
    record.model_path.write_bytes(data)
    text = f"{record.model_path} is damaged: its tensors have digest [0-9a-f]+, its header says"
    with pytest.raises(ConfigError, match=text):
        trained_model(record.path)


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone": None},
        {"classes": None},
        {"classes": "no JSON"},
        {"classes": json.dumps([1, 2, 3])},
        {"classes": json.dumps("cat")},
        {"image_size": None},
    ],
)
def test_a_file_that_does_not_tell_its_classes_is_refused(record, changes):
    path = rewritten(record, **changes)
    text = (
        f"{path} does not tell its backbone, image size and classes; name a run's folder, its "
        f"model.safetensors, or a .safetensors file that fleet export wrote"
    )
    with pytest.raises(ConfigError, match=re.escape(text)):
        read_trained(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"preprocessing": "no JSON"},
        {"preprocessing": "[]"},
        {"preprocessing": "{}"},
        {"preprocessing": json.dumps({"mean": [1, 1], "std": [1, 1, 1]})},
        {"preprocessing": None, "image_size": "large"},
    ],
)
def test_a_file_that_does_not_tell_its_preprocessing_is_refused(record, changes):
    path = rewritten(record, **changes)
    with pytest.raises(ConfigError, match=f"{path} does not tell how images are prepared: .*anew"):
        read_trained(path)


def test_classes_that_are_not_the_head_s_are_refused(record):
    path = rewritten(record, classes=json.dumps(["cat", "dog"]))
    with pytest.raises(ConfigError, match=f"{path} has a head of 3 outputs and names 2 classes"):
        read_trained(path)


def test_an_architecture_that_is_not_known_here_is_named(record):
    path = rewritten(record, backbone="MobileNetV9")
    with pytest.raises(ConfigError, match="unknown backbone MobileNetV9; examples: "):
        read_trained(path)
