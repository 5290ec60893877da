"""Views: the same on every machine, and distributed as torchvision's."""

from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fleet.data.augment import AUGMENTATIONS, random_box, view_of
from fleet.errors import ConfigError
from tests.commands import printed_elsewhere
from tests.many import many

SIZES = [(64, 64), (40, 23), (23, 40), (300, 60), (1, 50), (50, 1), (1, 1), (2, 3)]


def identity(seed):
    return seed.to_bytes(16, "big")


def photo(width=40, height=23, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def place(width, height):
    """An image whose pixel (x, y) says x and y."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def boxes(width, height, number):
    drawn = [random_box(width, height, np.random.default_rng(seed)) for seed in range(number)]
    return np.array(drawn)


def torchvision_boxes(width, height, number):
    from torchvision.transforms import RandomResizedCrop

    image = Image.new("RGB", (width, height))
    torch.manual_seed(0)
    drawn = [RandomResizedCrop.get_params(image, [0.5, 1.0], [3 / 4, 4 / 3]) for _ in range(number)]
    return np.array([(left, top, left + w, top + h) for top, left, h, w in drawn])


@pytest.mark.parametrize("kinds", AUGMENTATIONS)
def test_view_nought_is_the_image_itself(kinds):
    image = photo()
    assert view_of(image, kinds, identity(0), 0) is image


@many("view", range(5))
def test_none_gives_the_image_for_every_view(view):
    image = photo()
    assert view_of(image, "none", identity(0), view) is image


@pytest.mark.parametrize("kinds", AUGMENTATIONS[1:])
@many("seed", range(5))
def test_a_view_is_decided_by_identity_and_number(kinds, seed):
    image, original = photo(), photo()

    def views(seed):
        return [view_of(image, kinds, identity(seed), v).tobytes() for v in range(1, 17)]

    assert views(seed) == views(seed)
    assert views(seed) != views(seed + 1)
    assert len(set(views(seed))) > 1
    assert image.tobytes() == original.tobytes()


def test_a_view_is_the_same_in_another_process():
    program = """
import hashlib, sys
from PIL import Image
from fleet.data.augment import view_of
image = Image.frombytes("RGB", (40, 23), bytes(i % 251 for i in range(40 * 23 * 3)))
views = [view_of(image, "flip+crop", bytes(range(16)), v) for v in range(20)]
print([v.size for v in views], hashlib.sha256(b"".join(v.tobytes() for v in views)).hexdigest())
"""
    there = printed_elsewhere(program)
    with redirect_stdout(StringIO()) as here:
        exec(program, {})
    assert there == here.getvalue() and there.startswith("[(40, 23), (")


def test_views_stay_as_they_were():
    """Cached features are known by a view's number: a change here needs a new key there."""
    image = place(100, 80)
    views = [view_of(image, "flip+crop", bytes(range(16)), v) for v in (1, 2, 3)]
    assert [(v.size, v.getpixel((0, 0))[:2]) for v in views] == [
        ((84, 76), (10, 4)),
        ((72, 71), (93, 1)),
        ((63, 80), (24, 0)),
    ]


def test_flips_are_about_half_and_mirror():
    image = photo()
    mirrored = ImageOps.mirror(image).tobytes()
    views = [view_of(image, "flip", identity(s), 1 + s % 7).tobytes() for s in range(2000)]
    assert set(views) == {image.tobytes(), mirrored}
    assert views.count(mirrored) == pytest.approx(1000, abs=4 * 2000**0.5 / 2)  # 4 sigma


@pytest.mark.parametrize("kinds", ["crop", "flip+crop"])
def test_a_crop_shows_the_images_own_pixels(kinds):
    image = place(100, 80)
    flips = 0
    for seed in range(300):
        view = np.asarray(view_of(image, kinds, identity(seed), 1)).astype(int)
        x, y = view[0, :, 0], view[:, 0, 1]
        flipped = x[0] > x[-1]
        flips += flipped
        assert (np.diff(x) == (-1 if flipped else 1)).all() and (np.diff(y) == 1).all()
        assert (view[..., 0] == x).all() and (view[..., 1] == y[:, None]).all()
    assert flips == (0 if kinds == "crop" else pytest.approx(150, abs=4 * 300**0.5 / 2))


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_a_crop_is_never_empty_and_never_outside(width, height):
    left, upper, right, lower = boxes(width, height, 300).T
    assert (left >= 0).all() and (upper >= 0).all()
    assert (right <= width).all() and (lower <= height).all()
    assert (right > left).all() and (lower > upper).all()
    image = photo(width, height)
    for view in range(1, 20):
        size = view_of(image, "flip+crop", identity(3), view).size
        assert 0 < size[0] <= width and 0 < size[1] <= height


def test_areas_and_ratios_are_spread_over_their_ranges():
    # Of a large square: whole pixels hardly show, and only what juts out is drawn again.
    left, upper, right, lower = boxes(4000, 4000, 3000).T
    area = (right - left) * (lower - upper) / 4000**2
    ratio = (right - left) / (lower - upper)
    assert 0.499 < area.min() < 0.51 and 0.98 < area.max() <= 1
    assert 0.749 < ratio.min() < 0.76 and 1.31 < ratio.max() < 1.334
    assert np.log(ratio).mean() == pytest.approx(0, abs=0.02)
    # Where every ratio fits, areas are uniform.
    small = area[area <= 0.75]
    quarters = np.histogram(small, bins=5, range=(0.5, 0.75))[0] / len(small)
    assert abs(quarters - 0.2).max() < 0.04


@pytest.mark.parametrize(("width", "height"), [(64, 64), (120, 90), (90, 120), (200, 80)])
def test_crops_are_distributed_as_torchvisions(width, height):
    from scipy.stats import ks_2samp

    ours, theirs = boxes(width, height, 2000), torchvision_boxes(width, height, 2000)
    for name, of in {
        "left": lambda b: b[:, 0],
        "upper": lambda b: b[:, 1],
        "width": lambda b: b[:, 2] - b[:, 0],
        "height": lambda b: b[:, 3] - b[:, 1],
        "area": lambda b: (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]),
        "ratio": lambda b: (b[:, 2] - b[:, 0]) / (b[:, 3] - b[:, 1]),
    }.items():
        assert ks_2samp(of(ours), of(theirs)).pvalue > 1e-3, name


@pytest.mark.parametrize(("width", "height"), [(300, 60), (60, 300), (1, 50), (50, 1), (7, 1)])
def test_long_and_narrow_images_give_torchvisions_central_crop(width, height):
    assert (boxes(width, height, 20) == torchvision_boxes(width, height, 20)).all()


def test_an_unknown_kind_lists_the_known_ones():
    with pytest.raises(ConfigError) as caught:
        view_of(photo(), "rotate", identity(0), 0)
    assert str(caught.value) == (
        "unknown augmentation rotate; known: 'none', 'crop', 'flip', 'flip+crop'"
    )
