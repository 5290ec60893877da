"""A device whose images come and go between rounds."""

import numpy as np
import pytest
from PIL import Image

from clients.client import Client
from clients.local_update import enrol, train_task
from fleet.backbones import load_backbone
from fleet.codec import Versions
from fleet.config import default_settings, read_config
from fleet.errors import ConfigError
from fleet.message import Task
from fleet.mobiletl import TransferModel
from fleet.plan import make_plan
from fleet.state import capture

pytestmark = pytest.mark.usefixtures("quick_runs")

SMALL = {"backbone": "mobilenet_v3_small", "weights": "none", "image-size": 32, "local-epochs": 2}


def add(folder, count, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}-{i}.png")


@pytest.fixture
def device(tmp_path, monkeypatch):
    """Function (round) → metrics of a round on a device of cats and dogs."""
    monkeypatch.setenv("FLEET_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("FLEET_CACHE", str(tmp_path / "cache"))
    for seed, name in enumerate(("cat", "dog")):
        add(tmp_path / "images" / name, 20, seed)
    backbone = load_backbone("mobilenet_v3_small", num_classes=3, image_size=32, weights="none")
    plan = make_plan(backbone, method="mobiletl", blocks=1)
    download = Versions(capture(backbone.model, plan), "float32").download(None)
    node = {"name": "attic", "data": str(tmp_path / "images")}

    class Device:
        images, cache = tmp_path / "images", tmp_path / "cache"
        classes = ("cat", "dog", "owl")

        def client(self, **settings):
            settings = {key.replace("_", "-"): value for key, value in settings.items()}
            return Client.of(7, node, read_config(default_settings() | SMALL | settings))

        def train(self, server_round, **settings):
            task = Task(plan.summary(), self.classes, server_round, "ab12")
            return train_task(self.client(**settings), task, download)[1]

    return Device()


@pytest.fixture
def through_the_prefix(monkeypatch):
    """How many images the frozen part has run."""
    seen, features = [], TransferModel.features

    def counted(self, images):
        if not images.is_meta:  # of the planner, which runs none
            seen.append(len(images))
        return features(self, images)

    monkeypatch.setattr(TransferModel, "features", counted)
    return seen


def test_each_round_sees_what_is_there_and_runs_what_is_new(device, through_the_prefix):
    def round_of(number):
        """Images trained on, and images that the frozen part ran."""
        before = sum(through_the_prefix)
        examples = device.train(number)["num-examples"]
        return examples, sum(through_the_prefix) - before

    first, ran = round_of(1)
    blank = 2  # to measure a step of so many images that no cache holds, once for each length
    # And one to see what comes out of a new model.
    assert 20 < first < 40 and ran == first + 1 + blank
    add(device.images / "dog", 20, seed=5)
    second, ran = round_of(2)
    assert first < second <= first + 20
    assert ran == second - first + blank  # what was there before came from the cache
    for path in (device.images / "dog").glob("5-*"):
        path.unlink()
    assert round_of(3) == (first, 0)


def test_the_cache_stays_bounded_while_the_folder_grows(device):
    for seed in range(10, 14):
        add(device.images / "cat", 30, seed)
        device.train(seed, cache_mib=0.25)
        used = sum(f.stat().st_size for f in device.cache.rglob("*") if f.is_file())
        assert 0 < used <= 0.25 * 2**20


def test_a_file_on_its_way_is_counted(device):
    assert "skipped-images" not in device.train(1)
    (device.images / "cat" / "half.png").write_bytes(b"\x89PNG\r\n")
    with pytest.warns(UserWarning, match="skipped 1 unreadable image"):
        assert device.train(2)["skipped-images"] == 1


def test_a_class_that_the_device_lacks_is_no_matter(device):
    assert enrol(device.client()).classes == ("cat", "dog")
    device.train(1)


def test_a_folder_of_an_unknown_class_refuses_the_round_by_name_until_it_is_gone(device):
    device.train(1)
    (device.images / "yak").mkdir()
    device.train(2)  # an empty one is no class yet
    add(device.images / "yak", 6, seed=3)
    text = (
        r"images has classes yak, which the server does not know; it knows cat, dog, owl; move "
        r"these folders away, or begin a run that knows them"
    )
    with pytest.raises(ConfigError, match=text):
        device.train(3)
    (device.images / "yak").rename(device.images / "owl")
    device.train(4)


def test_a_device_without_images_is_named_as_it_says_so(device, tmp_path):
    for path in device.images.rglob("*.png"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"^attic: .*images"):
        enrol(device.client())
