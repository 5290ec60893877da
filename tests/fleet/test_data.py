"""Data sources, splits, partitions and batches, held against the libraries users know."""

import hashlib
import io
import json
import os
import pickle
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from fleet.data import (
    ImageBatches,
    ImageData,
    load_data,
    partition,
    split_validation,
    to_tensor,
    visiting_order,
)
from fleet.data.folders import image_files
from fleet.data.splits import draw_stratified
from fleet.errors import ConfigError
from tests.forks import prepared
from tests.many import many

REPO = Path(__file__).parents[2]
CIFAR10 = REPO.parent / "shared/data/cifar10"
COLOURS = {"cat": (200, 30, 30), "dog": (30, 200, 30), "owl": (30, 30, 200)}


def jpeg(colour, size=(12, 9)):
    buffer = io.BytesIO()
    Image.new("RGB", size, tuple(colour)).save(buffer, "JPEG")
    return buffer.getvalue()


def photo(seed, size):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))


def image_folder(root, per_class=10, classes=tuple(COLOURS)):
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            (root / name / f"{i:02d}.jpg").write_bytes(jpeg(COLOURS[name]))
    return root


def preprocessing(size=16, interpolation="bilinear"):
    return SimpleNamespace(
        image_size=size,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        interpolation=interpolation,
    )


def toy(labels, num_classes=None):
    """Labels with an image each whose red value is its position."""
    labels = np.asarray(labels)
    names = tuple(str(c) for c in range(num_classes or int(labels.max(initial=0)) + 1))
    return ImageData("toy", names, labels, lambda i: Image.new("RGB", (4, 4), (i, 0, 0)))


def positions(data):
    return [data.read(i).getpixel((0, 0))[0] for i in range(len(data))]


def random_labels(seed, num_examples=600, num_classes=10):
    return np.random.default_rng(seed).integers(0, num_classes, num_examples)


def counts(data):
    return np.bincount(data.labels, minlength=len(data.classes))


# Images and batches


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(8, 8), (40, 23), (16, 16)])
def test_to_tensor_is_torchvisions_resize_and_normalise(size, interpolation):
    from torchvision.transforms import InterpolationMode, v2

    theirs = v2.Compose(
        [
            v2.Resize((16, 16), InterpolationMode(interpolation)),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    image = photo(3, size)
    ours = to_tensor(image, preprocessing(16, interpolation))
    assert ours.dtype == torch.float32 and ours.shape == (3, 16, 16)
    assert_close(ours, theirs(image))


def test_to_tensor_takes_grey_images():
    image = photo(0, (9, 9)).convert("L")
    assert_close(
        to_tensor(image, preprocessing()), to_tensor(image.convert("RGB"), preprocessing())
    )


def test_to_tensor_refuses_an_unknown_interpolation():
    with pytest.raises(ConfigError, match="interpolation 'lanczos' is unknown; use bilinear"):
        to_tensor(photo(0, (4, 4)), preprocessing(interpolation="lanczos"))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16, 100])
