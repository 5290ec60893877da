"""Features by way of the cache, against the model's own."""

import dataclasses
import errno
import logging
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import fleet.features.source
from fleet.config import FeatureConfig
from fleet.data import ImageBatches, load_data
from fleet.errors import ConfigError
from fleet.evaluation import evaluate
from fleet.features import FeatureSource, cache_directory, features_key
from fleet.mobiletl import TransferModel
from fleet.plan import make_plan

NONE = dict(cache="off", cache_mib=64.0, cache_dir="", augmentation="none", views=1)


@pytest.fixture
def model(random_backbone):
    backbone = random_backbone("mobilenet_v3_small", num_classes=2, image_size=48)
    return TransferModel(backbone, make_plan(backbone, method="mobiletl", blocks=2))


@pytest.fixture
def preprocessing(random_backbone):
    return random_backbone("mobilenet_v3_small", num_classes=2, image_size=48).preprocessing


@pytest.fixture
def folder(tmp_path):
    """An ImageFolder directory of eleven training images, and one test image a class."""
    rng = np.random.default_rng(0)
    for name in "ab":
        path = tmp_path / "images" / "test" / name / "0.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(path)
    for i in range(11):
        path = tmp_path / "images" / "train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


@pytest.fixture
def data(folder):
    return load_data(str(folder), "train")


@pytest.fixture
def cached(tmp_path):
    """Function of changes → a configuration whose cache lies in this test's folder."""

    def build(**changes):
        own = {"cache": "float16", "cache_dir": str(tmp_path / "cache")}
        return FeatureConfig(**NONE | own | changes)

    return build


@pytest.fixture
def run(model, data, preprocessing):
    """Function (config, …) → features and labels of all batches of four."""

    def batches(config=None, order=None, views=None, of=model, images=data):
        source = FeatureSource(of, images, preprocessing, config)
        xs, ys = zip(*source.batches(4, order, views), strict=True)
        return torch.cat(xs), torch.cat(ys)

    return batches


def shards(tmp_path):
    return sorted((tmp_path / "cache").rglob("*.npy"))


def counting(data):
    """The data, and the positions that were decoded."""
    decoded = []

    def read(i):
        decoded.append(i)
        return data.read(i)

    return dataclasses.replace(data, read=read, identify=data.identity), decoded


def test_batches_are_the_model_s_features_in_order(model, data, preprocessing, run):
    order = np.random.default_rng(1).permutation(len(data))
    x, labels = run(order=order)
    images, expected = zip(*ImageBatches(data, preprocessing, 4, order), strict=True)
    assert_close(x, model.features(torch.cat(images)), rtol=1e-4, atol=1e-5)
    assert torch.equal(labels, torch.cat(expected))
    assert x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("precision", "atol"), [("float16", 1e-3), ("int8", 2e-2)])
def test_cached_features_are_rounded_whether_they_were_there_or_not(run, cached, precision, atol):
    exact, config = run()[0], cached(cache=precision)
    cold, warm = run(config)[0], run(config)[0]
    assert torch.equal(cold, warm) and not torch.equal(cold, exact)
    assert_close(cold, exact, rtol=1e-3, atol=atol * exact.abs().max().item())
    assert warm.is_contiguous(memory_format=torch.channels_last)


def test_what_is_cached_is_not_decoded(data, run, cached):
    images, decoded = counting(data)
    run(cached(), images=images)
    assert sorted(decoded) == list(range(11))
    decoded.clear()
    run(cached(), images=images)
    run(cached(), images=images, order=np.arange(11)[::-1])
    assert not decoded


def test_partitions_share_what_is_cached(data, run, cached):
    run(cached(), images=data.subset(range(6)))
    images, decoded = counting(data)
    run(cached(), images=images)
    assert sorted(decoded) == list(range(6, 11))


def test_overwritten_image_is_run_anew(folder, data, run, cached):
    before = run(cached())[0]
    path = folder / "train" / "a" / "0.png"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    Image.new("RGB", (20, 30), "red").save(path)
    os.utime(path, ns=times)
    images, decoded = counting(data)
    after = run(cached(), images=images)[0]
    assert decoded == [0]
    changed = [i for i in range(11) if not torch.equal(before[i], after[i])]
    assert changed == [0]


def test_torn_shard_is_dropped_and_made_anew(run, cached, tmp_path):
    before = run(cached())[0]
    (shard,) = shards(tmp_path)
    shard.write_bytes(shard.read_bytes()[:-100])
    assert torch.equal(run(cached())[0], before)
    assert shards(tmp_path) and shard not in shards(tmp_path)


def test_key_is_all_that_decides_the_features(random_backbone, preprocessing):
    def key(method="mobiletl", blocks=2, name="mobilenet_v3_small", change=None, **changes):
        backbone = random_backbone(name, num_classes=2)
        if change:
            change(backbone)
        model = TransferModel(backbone, make_plan(backbone, method=method, blocks=blocks))
        return features_key(model, dataclasses.replace(preprocessing, **changes))

    def stem_shift(backbone):
        backbone.steps[1].module.bias.data[0] += 1e-6

    def stem_activation(backbone):
        backbone.model.set_submodule(backbone.steps[2].name, torch.nn.ReLU())
        step = dataclasses.replace(backbone.steps[2], module=torch.nn.ReLU())
        object.__setattr__(backbone, "steps", (*backbone.steps[:2], step, *backbone.steps[3:]))

    def top_block(backbone):
        backbone.blocks[-1].units[0].conv.weight.data += 1

    same = key()
    assert same == key() == key(method="blocks") == key(change=top_block)
    others = [
        key(blocks=3),
        key(method="head"),
        key(name="mobilenet_v2"),
        key(image_size=64),
        key(std=(0.5, 0.5, 0.5)),
        key(interpolation="bicubic"),
        key(change=stem_shift),
        key(change=stem_activation),
    ]
    assert len({same, *others}) == 1 + len(others)


