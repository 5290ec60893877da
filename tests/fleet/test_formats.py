"""Each format against the model that it was made of, on real images."""

import dataclasses
import json
import os
import re
from dataclasses import dataclass

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file
from torchvision import models

import fleet
from fleet.cli import main
from fleet.data import load_data, to_tensor
from fleet.errors import ConfigError
from fleet.formats import export
from fleet.trained import TrainedModel, read_trained, trained_model

SMALL = (
    *("--clients", "2", "--rounds", "1", "--train-examples", "200", "--test-examples", "50"),
    *("--image-size", "32", "--local-epochs", "1", "--blocks", "1", "--learning-rate", "0.05"),
)
FACTS = {
    "backbone": "efficientnet_lite0",
    "classes": list("0123456789"),
    "preprocessing": {
        "image_size": 32,
        "mean": [127 / 255] * 3,
        "std": [128 / 255] * 3,
        "interpolation": "bicubic",
    },
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that trained EfficientNet-Lite0 on handwritten digits."""
    folder = tmp_path_factory.mktemp("formats") / "run"
    result = CliRunner().invoke(main, ["simulate", *SMALL, "--run-dir", str(folder)])
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def original(run):
    """timm's own model with the run's tensors, which this project had no hand in building."""
    model = timm.create_model("tf_efficientnet_lite0", num_classes=10)
    model.load_state_dict(load_file(run / "model.safetensors"), strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def images(run):
    """(16, 3, 32, 32) of handwritten digits, prepared."""
    digits, preprocessing = load_data("digits", "test"), read_trained(run / "model.safetensors")
    preprocessing = preprocessing.preprocessing
    return torch.stack([to_tensor(digits.read(i), preprocessing) for i in range(16)])


@pytest.fixture(scope="module")
def logits(original, images):
    with torch.inference_mode():
        logits = original(images)
    assert logits.std() > 0.1 and len(logits.argmax(1).unique()) > 1  # it tells images apart
    return logits.numpy()


def facts(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@dataclass(frozen=True)
class Case:
    """A trained model, images of its task, what timm's own model says of them, and its facts."""

    source: object
    images: torch.Tensor
    logits: np.ndarray
    facts: dict


@pytest.fixture(scope="module")
def small():
    """Timm's smallest with inverted residuals, on digits: a tenth of the operations to lower."""
    data = load_data("digits", "train", limit=100)
    settings = {"weights": "none", "cache": "off", "learning-rate": 0.1}
    fitted = fleet.fit("timm:test_efficientnet", data, epochs=2, image_size=32, settings=settings)
    images = torch.stack([fitted.transform(data.read(i)) for i in range(16)])
    model = timm.create_model("test_efficientnet", num_classes=10)
    model.load_state_dict(fitted.model.state_dict(), strict=True)
    with torch.inference_mode():
        logits = model.eval()(images)
    assert logits.std() > 0.1 and len(logits.argmax(1).unique()) > 1
    preprocessing = json.loads(json.dumps(dataclasses.asdict(fitted.preprocessing)))
    told = {"backbone": "timm:test_efficientnet", "classes": list("0123456789")}
    return Case(fitted, images, logits.numpy(), told | {"preprocessing": preprocessing})


@pytest.fixture(params=["small", pytest.param("lite0", marks=pytest.mark.slow)])
def case(request):
    if request.param == "small":
        return request.getfixturevalue("small")
    run, images, logits = map(request.getfixturevalue, ("run", "images", "logits"))
    return Case(run, images, logits, FACTS)


def assert_same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert (np.argmax(found, 1) == np.argmax(expected, 1)).all()


def test_safetensors_fit_timm_s_model_strictly_and_tell_how_to_use_it(
    run, images, logits, tmp_path
):
    to = tmp_path / "model.safetensors"
    written = export(run, to)
    assert (written.path, written.nbytes) == (to, to.stat().st_size)
    model = timm.create_model("tf_efficientnet_lite0", num_classes=10)
    model.load_state_dict(load_file(to), strict=True)
    with torch.inference_mode():
        assert_same(model.eval()(images), logits)
    told = facts(to)
    assert told["backbone"] == FACTS["backbone"]
    assert json.loads(told["classes"]) == FACTS["classes"]
    assert json.loads(told["preprocessing"]) == FACTS["preprocessing"]


def test_safetensors_fit_torchvision_s_model_strictly(tmp_path):
    data = load_data("digits", "train", limit=40)
    fitted = fleet.fit(
        "mobilenet_v3_small",
        data,
        epochs=1,
        blocks=1,
        image_size=32,
        settings={"weights": "none", "cache": "off"},
    )
    export(fitted, tmp_path / "model.safetensors")
    model = models.mobilenet_v3_small(num_classes=10).eval()
    model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    x = torch.stack([fitted.transform(data.read(i)) for i in range(8)])
    with torch.inference_mode():
        torch.testing.assert_close(model(x), fitted.model(x))


def test_pytorch_runs_the_program_alone(case, tmp_path):
    to = tmp_path / "model.pt"
    export(case.source, to)
    extra = {"model.json": ""}
    program = torch.export.load(to, extra_files=extra).module()
    with torch.inference_mode():
        assert_same(program(case.images), case.logits)
        assert_same(program(case.images[:1]), case.logits[:1])
    assert json.loads(extra["model.json"]) == case.facts


def test_an_onnx_runtime_runs_the_program(case, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="extra onnx is not installed")
    to = tmp_path / "model.onnx"
    export(case.source, to)
    session = onnxruntime.InferenceSession(to, providers=["CPUExecutionProvider"])
    for count in (16, 1):
        (found,) = session.run(None, {"images": case.images[:count].numpy()})
        assert_same(found, case.logits[:count])
    told = session.get_modelmeta().custom_metadata_map
    assert told["backbone"] == case.facts["backbone"]
    assert json.loads(told["classes"]) == case.facts["classes"]
    assert json.loads(told["preprocessing"]) == case.facts["preprocessing"]


def test_executorch_runs_the_program(case, tmp_path, monkeypatch):
    runtime = pytest.importorskip(
        "executorch.runtime", reason="executorch is not installed: pip install '.[executorch]'"
    )
    if case.facts is not FACTS:
        # Half of its time goes into lowering samples of what no backbone has, to find it by.
        patterns = "executorch.backends.xnnpack.partition.graphs"
        monkeypatch.setattr(f"{patterns}.sdpa.get_graphs", list)
        monkeypatch.setattr(f"{patterns}.bilinear_2d.get_graphs_dict", dict)
    to = tmp_path / "model.pte"
    written = export(case.source, to)
    forward = runtime.Runtime.get().load_program(to).load_method("forward")
    found = [forward.execute([image[None]])[0][0].numpy() for image in case.images]
    assert_same(np.stack(found), case.logits)
    assert written.description == tmp_path / "model.pte.json"
    assert json.loads(written.description.read_text()) == case.facts


def test_an_exported_file_is_a_source_like_its_run(run, tmp_path):
    export(run, tmp_path / "first.safetensors")
    export(tmp_path / "first.safetensors", tmp_path / "second.safetensors")
    runs, second = (
        load_file(run / "model.safetensors"),
        load_file(tmp_path / "second.safetensors"),
    )
    assert runs.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in runs.items())
    assert facts(tmp_path / "second.safetensors") == facts(run / "model.safetensors")