@pytest.mark.parametrize("num_examples", [0, 1, 2, 3, 17, 33])
def test_batches_are_balanced_and_visit_the_order(num_examples, batch_size):
    order = np.random.default_rng(0).permutation(40)[:num_examples]
    data = toy(random_labels(1, num_examples=40))
    batches = ImageBatches(data, preprocessing(4), batch_size, order)
    sizes = [len(labels) for _, labels in batches]
    assert len(batches) == len(sizes)
    assert sum(sizes) == num_examples
    assert max(sizes, default=0) - min(sizes, default=0) <= 1
    if num_examples > 1 and batch_size > 1:
        assert min(sizes) > 1
    if batch_size != 2 or num_examples % 2 == 0:
        assert len(sizes) == -(-num_examples // batch_size)
    visited = [label for _, labels in batches for label in labels.tolist()]
    assert visited == data.labels[order].tolist()


def test_batches_hold_the_images_that_to_tensor_gives():
    data = load_data("digits", "test", limit=20)
    batches = list(ImageBatches(data, preprocessing(24), batch_size=8))
    images = torch.cat([images for images, _ in batches])
    assert all(i.is_contiguous(memory_format=torch.channels_last) for i, _ in batches)
    assert all(labels.dtype == torch.int64 for _, labels in batches)
    assert_close(
        images, torch.stack([to_tensor(data.read(i), preprocessing(24)) for i in range(20)])
    )


def test_batches_refuse_an_empty_batch():
    with pytest.raises(ConfigError, match="batch-size must be at least 1, got 0"):
        ImageBatches(toy([0, 1]), preprocessing(), batch_size=0)


def test_labels_are_a_read_only_copy():
    mine = np.array([0, 1, 1])
    data = toy(mine)
    mine[0] = 1
    assert data.labels.tolist() == [0, 1, 1] and data.labels.dtype == np.int64
    with pytest.raises(ValueError, match="read-only"):
        data.labels[0] = 1


def test_a_subset_of_a_subset_reads_the_right_images():
    data = toy(np.arange(30) % 3).subset(np.arange(5, 25)).subset([4, 0, 19])
    assert positions(data) == [9, 5, 24]
    assert data.labels.tolist() == [0, 2, 0]
    assert data.classes == ("0", "1", "2")


# Splits


@many("seed", range(10))
def test_draws_are_as_proportional_as_whole_examples_allow(seed):
    labels = np.random.default_rng(seed).choice(5, 200, p=[0.5, 0.3, 0.1, 0.06, 0.04])
    drawn = draw_stratified(labels, 60, seed)
    assert len(drawn) == 60 and (np.diff(drawn) > 0).all()
    exact = np.bincount(labels, minlength=5) * 60 / 200
    assert (abs(np.bincount(labels[drawn], minlength=5) - exact) < 1).all()


def test_validation_has_scikit_learns_class_counts():
    from sklearn.model_selection import train_test_split

    data = load_data("digits", "train")
    _, validation = split_validation(data, 0.1, seed=3)
    _, theirs = train_test_split(data.labels, test_size=len(validation), stratify=data.labels)
    assert abs(counts(validation) - np.bincount(theirs)).max() <= 1


@many("seed", range(5))
def test_training_and_validation_share_nothing_and_lose_nothing(seed):
    data = toy(random_labels(seed, num_examples=100))
    train, validation = split_validation(data, 0.2, seed)
    assert len(validation) == 20
    assert sorted(positions(train) + positions(validation)) == list(range(100))
    again = split_validation(data, 0.2, seed)[1]
    assert positions(again) == positions(validation)
    assert positions(split_validation(data, 0.2, seed + 1)[1]) != positions(validation)


def test_no_fraction_leaves_validation_empty():
    train, validation = split_validation(toy([0, 1, 1]), 0.0, seed=0)
    assert (len(train), len(validation)) == (3, 0)


@pytest.mark.parametrize("labels", [[0], [0, 1], [0, 0, 1], [0] * 5 + [1]])
def test_every_class_keeps_an_example_for_training(labels):
    train, _ = split_validation(toy(labels), 0.9, seed=0)
    assert set(train.labels) == set(labels)


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_a_fraction_outside_the_unit_interval_is_refused(fraction):
    with pytest.raises(ConfigError, match=rf"validation-fraction .* \[0, 1\), got {fraction}"):
        split_validation(toy([0, 1]), fraction, seed=0)


# Sources: built in


def test_digits_are_scikit_learns_pixels():
    from sklearn.datasets import load_digits

    train, test = load_data("digits", "train"), load_data("digits", "test")
    assert len(train) + len(test) == 1797 and len(test) == 359
    ours = [np.asarray(d.read(i)) for d in (train, test) for i in range(len(d))]
    assert all((image == image[..., :1]).all() for image in ours)  # grey
    theirs = np.rint(load_digits().images / 16 * 255).astype(np.uint8)
    assert Counter(image[..., 0].tobytes() for image in ours) == Counter(
        image.tobytes() for image in theirs
    )


def test_the_held_out_test_ignores_the_seed_and_has_every_class_in_proportion():
    first, second = (load_data("digits", "test", seed=s) for s in (0, 1))
    assert first.labels.tolist() == second.labels.tolist()
    share = counts(first) / (counts(first) + counts(load_data("digits", "train")))
    assert abs(share - 0.2).max() < 0.01


def test_a_limit_is_a_seeded_stratified_subset():
    data = load_data("digits", "train", limit=100, seed=1)
    assert len(data) == 100 and counts(data).min() >= 9
    pixels = [np.asarray(data.read(i)).tobytes() for i in range(100)]
    same, other = (load_data("digits", "train", limit=100, seed=s) for s in (1, 2))
    assert pixels == [np.asarray(same.read(i)).tobytes() for i in range(100)]
    assert pixels != [np.asarray(other.read(i)).tobytes() for i in range(100)]


def test_a_limit_above_the_data_is_refused_with_both_numbers():
    with pytest.raises(ConfigError, match="limit of 5000 examples exceeds the 359 of digits"):
        load_data("digits", "test", limit=5000)
    with pytest.raises(ConfigError, match="must be 0, for all, or more; got -1"):
        load_data("digits", "test", limit=-1)


def test_data_can_be_sent_to_worker_processes(tmp_path):
    for source in ("digits", str(image_folder(tmp_path))):
        data = load_data(source, "train").subset([1, 0])
        copy = pickle.loads(pickle.dumps(data))
        assert copy.read(0).tobytes() == data.read(0).tobytes()


@pytest.fixture
def torchvision_root(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEET_DATA", str(tmp_path))
    return tmp_path


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("source", "key", "meta_key"),
    [("cifar10", "labels", "label_names"), ("cifar100", "fine_labels", "fine_label_names")],
)
def test_cifar_is_read_from_torchvisions_files(
    source, key, meta_key, torchvision_root, monkeypatch
):
    from torchvision import datasets

    cifar = getattr(datasets, source.upper())
    folder = torchvision_root / cifar.base_folder
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 3072), dtype=np.uint8)

    def write(name, value):
        (folder / name).write_bytes(pickle.dumps(value))
        return [name, md5(folder / name)]

    train = [write("train_part", {"data": pixels[:6], key: [0, 1, 2, 0, 1, 2]})]
    test = [write("test_part", {"data": pixels[6:], key: [2, 1]})]
    name, digest = write("meta_part", {meta_key: ["ape", "bee", "cow"]})
    monkeypatch.setattr(cifar, "train_list", train)
    monkeypatch.setattr(cifar, "test_list", test)
    monkeypatch.setattr(cifar, "meta", {"filename": name, "key": meta_key, "md5": digest})

    data = load_data(source, "train")
    assert data.classes == ("ape", "bee", "cow")
    assert data.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert np.array_equal(np.asarray(data.read(4)).transpose(2, 0, 1).ravel(), pixels[4])
    assert load_data(source, "test").labels.tolist() == [2, 1]


