"""Where weights come from, and every way in which they can be the wrong ones."""

import pickle
from pathlib import Path
from urllib.error import URLError

import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision import models

import fleet.weights
from fleet.backbones import load_backbone
from fleet.errors import ConfigError
from fleet.weights import load_into, read_weights

NAME = "mobilenet_v3_small"
CONV = "features.0.0.weight"


def load(weights, name=NAME):
    return load_backbone(name, num_classes=5, image_size=64, weights=str(weights))


def save_pth(tensors, path):
    torch.save(tensors, path)


def save_wrapped(tensors, path):
    torch.save({"epoch": 3, "state_dict": tensors}, path)


def save_as_model(tensors, path):
    torch.save({"model": tensors}, path)


WRITERS = [
    (save_file, "weights.safetensors"),
    (save_pth, "weights.pth"),
    (save_pth, "weights.pt"),
    (save_wrapped, "checkpoint.pth"),
    (save_as_model, "checkpoint.pth"),
]


@pytest.fixture
def tensors():
    torch.manual_seed(5)
    model = models.get_model(NAME, num_classes=5)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not name.endswith("running_var"):
            tensor.normal_(std=0.1)
    return model.state_dict()


@pytest.mark.parametrize(("save", "file"), WRITERS)
def test_file_comes_back_bit_for_bit(tmp_path, tensors, save, file):
    save(tensors, tmp_path / file)
    loaded = load(tmp_path / file).model.state_dict()
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_file_of_a_timm_model_comes_back_bit_for_bit(tmp_path):
    tensors = timm.create_model("tf_efficientnet_lite0", num_classes=5).state_dict()
    save_file(tensors, tmp_path / "weights.safetensors")
    loaded = load(tmp_path / "weights.safetensors", "efficientnet_lite0").model.state_dict()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_counters_of_batches_may_be_absent(tmp_path, tensors):
    tensors = {n: t for n, t in tensors.items() if not n.endswith("num_batches_tracked")}
    save_pth(tensors, tmp_path / "old.pth")
    assert torch.equal(load(tmp_path / "old.pth").model.state_dict()[CONV], tensors[CONV])


def test_missing_unknown_and_misshapen_tensors_are_named(tmp_path, tensors):
    weight = tensors.pop(CONV)
    with pytest.raises(ConfigError, match=rf"do not fit MobileNetV3: {CONV} is missing; save the"):
        load_into(models.get_model(NAME, num_classes=5), tensors, "file")
    tensors[CONV] = weight[:, :2]
    with pytest.raises(ConfigError, match=rf"{CONV} has shape \(16, 2, 3, 3\), the model's is"):
        load_into(models.get_model(NAME, num_classes=5), tensors, "file")
    tensors[CONV], tensors["extra"] = weight, torch.zeros(1)
    save_file(tensors, tmp_path / "weights.safetensors")
    with pytest.raises(ConfigError, match=r"weights .*weights\.safetensors do not.*extra is unkno"):
        load(tmp_path / "weights.safetensors")


def test_many_faults_are_counted(tensors):
    few = dict(list(tensors.items())[:-10])
    with pytest.raises(ConfigError, match=r"is missing; .* is missing; .* is missing; and \d more"):
        load_into(models.get_model(NAME, num_classes=5), few, "file")


def test_misfit_tells_the_way_out(tensors):
    del tensors[CONV]
    with pytest.raises(
        ConfigError,
        match=r"; save the state_dict of the same architecture, or name the backbone it is of$",
    ):
        load_into(models.get_model(NAME, num_classes=5), tensors, "file")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor", "ignore:Sparse CSR")
@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda t: t.to_sparse(), "sparse"),
        (lambda t: t.flatten(1).to_sparse_csr(), "sparse"),
        (lambda t: t.to("meta"), "meta"),
    ],
)
def test_tensors_that_are_not_dense_are_refused(tmp_path, tensors, change, kind):
    tensors[CONV] = change(tensors[CONV])
    save_pth(tensors, tmp_path / "weights.pth")
    with pytest.raises(
        ConfigError,
        match=rf"weights\.pth has {CONV} as a {kind} tensor, expected a dense one; save the",
    ):
        load(tmp_path / "weights.pth")


def test_keys_that_are_no_names_are_refused(tmp_path, tensors):
    save_pth({**tensors, 7: tensors[CONV]}, tmp_path / "weights.pth")
    with pytest.raises(
        ConfigError,
        match=r"has the key 7 of type int, a state_dict has names \(str\); save model\.state_dict",
    ):
        load(tmp_path / "weights.pth")


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.complex64])
def test_integers_and_complex_numbers_are_refused(tmp_path, tensors, dtype):
    tensors[CONV] = tensors[CONV].to(dtype)
    save_pth(tensors, tmp_path / "weights.pth")
    with pytest.raises(
        ConfigError,
        match=rf"{CONV} has dtype {dtype}, the model's is torch.float32; save the state_dict of",
    ):
        load(tmp_path / "weights.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted(tmp_path, tensors, dtype):
    tensors[CONV] = tensors[CONV].to(dtype)
    save_file(tensors, tmp_path / "weights.safetensors")
    loaded = load(tmp_path / "weights.safetensors").model.state_dict()[CONV]
    assert torch.equal(loaded, tensors[CONV].float())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e200])
