"""The frozen prefix against its own steps, run on the whole batch with autograd."""

import pytest
import torch
from torch.testing import assert_close

from fleet.measure import allocator_peak
from fleet.mobiletl.prefix import run_prefix
from fleet.structure import parts_of


def run(steps, x, *micro_batch):
    return run_prefix(tuple(parts_of(steps)), x, *micro_batch)


@pytest.fixture
def steps(random_backbone):
    """Stem and four blocks of MobileNetV2."""
    return random_backbone("mobilenet_v2").steps[:7]


def on_the_whole(steps, x):
    for step in steps:
        x = step.forward(x)
    return x


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5, 8])
def test_prefix_is_its_steps_whatever_the_micro_batch(steps, images, micro_batch):
    x = images(5)
    assert_close(run(steps, x, micro_batch), on_the_whole(steps, x), rtol=1e-4, atol=1e-5)


def test_each_image_keeps_its_place(steps, images):
    x = images(5)
    y = run(steps, x)
    for i in range(5):
        assert_close(y[i], on_the_whole(steps, x[i : i + 1])[0], rtol=1e-4, atol=1e-5)


def test_result_may_be_kept_for_backward(steps, images):
    y = run(steps, images(3))
    assert not y.is_inference() and not y.requires_grad
    weight = torch.ones_like(y, requires_grad=True)
    (y * weight).sum().backward()
    assert_close(weight.grad, y)


def test_prefix_is_channels_last(steps, images):
    y = run(steps, images(3))
    assert y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()


def test_prefix_may_end_in_features_without_pixels(random_backbone, images):
    backbone = random_backbone("mobilenet_v2")
    y = run(backbone.steps[:-1], images(3))
    assert y.shape == (3, backbone.head.in_features)
    with torch.inference_mode():
        assert_close(backbone.head(y), backbone.model(images(3)), rtol=1e-4, atol=1e-4)


def test_prefix_leaves_the_images_alone(steps, images):
    x = images(3)
    run(steps, x)
    assert torch.equal(x, images(3))


def test_no_steps_return_the_batch_itself(images):
    x = images(3)
    assert run((), x) is x


def test_peak_grows_with_the_micro_batch_not_with_the_batch(steps, images):
    def peak(number, *micro_batch):
        x = images(number)
        with allocator_peak() as found:
            out = run(steps, x, *micro_batch)
        return found.bytes - out.nbytes

    peak(2, 2)  # the first run of a shape sets oneDNN's caches up
    assert peak(8, 2) == pytest.approx(peak(4, 2), rel=0.05)
    assert peak(8, 8) > 3 * peak(8, 2)
    assert peak(8) == pytest.approx(peak(8, 2), rel=0.05)