def test_flowers_are_read_from_torchvisions_files(torchvision_root, monkeypatch):
    from scipy.io import savemat
    from torchvision.datasets import Flowers102

    folder = torchvision_root / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    for i in range(1, 7):
        (folder / "jpg" / f"image_{i:05d}.jpg").write_bytes(jpeg((40 * i, 0, 0)))
    savemat(folder / "imagelabels.mat", {"labels": [1, 2, 3, 1, 102, 3]})
    savemat(folder / "setid.mat", {"trnid": [1, 2, 3], "valid": [4], "tstid": [5, 6]})
    files = {
        k: (f, md5(folder / f)) for k, f in (("label", "imagelabels.mat"), ("setid", "setid.mat"))
    }
    monkeypatch.setattr(Flowers102, "_file_dict", files)

    test = load_data("flowers102", "test")
    assert len(test.classes) == 102
    assert test.labels.tolist() == [101, 2]
    assert load_data("flowers102", "train").labels.tolist() == [0, 1, 2]
    assert test.read(0).getpixel((0, 0))[0] == pytest.approx(200, abs=3)


def test_food_is_read_from_torchvisions_files(torchvision_root):
    folder = torchvision_root / "food-101"
    (folder / "meta").mkdir(parents=True)
    image_folder(folder / "images", per_class=2)
    for split, i in (("train", 0), ("test", 1)):
        listed = {name: [f"{name}/{i:02d}"] for name in COLOURS}
        (folder / "meta" / f"{split}.json").write_text(json.dumps(listed))
    data = load_data("food101", "test")
    assert data.classes == ("cat", "dog", "owl") and data.labels.tolist() == [0, 1, 2]
    assert data.read(1).getpixel((0, 0)) == pytest.approx(COLOURS["dog"], abs=3)


@pytest.mark.parametrize("fault", [URLError("no network"), RuntimeError("File not found")])
def test_torchvision_without_network_tells_the_ways_out(fault, torchvision_root, monkeypatch):
    def offline(*args, **kwargs):
        raise fault

    monkeypatch.setattr("torchvision.datasets.CIFAR10", offline)
    with pytest.raises(ConfigError) as caught:
        load_data("cifar10", "train")
    for words in (
        f"cifar10 is not in {torchvision_root} and could not be downloaded",
        str(fault),
        "put cifar-10-python.tar.gz in that folder (FLEET_DATA names another)",
        "local parquet folder or an ImageFolder directory",
    ):
        assert words in str(caught.value)


# Sources: Hugging Face and tables