def test_the_key_is_of_the_weights_as_they_are_now(random_backbone, preprocessing, monkeypatch):
    reads, digest = [], fleet.features.source.digest_of
    monkeypatch.setattr("fleet.features.source.digest_of", lambda m: reads.append(m) or digest(m))
    backbone = random_backbone("mobilenet_v3_small", num_classes=2)
    model = TransferModel(backbone, make_plan(backbone, method="head", blocks=0))
    first = features_key(model, preprocessing)
    assert features_key(model, preprocessing) == first
    frozen = [step.module for step in model.frozen_steps if step.module is not None]
    assert reads == frozen  # each once
    norm = backbone.steps[1].module
    seen, reads[:] = {first}, []
    with torch.no_grad():
        norm.running_mean.add_(1)
    seen.add(features_key(model, preprocessing))
    norm.bias.data = norm.bias.data + 1
    seen.add(features_key(model, preprocessing))
    weight, norm.weight = norm.weight, torch.nn.Parameter(norm.weight.detach() + 1)
    seen.add(features_key(model, preprocessing))
    with torch.inference_mode():
        norm.running_var = norm.running_var + 1
    for _ in range(2):
        seen.add(features_key(model, preprocessing))
        with torch.inference_mode():
            norm.running_var.add_(1)
    assert len(seen) == 6 and {*reads} == {norm} and weight is not norm.weight


def test_views_are_drawn_again_alike_and_cached_each(data, run, cached):
    config = cached(augmentation="flip+crop", views=3)
    views = np.arange(11) % 3
    first = run(config, views=views)[0]
    images, decoded = counting(data)
    assert torch.equal(run(config, views=views, images=images)[0], first) and not decoded
    uncached = run(FeatureConfig(**NONE | {"augmentation": "flip+crop", "views": 3}), views=views)[
        0
    ]
    assert_close(first, uncached, rtol=1e-2, atol=1e-2)
    plain = run()[0]
    assert [torch.equal(uncached[i], plain[i]) for i in range(11)] == [v == 0 for v in views]


def test_full_disk_costs_time_and_nothing_else(run, cached, monkeypatch, caplog, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    expected = run(cached(cache_dir=str(tmp_path / "other")))[0]
    monkeypatch.setattr(os, "fsync", full)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(run(cached())[0], expected)
        assert torch.equal(run(cached())[0], expected)
    (record,) = caplog.records
    assert "No space left on device; training goes on uncached" in record.getMessage()
    assert not shards(tmp_path / "cache")


def test_images_themselves_are_not_cached(random_backbone, run, cached, tmp_path):
    backbone = random_backbone("mobilenet_v3_small", num_classes=2, image_size=48)
    full = TransferModel(backbone, make_plan(backbone, method="full", blocks=0))
    assert run(cached(), of=full)[0].shape == (11, 3, 48, 48)
    assert not shards(tmp_path)


def test_evaluation_is_that_of_the_whole_model(model, data, preprocessing, cached):
    whole = evaluate(model.model, data, preprocessing)
    for config in (None, cached(), cached()):
        halves = evaluate(model, data, preprocessing, features=config)
        assert halves.loss == pytest.approx(whole.loss, rel=2e-3)
        assert halves.num_examples == whole.num_examples == 11


def test_directory_is_the_setting_or_the_environment_s(monkeypatch, cached, tmp_path):
    assert cache_directory(cached()) == tmp_path / "cache"
    monkeypatch.setenv("FLEET_CACHE", str(tmp_path / "shared"))
    assert cache_directory(FeatureConfig(**NONE)) == tmp_path / "shared"
    monkeypatch.delenv("FLEET_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory(FeatureConfig(**NONE)) == tmp_path / ".cache" / "fleet" / "features"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"cache": "float8"}, "unknown cache float8; known: off, float16, int8"),
        (
            {"augmentation": "blur", "views": 2},
            "unknown augmentation blur; known: none, crop, flip",
        ),
        ({"views": 0}, "views must be at least 1, got 0"),
        ({"views": 4}, "views is 4 and augmentation is none; several views need an augmentation"),
        ({"augmentation": "flip"}, "views is 1 and augmentation is flip"),
        ({"cache_mib": -1.0}, "cache-mib must be at least 0 and finite, got -1"),
        ({"cache_mib": float("nan")}, "cache-mib must be at least 0 and finite, got nan"),
    ],
)
def test_bad_settings_are_refused(changes, text):
    with pytest.raises(ConfigError, match=text):
        FeatureConfig(**NONE | changes)


def test_data_that_changes_as_it_is_read_does_not_spoil_the_cache(data, run, cached):
    """As of a data set that transforms at random: every reading is another image."""
    rng = np.random.default_rng(0)
    drawn = []

    def read(i):
        drawn.append(Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)))
        return drawn[-1]

    first = run(cached(), images=dataclasses.replace(data, read=read, identify=None))[0]
    fixed = dataclasses.replace(data, read=lambda i: drawn[i], identify=None)
    assert len(drawn) == 11
    assert torch.equal(run(cached(), images=fixed)[0], first)
    assert torch.equal(run(cached(cache_dir="/dev/null/x"), images=fixed)[0], first)