def test_values_that_are_not_finite_are_named(tmp_path, tensors, value):
    tensors[CONV] = tensors[CONV].double()
    tensors[CONV][0, 0, 0, :2] = value
    save_file(tensors, tmp_path / "weights.safetensors")
    with pytest.raises(
        ConfigError,
        match=rf"weights\.safetensors are damaged: {CONV} has 2 of 432 values NaN or infinite "
        r"as torch\.float32; copy the file again",
    ):
        load(tmp_path / "weights.safetensors")


def test_head_without_classes_is_refused(tmp_path, tensors):
    tensors["classifier.3.weight"] = torch.zeros(0, 1024)
    tensors["classifier.3.bias"] = torch.zeros(0)
    save_pth(tensors, tmp_path / "weights.pth")
    with pytest.raises(
        ConfigError,
        match=r"classifier\.3\.weight has shape \(0, 1024\), the model's is \(1000, 1024\);.*; s",
    ):
        load(tmp_path / "weights.pth")


@pytest.mark.parametrize(("save", "file"), WRITERS)
def test_prefix_of_a_parallel_model_is_taken_off(tmp_path, tensors, save, file):
    save({f"module.{name}": tensor for name, tensor in tensors.items()}, tmp_path / file)
    loaded = load(tmp_path / file).model.state_dict()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_prefix_of_some_tensors_is_not_taken_off(tmp_path, tensors):
    tensors[f"module.{CONV}"] = tensors.pop(CONV)
    save_pth(tensors, tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match=rf"{CONV} is missing; module\.{CONV} is unknown; save"):
        load(tmp_path / "weights.pth")


def test_weights_that_do_not_fit_change_nothing(tensors):
    model = models.get_model(NAME, num_classes=5)
    before = model.state_dict()[CONV].clone()
    del tensors["classifier.3.bias"]
    with pytest.raises(ConfigError):
        load_into(model, tensors, "file")
    assert torch.equal(model.state_dict()[CONV], before)


@pytest.mark.parametrize("file", ["weights.safetensors", "weights.pth", ""])
def test_file_that_is_not_there_is_named(tmp_path, file):
    with pytest.raises(ConfigError, match=r"no weights file .*; name a .safetensors or .pth file"):
        load(tmp_path / file)


@pytest.mark.parametrize(("save", "file"), WRITERS[:2])
@pytest.mark.parametrize("damage", [lambda b: b[:-1000], lambda b: b"", lambda b: b"\xff" * 500])
def test_damaged_file_is_refused(tmp_path, tensors, save, file, damage):
    save(tensors, tmp_path / file)
    (tmp_path / file).write_bytes(damage((tmp_path / file).read_bytes()))
    with pytest.raises(ConfigError, match=f"{file} cannot be read as weights.*save it with safete"):
        load(tmp_path / file)


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("writer", [pickle, torch])
def test_pickled_code_is_refused_and_not_run(tmp_path, writer):
    path, trace = tmp_path / "weights.pth", tmp_path / "it ran"
    write = {pickle: pickle.dump, torch: torch.save}[writer]
    with path.open("wb") as file:
        write({"a": Payload(trace)}, file)
    with pytest.raises(
        ConfigError, match=r"weights.pth cannot .* holds more than tensors; save it"
    ):
        load(path)
    assert not trace.exists()
    if writer is pickle:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert trace.exists()  # the payload does work where it is let


@pytest.mark.parametrize("contents", [[1, 2], {"a": 1}, {"state_dict": {"a": "b"}}, 7])
def test_file_without_tensors_is_refused(tmp_path, contents):
    torch.save(contents, tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match=r"holds no state_dict; save model\.state_dict\(\)"):
        read_weights(tmp_path / "weights.pth")


def no_network(*args, **kwargs):
    raise URLError("Network is unreachable")


@pytest.mark.parametrize("weights", ["imagenet", "default"])
def test_failed_download_from_torchvision_names_the_way_out(monkeypatch, weights):
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    with pytest.raises(
        ConfigError,
        match=f"cannot download the ImageNet weights of {NAME}: .*Network is unreachable.*; "
        "connect to the internet once, or name a local",
    ):
        load(weights)


@pytest.mark.parametrize("name", ["fbnetc_100", "efficientnet_lite0"])
def test_failed_download_from_timm_names_the_way_out(monkeypatch, name):
    def not_in_cache(*args, **kwargs):
        from huggingface_hub.errors import LocalEntryNotFoundError

        raise LocalEntryNotFoundError("cannot find the requested files in the local cache")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", not_in_cache)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", no_network)
    with pytest.raises(
        ConfigError, match=r"cannot download the ImageNet weights of .*; connect to"
    ):
        load("imagenet", name)


def test_lite0_file_other_than_the_tested_one_is_refused(monkeypatch):
    monkeypatch.setattr(fleet.weights, "LITE0_SHA256", "0" * 64)
    with pytest.raises(
        ConfigError,
        match=r"has SHA-256 579344248a93…, expected 000000000000…; reinstall efficientnet-lite0-py",
    ):
        load("default", "efficientnet_lite0")