def hub_split(labels, **features):
    import datasets

    images = [{"bytes": jpeg((60 * label, 0, 0)), "path": None} for label in labels]
    rows = {"img": images, **{name: labels for name in features}}
    return datasets.Dataset.from_dict(
        rows, features=datasets.Features(img=datasets.Image(), **features)
    )


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the Hub: what `load_dataset` returns, by name."""
    import datasets

    repositories = {}

    def load_dataset(name):
        if name not in repositories:
            raise ConnectionError(f"Couldn't reach '{name}' on the Hub")
        return datasets.DatasetDict(repositories[name])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return repositories


@pytest.mark.parametrize("source", ["hf:someone/animals", "someone/animals"])
def test_a_hub_data_set_finds_its_columns_and_its_splits(source, hub):
    from datasets import ClassLabel

    coarse, fine = ClassLabel(names=["a", "b", "c"]), ClassLabel(names=["x", "y", "z"])
    hub["someone/animals"] = {
        "train": hub_split([0, 1, 2], coarse=coarse, fine_label=fine),
        "validation": hub_split([2, 1], coarse=coarse, fine_label=fine),
    }
    train, test = load_data(source, "train"), load_data(source, "test")
    assert train.classes == test.classes == ("x", "y", "z")
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1, 2], [2, 1])
    assert test.read(0).mode == "RGB"
    assert test.read(0).getpixel((0, 0))[0] == pytest.approx(120, abs=3)


def test_a_hub_data_set_with_training_only_holds_a_fifth_out(hub):
    from datasets import Value

    hub["plain"] = {"train": hub_split([0, 1] * 10, target=Value("int32"))}
    assert counts(load_data("hf:plain", "train")).tolist() == [8, 8]
    assert counts(load_data("hf:plain", "test")).tolist() == [2, 2]


def test_the_hub_out_of_reach_tells_the_ways_out(hub):
    with pytest.raises(ConfigError) as caught:
        load_data("someone/else", "train")
    assert "someone/else could not be loaded from the Hugging Face Hub" in str(caught.value)
    assert "Couldn't reach 'someone/else'" in str(caught.value)
    assert "give a local parquet folder or an ImageFolder directory" in str(caught.value)


def test_a_hub_data_set_without_training_split_is_refused(hub):
    from datasets import Value

    hub["odd"] = {"extra": hub_split([0, 1], label=Value("int64"))}
    with pytest.raises(ConfigError, match="odd has no split named train, only extra"):
        load_data("hf:odd", "train")


def write_parquet(path, labels, **more):
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": jpeg((20 * i, 0, 0)), "path": f"{i}.jpg"} for i in range(len(labels))]
    parquet.write_table(pyarrow.table({"image": images, "label": labels, **more}), path)


def test_parquet_shards_of_plain_columns_are_read_by_split(tmp_path):
    write_parquet(tmp_path / "data/train-00000-of-00002.parquet", [0, 1, 0])
    write_parquet(tmp_path / "data/train-00001-of-00002.parquet", [1, 1])
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", [0, 2])
    train, test = (load_data(str(tmp_path), split) for split in ("train", "test"))
    assert train.labels.tolist() == [0, 1, 0, 1, 1]
    assert test.labels.tolist() == [0, 2]
    # The test part alone has class 2; both sides name it.
    assert train.classes == test.classes == ("0", "1", "2")
    assert train.read(2).getpixel((0, 0))[0] == pytest.approx(40, abs=3)
    assert train.read(4).getpixel((0, 0))[0] == pytest.approx(20, abs=3)


def test_a_single_parquet_file_holds_a_fifth_out(tmp_path):
    write_parquet(tmp_path / "all.parquet", [0, 1, 2, 3, 4] * 5)
    for source in (tmp_path / "all.parquet", tmp_path):
        assert counts(load_data(str(source), "train")).tolist() == [4] * 5
        assert counts(load_data(str(source), "test")).tolist() == [1] * 5


def test_a_saved_data_set_is_read_with_its_class_names(tmp_path):
    import datasets

    label = datasets.ClassLabel(names=["ape", "bee"])
    saved = datasets.DatasetDict(
        train=hub_split([0, 1, 1], label=label), test=hub_split([1, 0], label=label)
    )
    saved.save_to_disk(tmp_path / "saved")
    data = load_data(str(tmp_path / "saved"), "test")
    assert data.classes == ("ape", "bee") and data.labels.tolist() == [1, 0]
    assert data.read(0).getpixel((0, 0))[0] == pytest.approx(60, abs=3)


def test_cifar10_as_parquet_is_read_as_datasets_reads_it():
    if not CIFAR10.is_dir():
        pytest.skip(f"needs CIFAR-10 as parquet in {CIFAR10}")
    import datasets

    data = load_data(str(CIFAR10), "test")
    theirs = datasets.Dataset(datasets.table.InMemoryTable(_parquet_table("test")))
    assert len(data) == 10_000 and len(load_data(str(CIFAR10), "train")) == 50_000
    assert list(data.classes) == theirs.features["label"].names
    for i in (0, 77, 9_999):
        assert data.labels[i] == theirs[i]["label"]
        assert data.read(i).tobytes() == theirs[i]["image"].tobytes()


def _parquet_table(split):
    from pyarrow import parquet

    return parquet.read_table(CIFAR10 / f"{split}.parquet")


def test_images_are_decoded_when_they_are_read(tmp_path):
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"image": [b"no image", jpeg((9, 9, 9))] * 10, "label": [0, 1] * 10})
    parquet.write_table(table, tmp_path / "all.parquet")
    data = load_data(str(tmp_path / "all.parquet"), "train")
    bad = int(np.flatnonzero(data.labels == 0)[0])
    with pytest.raises(ConfigError, match=r"image \d+ of .*all.parquet cannot be decoded: .*; rem"):
        data.read(bad)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [0, 1]}, "no image column among label; it needs one of type Image"),
        ({"image": [b"", b""]}, "no label column among image; it needs one of type ClassLabel"),
        (
            {"image": [b"", b""], "a": [0, 1], "b": [1, 0]},
            "no label column among image, a, b; it needs",
        ),
        (
            {"image": [b"", b""], "label": [1, None]},
            "has 1 of 2 train examples without a label; use data whose train split is labelled",
        ),
    ],
)
def test_columns_that_cannot_be_told_are_named(columns, message, tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), tmp_path / "all.parquet")
    with pytest.raises(ConfigError, match=message):
        load_data(str(tmp_path), "train")


def test_files_that_are_not_what_they_say_are_named(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"something else")
    with pytest.raises(ConfigError, match=r"train.parquet cannot be read as parquet: .*; write it"):
        load_data(str(tmp_path), "train")
    (tmp_path / "train.parquet").unlink()
    (tmp_path / "train.arrow").write_bytes(b"something else")
    with pytest.raises(ConfigError, match=r"train.arrow cannot be read as arrow: .*; write it"):
        load_data(str(tmp_path), "train")


def test_shards_with_different_columns_are_refused(tmp_path):
    import pyarrow
    from pyarrow import parquet

    write_parquet(tmp_path / "train-0.parquet", [0, 1])
    other = pyarrow.table({"image": [b"", b""], "label": ["cat", "dog"]})
    parquet.write_table(other, tmp_path / "train-1.parquet")
    with pytest.raises(ConfigError, match=r"has files whose columns differ: .*; keep one data set"):
        load_data(str(tmp_path), "train")


# Sources: ImageFolder


def test_an_image_folder_is_torchvisions(tmp_path):
    from torchvision.datasets import ImageFolder

    image_folder(tmp_path / "train", per_class=4)
    image_folder(tmp_path / "test", per_class=2)
    (tmp_path / "train/cat/more").mkdir()
    (tmp_path / "train/cat/more/00.PNG").write_bytes(jpeg((1, 1, 1)))
    (tmp_path / "train/cat/notes.txt").write_text("no image")
    for split in ("train", "test"):
        data, theirs = load_data(str(tmp_path), split), ImageFolder(tmp_path / split)
        assert list(data.classes) == theirs.classes
        assert data.labels.tolist() == theirs.targets
        assert [str(file) for file in data.read.args[0]] == [file for file, _ in theirs.samples]
        assert all(data.read(i).tobytes() == theirs[i][0].tobytes() for i in range(len(data)))


def test_an_image_folder_without_splits_holds_the_same_fifth_out(tmp_path):
    image_folder(tmp_path)
    train, test = load_data(str(tmp_path), "train", seed=5), load_data(str(tmp_path), "test")
    assert counts(train).tolist() == [8, 8, 8] and counts(test).tolist() == [2, 2, 2]


def test_an_image_folder_may_call_its_test_part_val(tmp_path):
    image_folder(tmp_path / "train", per_class=3)
    image_folder(tmp_path / "val", per_class=2, classes=("dog",))
    test = load_data(str(tmp_path), "test")
    assert len(load_data(str(tmp_path), "train")) == 9
    assert test.classes == ("cat", "dog", "owl") and test.labels.tolist() == [1, 1]


@pytest.fixture(scope="module")
def torch_alone():
    """A process that has imported PyTorch and nothing else, to be forked."""
    with prepared("import torch") as process:
        yield process


def test_an_image_folder_needs_none_of_the_optional_packages(tmp_path, torch_alone):
    image_folder(tmp_path)
    program = f"""