def test_exporting_leaves_the_model_as_it_was(small, tmp_path):
    trained = small.source
    before = {name: t.clone() for name, t in trained.model.state_dict().items()}
    stride = trained.model.conv_stem.weight.stride()
    export(trained, tmp_path / "model.pt2")
    assert trained.model.conv_stem.weight.stride() == stride
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(("name", "told"), [("model.bin", ".bin"), ("model", "no suffix")])
def test_an_unknown_suffix_names_the_known_ones(run, tmp_path, name, told):
    text = (
        f"cannot export to {tmp_path / name}: {told} names no format; known: .safetensors, .pt2, "
        f".pt, .onnx, .pte"
    )
    with pytest.raises(ConfigError, match=re.escape(text)):
        export(run, tmp_path / name)


@pytest.mark.parametrize(
    ("suffix", "module", "extra"),
    [
        (".onnx", "onnx", "onnx"),
        (".onnx", "onnxscript", "onnx"),
        (".pte", "executorch", "executorch"),
    ],
)
def test_a_format_whose_extra_is_not_installed_names_it(
    run, tmp_path, monkeypatch, suffix, module, extra
):
    monkeypatch.setattr("fleet.formats.find_spec", lambda name: None if name == module else name)
    text = f"{suffix} needs {module}, which is not installed: pip install 'fleet-mobiletl[{extra}]'"
    with pytest.raises(ConfigError, match=re.escape(text)):
        export(run, tmp_path / f"model{suffix}")
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_named(run, tmp_path):
    to = tmp_path / "none" / "model.safetensors"
    text = (
        f"cannot write {to}: No such file or directory; free space or give write permission there, "
        f"or name another file"
    )
    with pytest.raises(ConfigError, match=re.escape(text)):
        export(run, to)


def test_a_full_disk_leaves_the_file_that_was_there(run, tmp_path, monkeypatch):
    to = tmp_path / "model.safetensors"
    to.write_text("before")
    monkeypatch.setattr(os, "fsync", lambda handle: exec("raise OSError(28, 'No space left')"))
    with pytest.raises(ConfigError, match=r"cannot write .*: No space left; free space"):
        export(run, to)
    assert to.read_text() == "before"
    assert list(tmp_path.iterdir()) == [to]


def test_what_is_a_trained_model_already_is_taken_as_it_is():
    trained = TrainedModel(backbone="x", model=None, classes=("a", "b"), preprocessing=None)
    assert trained_model(trained) is trained
