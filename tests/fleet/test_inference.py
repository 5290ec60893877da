import re

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models
from torchvision.transforms import functional as F

import fleet
from fleet.backbones import Preprocessing
from fleet.errors import ConfigError
from fleet.trained import TrainedModel

CLASSES = ("cat", "dog", "yak")
PREPARED = Preprocessing(40, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = models.mobilenet_v3_small(num_classes=3)
    return TrainedModel(
        backbone="mobilenet_v3_small", model=model, classes=CLASSES, preprocessing=PREPARED
    )


@pytest.fixture
def photos(tmp_path):
    """Eleven files of different sizes and modes."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(11):
        pixels = rng.integers(0, 256, (30 + i, 50 - i, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).convert("L" if i % 3 == 0 else "RGB")
        paths.append(tmp_path / f"{i}.{'png' if i % 2 else 'jpg'}")
        image.save(paths[-1])
    return paths


def expected(model, path):
    """Probabilities by torchvision alone."""
    image = F.to_tensor(Image.open(path).convert("RGB").resize((40, 40), Image.Resampling.BILINEAR))
    x = F.normalize(image, PREPARED.mean, PREPARED.std)[None]
    with torch.inference_mode():
        return model.eval()(x).softmax(1)[0]


def test_probabilities_are_the_model_s_on_images_prepared_as_in_training(trained, photos):
    found = fleet.predict(trained, photos, top=3)
    assert [one.image for one in found] == [str(path) for path in photos]
    for one, path in zip(found, photos, strict=True):
        probabilities = expected(trained.model, path)
        assert [name for name, _ in one.ranking] == [
            CLASSES[i] for i in probabilities.argsort(descending=True)
        ]
        for name, value in one.ranking:
            assert value == pytest.approx(float(probabilities[CLASSES.index(name)]), abs=1e-5)
        assert one.fault is None


def test_top_says_how_many_classes_are_told(trained, photos):
    for top, told in ((1, 1), (2, 2), (9, 3)):
        (one,) = fleet.predict(trained, photos[:1], top=top)
        assert len(one.ranking) == told
    with pytest.raises(ConfigError, match="top must be at least 1, got 0"):
        fleet.predict(trained, photos, top=0)


def test_an_image_that_cannot_be_read_leaves_the_others_predicted(trained, photos, tmp_path):
    (tmp_path / "note.txt").write_text("no image")
    torn = tmp_path / "torn.jpg"
    torn.write_bytes(photos[0].read_bytes()[:300])
    bad = [tmp_path / "none.png", tmp_path / "note.txt", torn, tmp_path]
    images = [photos[0], bad[0], photos[1], *bad[1:], *photos[2:]]
    found = {one.image: one for one in fleet.predict(trained, images)}
    whole = {one.image: one for one in fleet.predict(trained, photos)}
    assert found[str(bad[0])].fault == "No such file or directory"
    assert found[str(bad[1])].fault.startswith("cannot identify image file")
    assert "truncated" in found[str(bad[2])].fault.lower()
    assert found[str(bad[3])].fault == "Is a directory"
    assert all(found[str(path)].ranking == () for path in bad)
    for path in photos:
        assert found[str(path)].ranking[0][0] == whole[str(path)].ranking[0][0]


def test_nothing_but_bad_images_is_all_faults(trained, tmp_path):
    assert [one.ranking for one in fleet.predict(trained, [tmp_path / "a", tmp_path / "b"])] == [
        (),
        (),
    ]


def test_loaded_images_are_named_by_their_place(trained, photos):
    opened = [Image.open(path) for path in photos]
    found = fleet.predict(trained, opened)
    assert [one.image for one in found] == [str(i) for i in range(11)]
    by_file = fleet.predict(trained, photos)
    assert [one.ranking for one in found] == [one.ranking for one in by_file]


def test_what_fit_returned_predicts_as_its_model_does():
    rng = np.random.default_rng(0)
    images = [
        (Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)), i % 2)
        for i in range(8)
    ]
    settings = {"weights": "none", "cache": "off"}
    fitted = fleet.fit(
        "mobilenet_v3_small", images_of(images), epochs=1, image_size=32, settings=settings
    )
    (one,) = fleet.predict(fitted, [images[0][0]], top=2)
    with torch.inference_mode():
        probabilities = fitted.model(fitted.transform(images[0][0])[None]).softmax(1)[0]
    assert dict(one.ranking) == pytest.approx(
        {name: float(p) for name, p in zip(fitted.classes, probabilities, strict=True)}, abs=1e-5
    )


def images_of(pairs):
    from fleet.data import of_dataset

    class Pairs(list):
        classes = ("even", "odd")

    return of_dataset(Pairs(pairs))


def test_the_package_has_no_other_names():
    with pytest.raises(AttributeError, match=re.escape("module 'fleet' has no attribute 'fits'")):
        _ = fleet.fits