import sys
for name in ("datasets", "flwr_datasets", "pyarrow", "pandas", "sklearn", "torchvision"):
    sys.modules[name] = None
from fleet.data import load_data
print(len(load_data({str(tmp_path)!r}, "train")))
"""
    said = torch_alone.run(program)
    assert said == "24"


def test_a_partition_brings_nothing_that_draws_and_leaves_flowers_package_whole(torch_alone):
    program = """
import sys
from fleet.data import partition
parts = partition([0, 1] * 20, "dirichlet:1", 2, 0)
brought = {"matplotlib", "seaborn", "scipy", "flwr_datasets"} & sys.modules.keys()
print(sum(map(len, parts)), brought)
import flwr_datasets
from flwr_datasets.visualization import plot_label_distributions
ours = flwr_datasets.partitioner.DirichletPartitioner
from fleet.data.partitions import _partitioners
print(flwr_datasets.FederatedDataset.__name__, ours is _partitioners().DirichletPartitioner)
"""
    said = torch_alone.run(program)
    assert said.splitlines() == ["40 set()", "FederatedDataset True"]


def test_digits_are_read_without_importing_scikit_learn(torch_alone):
    program = """
import sys
sys.modules["sklearn.datasets"] = None
from fleet.data import load_data
print(len(load_data("digits", "train").labels), "sklearn" in sys.modules)
"""
    said = torch_alone.run(program)
    assert said.split() == ["1438", "False"]


def test_digits_that_are_not_where_they_were_are_named(tmp_path, monkeypatch):
    (tmp_path / "sklearn").mkdir()
    (tmp_path / "sklearn/__init__.py").touch()
    monkeypatch.delitem(sys.modules, "sklearn", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"should hold .*digits.csv.gz and does not; install it"):
        load_data("digits", "train")


def test_links_that_lead_back_and_pipes_are_no_images(tmp_path):
    root = image_folder(tmp_path / "images", per_class=2)
    cat = root / "cat"
    (cat / "more").mkdir()
    (cat / "more/9.jpg").write_bytes(jpeg(COLOURS["cat"]))
    (cat / "more/self").symlink_to(cat)
    (cat / "more/all").symlink_to(root, target_is_directory=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "8.jpg").write_bytes(jpeg(COLOURS["cat"]))
    (cat / "linked").symlink_to(elsewhere)
    os.mkfifo(cat / "pipe.jpg")  # whoever opens it waits for ever
    (cat / "lost.jpg").symlink_to(tmp_path / "nothing")
    found = [path.relative_to(cat).as_posix() for path in image_files(cat)]
    assert found == ["00.jpg", "01.jpg", "linked/8.jpg", "more/9.jpg"]


def break_images(root):
    """Three kinds of damage: no image at all, a JPEG cut short, a PNG with a bad checksum."""
    (root / "cat/00.jpg").write_bytes(b"no image")
    buffer = io.BytesIO()
    photo(0, (64, 64)).save(buffer, "JPEG")
    (root / "dog/03.jpg").write_bytes(buffer.getvalue()[:-400])
    buffer = io.BytesIO()
    photo(0, (64, 64)).save(buffer, "PNG")
    png = bytearray(buffer.getvalue())
    png[200] ^= 255
    (root / "owl/05.png").write_bytes(png)
    (root / "owl/06.jpg").write_bytes(b"")


def test_unreadable_images_are_counted_and_the_first_named(tmp_path):
    break_images(image_folder(tmp_path))
    with pytest.raises(ConfigError) as caught:
        load_data(str(tmp_path), "train")
    message = str(caught.value)
    assert message.startswith(f"4 unreadable images in {tmp_path}: cat/00.jpg (")
    assert "; dog/03.jpg (image file is truncated" in message
    assert "; owl/05.png (" in message
    assert message.endswith(
        "; and 1 more; repair or remove them, or skip them with skip-unreadable = true"
    )


def test_unreadable_images_are_skipped_when_asked_with_a_warning(tmp_path):
    break_images(image_folder(tmp_path))
    with pytest.warns(UserWarning, match="skipped 4 unreadable images in .*: cat/00.jpg"):
        train = load_data(str(tmp_path), "train", skip_unreadable=True)
    with pytest.warns(UserWarning, match="skipped 4"):
        test = load_data(str(tmp_path), "test", skip_unreadable=True)
    assert (counts(train) + counts(test)).tolist() == [9, 9, 9]
    assert all(d.read(i).mode == "RGB" for d in (train, test) for i in range(len(d)))


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
@pytest.mark.parametrize("missing", [20, 4000])
@pytest.mark.parametrize("form", ["BMP", "TIFF", "WEBP", "GIF", "PPM", "JPEG", "PNG"])
def test_images_cut_short_are_found_in_every_format(form, missing, tmp_path):
    image_folder(tmp_path)
    buffer = io.BytesIO()
    photo(0, (64, 64)).save(buffer, form)
    # Pillow tells a format by its contents, whatever the name
    (tmp_path / "cat/00.bmp").write_bytes(buffer.getvalue())
    load_data(str(tmp_path), "train")
    (tmp_path / "cat/00.bmp").write_bytes(buffer.getvalue()[:-missing])
    with pytest.raises(
        ConfigError, match=r"1 unreadable image in .*: cat/00\.bmp \(.+\); repair or"
    ):
        load_data(str(tmp_path), "train")


def test_skipped_images_are_told_in_one_line_a_process(tmp_path, torch_alone):
    break_images(image_folder(tmp_path))
    program = f"""
