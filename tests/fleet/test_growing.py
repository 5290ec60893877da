"""A folder of images that changes between rounds."""

import shutil

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from fleet.data import load_device_data
from fleet.data.folders import load_folder
from fleet.data.growing import load_growing
from fleet.errors import ConfigError

# Whatever is skipped is told in a warning, once a process for the same text.
pytestmark = pytest.mark.filterwarnings("ignore:skipped")


def add(folder, count, seed=0, suffix="png"):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}-{i:03}.{suffix}")


def shown(images):
    """Pixels of an image → name of its class."""
    return {
        np.asarray(images.read(i)).tobytes(): images.classes[label]
        for i, label in enumerate(images.labels)
    }


@pytest.fixture
def root(tmp_path):
    add(tmp_path / "cat", 60, seed=1)
    add(tmp_path / "dog", 60, seed=2)
    return tmp_path


def test_every_image_is_on_one_side_and_one_in_five_is_held_out(root):
    training, held_out = load_growing(root)
    assert training.classes == held_out.classes == ("cat", "dog")
    assert len(training) + len(held_out) == 120
    assert 12 < len(held_out) < 36  # 24 ± 2.7 standard deviations of a coin with 1/5
    assert not shown(training).keys() & shown(held_out).keys()
    assert set(shown(training).values()) == set(shown(held_out).values()) == {"cat", "dog"}
    assert shown(training) | shown(held_out) == shown(load_folder(root, "train")) | shown(
        load_folder(root, "test")
    )


def test_no_image_changes_sides_as_the_folder_grows_and_shrinks(root):
    before = [shown(side) for side in load_growing(root)]
    add(root / "cat", 40, seed=3)
    add(root / "yak", 30, seed=4)
    for path in list((root / "dog").iterdir())[:20]:
        path.unlink()
    after = [shown(side) for side in load_growing(root)]
    for (name, old), (_, other) in (
        (("training", before[0]), (0, after[1])),
        (("held out", before[1]), (0, after[0])),
    ):
        assert not old.keys() & other.keys(), name
    assert len(after[0]) + len(after[1]) == 120 + 70 - 20


def test_an_image_that_is_renamed_moved_or_copied_stays_on_its_side(root):
    before = [set(shown(side)) for side in load_growing(root)]
    for i, path in enumerate(sorted((root / "cat").iterdir())):
        path.rename(root / ("dog" if i % 2 else "cat") / f"renamed-{i}.png")
        shutil.copy(
            root / ("dog" if i % 2 else "cat") / f"renamed-{i}.png", root / "dog" / f"c{i}.png"
        )
    after = [set(shown(side)) for side in load_growing(root)]
    assert after == before


def test_a_file_that_is_half_copied_is_counted_and_comes_in_once_it_is_whole(root):
    add(root / "cat", 1, seed=9, suffix="jpg")
    (whole,) = (root / "cat").glob("9-*.jpg")
    data = whole.read_bytes()
    whole.write_bytes(data[: len(data) // 2])
    (root / "dog" / "no-image.png").write_text("")
    training, held_out = load_growing(root)
    assert training.skipped == held_out.skipped == 2
    assert len(training) + len(held_out) == 120
    whole.write_bytes(data)
    training, held_out = load_growing(root)
    assert training.skipped == 1
    assert len(training) + len(held_out) == 121


def test_what_is_skipped_is_named_in_a_warning(root):
    (root / "dog" / "torn.png").write_bytes(b"\x89PNG")
    with pytest.warns(
        UserWarning, match=r"skipped 1 unreadable image in .*: dog/torn.png \(cannot"
    ):
        load_growing(root)


@pytest.mark.parametrize(
    "name", ["cat/.0001.png", "cat/~0001.png", "cat/.thumbnails/1.png", ".trash/1.png", "cat/1.tmp"]
)
def test_hidden_and_temporary_files_are_passed_over(root, name):
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text("half of an image")
    training, held_out = load_growing(root)
    assert (training.skipped, len(training) + len(held_out)) == (0, 120)


def test_a_class_folder_without_an_image_is_no_class_yet(root):
    (root / "emu").mkdir()
    (root / "owl").mkdir()
    (root / "owl" / "torn.jpg").write_text("")
    assert load_growing(root)[0].classes == ("cat", "dog")


def test_a_device_may_have_one_class(root):
    shutil.rmtree(root / "dog")
    training, held_out = load_device_data(str(root))
    assert training.classes == held_out.classes == ("cat",)


def test_parts_are_kept_apart_and_may_lack_classes_of_each_other(tmp_path):
    add(tmp_path / "train" / "cat", 5, seed=1)
    add(tmp_path / "val" / "dog", 4, seed=2)
    training, held_out = load_growing(tmp_path)
    assert training.classes == held_out.classes == ("cat", "dog")
    assert_array_equal(training.labels, [0] * 5)
    assert_array_equal(held_out.labels, [1] * 4)


def test_a_training_part_alone_is_cut_in_two(tmp_path):
    add(tmp_path / "train" / "cat", 60, seed=1)
    training, held_out = load_growing(tmp_path)
    assert 0 < len(held_out) < len(training) < 60


@pytest.mark.parametrize("files", [(), ("cat/torn.jpg",), ("loose.png",)])
def test_an_empty_folder_is_told_what_belongs_there(tmp_path, files):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    unreadable = sum("/" in name for name in files)
    text = (
        rf"{tmp_path} has no images \(.jpg, .*\) in class folders, and {unreadable} files that "
        rf"cannot be read; put the images of each class in a folder of its own: "
        rf"{tmp_path}/CLASS/image.jpg"
    )
    with pytest.raises(ConfigError, match=text):
        load_device_data(str(tmp_path))


def test_a_folder_whose_images_are_all_held_out_says_so(root):
    kept = set(shown(load_growing(root)[1]))
    for path in [*root.glob("*/*.png")]:
        if np.asarray(Image.open(path)).tobytes() not in kept:
            path.unlink()
    text = f"{root} has no image to train on, only {len(kept)} that are held out; put more images"
    with pytest.raises(ConfigError, match=text):
        load_growing(root)


def test_a_folder_that_cannot_be_read_is_named(root, monkeypatch):
    def gone(self):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pathlib.Path.iterdir", gone)
    text = f"{root} cannot be read: Input/output error; make it readable for this user, or mount it"
    with pytest.raises(ConfigError, match=text):
        load_growing(root)


def test_other_sources_are_as_load_data_opens_them():
    training, held_out = load_device_data("digits")
    assert (len(training), len(held_out), training.skipped) == (1438, 359, 0)
