"""A client's operations against PyTorch's own counter and products counted by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fleet.backbones import load_backbone
from fleet.config import default_settings, read_config
from fleet.records import ClientReport, RoundReport
from simulations.device_flops import device_flops
from tests.runs import SMALL

IMAGES = 24
FEATURES, CLASSES = 1280, 10


def config(**settings):
    return read_config(default_settings() | SMALL | settings)


def rounds(count, names=("client-0000",), images=IMAGES):
    clients = tuple(
        ClientReport(name=n, blocks=0, num_examples=images, loss=1, peak_bytes=1, seconds=1)
        for n in names
    )
    zeroth = RoundReport(server_round=0, accuracy=0.1, loss=2.3)
    trained = [
        RoundReport(server_round=n + 1, accuracy=0.1, loss=2.3, clients=clients)
        for n in range(count)
    ]
    return [zeroth, *trained]


@pytest.fixture(scope="module")
def below_the_head():
    """FLOPs of an image through the whole model but its classifier, by PyTorch's counter."""
    backbone = load_backbone(
        default_settings()["backbone"], num_classes=CLASSES, image_size=32, weights="none"
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone.model.eval()(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops() - 2 * FEATURES * CLASSES


# Of the classifier's step: logits, and the gradient of its weight; its input needs none.
HEAD = 2 * 2 * FEATURES * CLASSES


@pytest.mark.parametrize("count", [1, 3])
def test_with_a_cache_the_frozen_part_runs_once_an_image(below_the_head, count):
    expected = IMAGES * (below_the_head + count * HEAD)
    assert device_flops(config(), rounds(count)) == pytest.approx(expected, rel=0.01)


def test_without_it_runs_in_every_epoch(below_the_head):
    settings = {"cache": "off", "local-epochs": 2}
    expected = IMAGES * 3 * 2 * (below_the_head + HEAD)
    assert device_flops(config(**settings), rounds(3)) == pytest.approx(expected, rel=0.01)


def test_it_is_the_mean_over_the_clients_whose_updates_counted():
    one, two = (device_flops(config(), rounds(1, images=n)) for n in (10, 30))
    mixed = rounds(1, ("a",), 10)[1], rounds(1, ("b",), 30)[1]
    assert device_flops(config(), mixed) == pytest.approx((one + two) / 2)
    assert device_flops(config(), rounds(0)) == 0.0