from fleet.data import load_data
for split in ("train", "test"):
    load_data({str(tmp_path)!r}, split, skip_unreadable=True)
load_data({str(tmp_path)!r}, "train", skip_unreadable=True)
"""
    said = torch_alone.run(program)
    (line,) = said.splitlines()
    assert line.startswith(f"fleet.data:1: UserWarning: skipped 4 unreadable images in {tmp_path}")


def test_an_image_that_breaks_later_is_named(tmp_path):
    data = load_data(str(image_folder(tmp_path)), "train")
    for file in (tmp_path / "cat").iterdir():
        file.write_bytes(b"gone bad")
    with pytest.raises(ConfigError, match=r"cat/\d+.jpg cannot be decoded: .*; remove it from"):
        data.read(0)


def test_a_path_that_does_not_exist_is_named(tmp_path):
    for source in (str(tmp_path / "nowhere"), "./nowhere", "photos.parquet", "a/b/c"):
        with pytest.raises(ConfigError) as caught:
            load_data(source, "train")
        assert f"data {source} does not exist; known forms: digits, cifar10" in str(caught.value)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError) as caught:
        load_data("cifar11", "train")
    assert "data 'cifar11' is neither a known name nor a path here; known: " in str(caught.value)
    for form in (
        "digits",
        "cifar10,",
        "cifar100",
        "flowers102",
        "food101",
        "hf:OWNER/NAME",
        "parquet or arrow",
        "ImageFolder directory (DIR/CLASS/image.jpg)",
    ):
        assert form in str(caught.value)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(jpeg((1, 2, 3)))
    with pytest.raises(ConfigError, match=r"photo.jpg is a .jpg file; known forms: digits"):
        load_data(str(tmp_path / "photo.jpg"), "train")


def test_a_directory_without_class_folders_is_refused(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(jpeg((1, 2, 3)))
    with pytest.raises(ConfigError, match="has no class folders; put the images of each class in"):
        load_data(str(tmp_path), "train")


def test_a_single_class_is_refused(tmp_path):
    image_folder(tmp_path, classes=("cat",))
    with pytest.raises(ConfigError, match="train examples of only one class, cat; training needs"):
        load_data(str(tmp_path), "train")


def test_an_empty_class_folder_is_refused(tmp_path):
    (image_folder(tmp_path) / "emu").mkdir()
    with pytest.raises(ConfigError, match=r"class folder .*emu has no images \(.jpg, .*; fill it"):
        load_data(str(tmp_path), "train")


def test_classes_that_only_the_test_part_has_are_named(tmp_path):
    image_folder(tmp_path / "train", classes=("cat", "dog"))
    image_folder(tmp_path / "test", classes=("cat", "owl"))
    with pytest.raises(ConfigError, match=r"test has classes that .*train lacks: owl; the folders"):
        load_data(str(tmp_path), "test")


def test_too_few_images_to_hold_any_out_are_refused(tmp_path):
    image_folder(tmp_path, per_class=1)
    with pytest.raises(ConfigError, match="has no test examples; add images or use other data"):
        load_data(str(tmp_path), "test")


# Partitions

SPECS = ["iid", "dirichlet:0.1", "dirichlet:1", "classes:2", "classes:10"]


@pytest.mark.parametrize("spec", SPECS)
@many("seed", range(4))
def test_partitions_are_a_disjoint_cover_without_empty_parts(spec, seed):
    labels = random_labels(seed)
    for clients in (1, 5, 12):
        if spec == "classes:2" and clients == 1:
            continue  # reaches 2 of 10 classes: refused, see below
        parts = partition(labels, spec, clients, seed)
        assert len(parts) == clients
        assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
        assert min(len(part) for part in parts) >= 2
        assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(600))


@pytest.mark.parametrize("spec", SPECS)
def test_partitions_repeat_with_the_seed_and_change_with_it(spec):
    labels = random_labels(0)
    first, same, other = (partition(labels, spec, 6, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("clients", [1, 7, 100])
def test_iid_sizes_differ_by_one_at_most_and_mix_sorted_classes(clients):
    labels = np.sort(random_labels(0))
    parts = partition(labels, "iid", clients, seed=0)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    if clients == 7:
        assert all(len(set(labels[part])) == 10 for part in parts)


def skew(labels, parts):
    """Mean total-variation distance of the clients' class shares from those of all data."""
    overall = np.bincount(labels, minlength=10) / len(labels)
    shares = [np.bincount(labels[part], minlength=10) / len(part) for part in parts]
    return np.mean([abs(share - overall).sum() / 2 for share in shares])


