"""An image's identity: its content, wherever it lies, and nothing else."""

import hashlib
import io
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from fleet.data import ImageData, load_data, partition, split_validation
from fleet.errors import ConfigError
from tests.many import many


def blake2b(content):
    return hashlib.blake2b(content, digest_size=16).digest()


def jpeg(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def image_folder(root, per_class=5):
    """Image `number` of class `name` shows seed 10·class + number."""
    for label, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            (root / name / f"{i:02d}.jpg").write_bytes(jpeg(10 * label + i))
    return root


def identities(data):
    return [data.identity(i) for i in range(len(data))]


def parquet(path, images, labels):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"image": images, "label": labels}), path)
    return str(path)


@pytest.fixture
def undecodable(monkeypatch):
    """From here on, decoding an image is an error."""

    def refuse(*args, **kwargs):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr("PIL.Image.open", refuse)


def test_a_file_is_known_by_its_bytes_without_decoding(tmp_path, request):
    data = load_data(str(image_folder(tmp_path / "train").parent), "train")
    request.getfixturevalue("undecodable")
    files = data.read.args[1].args[0]  # of a subset: a fifth is held out
    expected = [blake2b(files[i].read_bytes()) for i in data.read.args[0]]
    assert identities(data) == expected and len(set(expected)) == len(data)


@pytest.mark.parametrize("form", ["bytes", "struct", "path"])
def test_a_cell_is_known_by_its_bytes_without_decoding(form, tmp_path, undecodable):
    encoded = [jpeg(i) for i in range(10)]
    images = encoded
    if form == "struct":
        images = [{"bytes": b, "path": None} for b in encoded]
    if form == "path":
        images = [{"bytes": None, "path": str(tmp_path / f"{i}.jpg")} for i in range(10)]
        for i, content in enumerate(encoded):
            (tmp_path / f"{i}.jpg").write_bytes(content)
        images[0]["bytes"] = encoded[0]  # so that the column has a type
    source = parquet(tmp_path / "all.parquet", images, [0, 1] * 5)
    found = {i for split in ("train", "test") for i in identities(load_data(source, split))}
    assert found == {blake2b(b) for b in encoded}


def test_the_same_image_is_the_same_in_every_source_and_place(tmp_path):
    folder = load_data(str(image_folder(tmp_path / "a")), "train")
    (tmp_path / "b/train").mkdir(parents=True)
    image_folder(tmp_path / "b/train", per_class=8)
    image_folder(tmp_path / "b/test")
    other = load_data(str(tmp_path / "b"), "train")
    table = load_data(
        parquet(
            tmp_path / "all.parquet", [jpeg(s) for s in (*range(5), *range(10, 15))], [0, 1] * 5
        ),
        "train",
    )
    assert set(identities(folder)) < set(identities(other))
    assert set(identities(table)) < set(identities(other))


def test_digits_are_known_by_their_pixels():
    from sklearn.datasets import load_digits

    pixels = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
    found = [i for split in ("train", "test") for i in identities(load_data("digits", split))]
    assert sorted(found) == sorted(blake2b(image.tobytes()) for image in pixels)


def test_cifar_is_known_by_its_pixels(tmp_path, monkeypatch):
    from torchvision import datasets

    class Cifar:
        def __init__(self, root, train, **_):
            self.data = np.random.default_rng(train).integers(0, 256, (4, 32, 32, 3), np.uint8)
            self.targets, self.classes = [0, 1, 0, 1], ["ape", "bee"]

    monkeypatch.setattr(datasets, "CIFAR10", Cifar)
    expected = [blake2b(image.tobytes()) for image in Cifar(None, train=True).data]
    assert identities(load_data("cifar10", "train")) == expected