def test_dirichlet_skew_falls_with_alpha():
    cases = [(seed, random_labels(seed)) for seed in range(5)]
    skews = [
        np.mean(
            [skew(labels, partition(labels, f"dirichlet:{alpha}", 8, s)) for s, labels in cases]
        )
        for alpha in (0.1, 0.5, 2, 100)
    ]
    assert (np.diff(skews) < 0).all()
    even = np.mean([skew(labels, partition(labels, "iid", 8, s)) for s, labels in cases])
    assert skews[0] > 0.5 and abs(skews[-1] - even) < 0.1


def flowers_parts(partitioner, labels, order):
    import datasets

    partitioner.dataset = datasets.Dataset.from_dict({"label": labels[order], "index": order})
    parts = [partitioner.load_partition(i)["index"] for i in range(partitioner.num_partitions)]
    return [sorted(part) for part in parts]


@pytest.mark.filterwarnings("ignore:The specified min_partition_size")
@pytest.mark.parametrize(("alpha", "clients"), [(0.2, 5), (0.5, 5), (1.0, 1), (1.5, 20)])
@many("seed", range(5))
def test_dirichlet_is_flowers_own_partition_for_the_seed(alpha, clients, seed):
    from flwr_datasets.partitioner import DirichletPartitioner

    labels = random_labels(seed)
    theirs = DirichletPartitioner(clients, "label", alpha, min_partition_size=10, seed=seed)
    ours = partition(labels, f"dirichlet:{alpha}", clients, seed)
    assert [part.tolist() for part in ours] == flowers_parts(theirs, labels, np.arange(600))


@pytest.mark.parametrize("clients", [1, 7, 600])
def test_iid_is_cut_as_flower_cuts(clients):
    from flwr_datasets.partitioner import IidPartitioner

    labels = random_labels(2)
    order = np.random.default_rng(9).permutation(600)  # what `partition` puts the images in
    ours = partition(labels, "iid", clients, seed=9)
    assert [part.tolist() for part in ours] == flowers_parts(IidPartitioner(clients), labels, order)


def test_dirichlet_with_a_small_alpha_still_fills_every_client():
    # Flower alone gives up on this: ten draws that all leave a client nearly empty.
    parts = partition(random_labels(0, 1400), "dirichlet:0.1", 50, seed=0)
    assert min(len(part) for part in parts) >= 2


@pytest.mark.parametrize("clients", [10, 25])
@pytest.mark.parametrize("per_client", [1, 2, 3])
def test_classes_gives_each_client_so_many_classes(per_client, clients):
    labels = random_labels(0)
    parts = partition(labels, f"classes:{per_client}", clients, seed=0)
    assert {len(set(labels[part])) for part in parts} == {per_client}


@pytest.mark.parametrize(("clients", "per_client"), [(5, 2), (4, 3), (4, 4), (2, 9), (6, 8)])
def test_classes_over_few_clients_still_reaches_all_classes(clients, per_client):
    labels = np.sort(random_labels(1))
    parts = partition(labels, f"classes:{per_client}", clients, seed=0)
    held = [set(labels[part]) for part in parts]
    assert max(len(classes) for classes in held) <= per_client
    assert set.union(*held) == set(range(10))
    assert sum(len(part) for part in parts) == 600


def test_partitions_are_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        partition(random_labels(0, 400), "dirichlet:0.1", 10, seed=0)


@pytest.mark.parametrize(
    ("spec", "clients", "message"),
    [
        ("iid", 0, "clients must be at least 1, got 0"),
        ("iid", 601, "600 examples cannot be dealt out to 601 clients; use fewer clients or more"),
        ("shards:2", 5, "partition 'shards:2' is unknown; known: iid, dirichlet:ALPHA .*classes:N"),
        ("iid:3", 5, "partition 'iid:3' is unknown"),
        ("dirichlet", 5, "'dirichlet' needs alpha, a number above 0, got ''; known: iid"),
        ("dirichlet:0", 5, "'dirichlet:0' needs alpha, a number above 0, got '0'"),
        ("dirichlet:-1", 5, "needs alpha, a number above 0, got '-1'"),
        ("dirichlet:nan", 5, "needs alpha, a number above 0, got 'nan'"),
        ("dirichlet:inf", 5, "needs alpha, a number above 0, got 'inf'"),
        ("classes:0.5", 5, "'classes:0.5' needs N, a whole number above 0, got '0.5'"),
        ("classes:0", 5, "needs N, a whole number above 0, got '0'"),
        ("dirichlet:0.01", 200, "dirichlet:0.01 over 200 clients and 600 examples .*; raise alpha"),
        (
            "classes:11",
            5,
            "classes:11 asks for more classes than the 10 of the data; use classes:10",
        ),
        (
            "classes:2",
            3,
            "over 3 clients reaches at most 6 of 10 classes; use classes:4 or more cl",
        ),
        (
            "classes:5",
            300,
            r"the \d+ examples of class \d cannot be shared by the 150 clients that",
        ),
    ],
)
def test_partitions_that_cannot_be_are_refused(spec, clients, message):
    with pytest.raises(ConfigError, match=message):
        partition(random_labels(0), spec, clients, seed=0)


# Optional packages


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("sklearn", lambda tmp: load_data("digits", "train")),
        ("scipy.io", lambda tmp: load_data("flowers102", "train")),
        ("datasets", lambda tmp: load_data("hf:someone/animals", "train")),
        ("pyarrow", lambda tmp: load_data(str(tmp), "train")),
        ("flwr_datasets.partitioner", lambda tmp: partition([0, 1], "iid", 2, 0)),
    ],
)
def test_a_missing_extra_is_named(module, call, tmp_path, monkeypatch):
    (tmp_path / "train.parquet").touch()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError) as caught:
        call(tmp_path)
    assert f"needs {module}, which is not installed" in str(caught.value)
    assert "pip install fleet-mobiletl[sim]" in str(caught.value)


# Order of an epoch


@many("seed", range(5))
def test_a_shuffled_epoch_visits_every_image_once(seed):
    labels = np.random.default_rng(seed).integers(4, size=50)
    order = visiting_order(labels, "shuffled", np.random.default_rng(seed))
    assert sorted(order) == list(range(50))
    assert np.array_equal(order, np.random.default_rng(seed).permutation(50))


def chi_square(observed):
    expected = observed.sum() / len(observed)
    return float((np.square(observed - expected) / expected).sum())


@many("seed", range(10))
def test_a_balanced_epoch_draws_classes_and_their_images_alike(seed):
    """χ² of 4 and of up to 59 degrees of freedom; 23.5 and 110 are exceeded once in 10,000."""
    rng = np.random.default_rng(seed)
    counts = {7: 60, 0: 3, 2: 20, 9: 1, 5: 16}  # no class 1, say
    labels = rng.permutation(np.repeat(list(counts), list(counts.values())))
    orders = [visiting_order(labels, "balanced", rng) for _ in range(40)]
    assert all(len(order) == len(labels) == 100 for order in orders)
    drawn = np.bincount(np.concatenate(orders), minlength=100)
    assert chi_square(np.array([drawn[labels == c].sum() for c in counts])) < 23.5
    for c in counts:
        assert chi_square(drawn[labels == c]) < 110


def test_a_balanced_epoch_is_the_same_for_the_same_seed_and_no_other():
    labels = np.arange(30) % 3
    orders = [
        visiting_order(labels, "balanced", np.random.default_rng(seed)).tolist()
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert len(set(orders[0])) < 30  # with replacement


@pytest.mark.parametrize("sampler", ["shuffled", "balanced"])
def test_an_epoch_of_one_image_and_of_one_class(sampler):
    rng = np.random.default_rng(0)
    assert visiting_order(np.array([4]), sampler, rng).tolist() == [0]
    assert set(visiting_order(np.full(9, 4), sampler, rng)) <= set(range(9))