def test_flowers_are_known_by_their_files(tmp_path, monkeypatch, undecodable):
    pytest.importorskip("scipy.io")
    from torchvision import datasets

    files = [tmp_path / f"{i}.jpg" for i in range(4)]
    for i, file in enumerate(files):
        file.write_bytes(jpeg(i))

    class Flowers:
        def __init__(self, root, split, **_):
            self._image_files, self._labels, self.classes = files, [0, 1, 0, 1], ["a", "b"]

    monkeypatch.setattr(datasets, "Flowers102", Flowers)
    assert identities(load_data("flowers102", "train")) == [blake2b(jpeg(i)) for i in range(4)]


def test_torchvisions_own_flowers_and_food_name_their_files():
    from torchvision.datasets import Flowers102, Food101

    for kind in (Flowers102, Food101):
        assert "_image_files" in kind.__init__.__code__.co_names


@many("seed", range(5))
def test_subsets_splits_and_partitions_keep_identities(seed):
    data = load_data("digits", "test")
    mine = dict(
        zip((data.read(i).tobytes() for i in range(len(data))), identities(data), strict=True)
    )
    parts = [data.subset(p) for p in partition(data.labels, "dirichlet:0.5", 4, seed)]
    parts = [side for part in parts for side in split_validation(part, 0.2, seed)]
    for part in parts:
        for i in range(len(part)):
            assert part.identity(i) == mine[part.read(i).tobytes()]
    assert sum(map(len, parts)) == len(data)


def test_without_encoded_bytes_pixels_and_size_tell_images_apart():
    grey = np.zeros((2, 3), np.uint8)
    images = [Image.fromarray(a).convert("RGB") for a in (grey, grey.T, grey + 1, grey.copy())]
    data = ImageData("toy", ("a",), np.zeros(4), images.__getitem__)
    wide, tall, other, copy = identities(data)
    assert wide == copy and len({wide, tall, other}) == 3
    assert all(len(i) == 16 for i in (wide, tall, other))
    assert data.subset([2, 0]).subset([1]).identity(0) == wide


def test_an_image_overwritten_in_place_is_another(tmp_path):
    data = load_data(str(image_folder(tmp_path)), "train")
    file = data.read.args[1].args[0][data.read.args[0][0]]
    before, state = data.identity(0), file.stat()
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert file.stat().st_size == state.st_size
    assert data.identity(0) == blake2b(content) != before


def test_identity_can_be_sent_to_worker_processes(tmp_path):
    table = parquet(tmp_path / "all.parquet", [jpeg(i) for i in range(10)], [0, 1] * 5)
    for source in ("digits", str(image_folder(tmp_path / "folder")), table):
        data = load_data(source, "train").subset([1, 0])
        assert identities(pickle.loads(pickle.dumps(data))) == identities(data)


def test_relabelled_images_keep_their_identity():
    data = load_data("digits", "test")
    assert identities(replace(data, labels=data.labels[::-1])) == identities(data)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    data = load_data(str(image_folder(tmp_path)), "train")
    for file in (tmp_path / "cat").iterdir():
        file.unlink()
    text = r"cat/\d\d.jpg cannot be read: .*No such file.*; remove it from the data or replace it"
    with pytest.raises(ConfigError, match=text):
        data.identity(0)


def test_a_cell_whose_file_is_gone_is_named(tmp_path):
    images = [{"bytes": None, "path": str(tmp_path / "gone.jpg")}] * 10
    images[0] = {"bytes": jpeg(0), "path": None}
    data = load_data(parquet(tmp_path / "all.parquet", images, [0] * 5 + [1] * 5), "train")
    with pytest.raises(ConfigError, match=r"image \d of .*all.parquet cannot be read: .*; remove"):
        data.identity(len(data) - 1)


def test_a_missing_image_is_named_when_it_is_read(tmp_path):
    images = [jpeg(0), *[None] * 9]
    data = load_data(parquet(tmp_path / "all.parquet", images, [0] * 5 + [1] * 5), "train")
    assert data.identity(len(data) - 1) == blake2b(b"")
    with pytest.raises(ConfigError, match=r"image \d of .* cannot be decoded: .*; remove it from"):
        data.read(len(data) - 1)
