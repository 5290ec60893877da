"""One thread, and backbones with random weights whose norms and heads are not trivial."""

import copy
from functools import lru_cache

import pytest
import torch
import torch.nn as nn

from fleet.backbones import Backbone, load_backbone


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tests' feature maps are so small that threads cost more than they save."""
    torch.set_num_threads(1)


@lru_cache(maxsize=16)  # to build and read a model takes 0.2 s, a copy of it 0.03 s
def _random_backbone(name: str, num_classes: int, image_size: int, seed: int) -> Backbone:
    backbone = load_backbone(
        name, num_classes=num_classes, image_size=image_size, weights="none", seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    for part in backbone.model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.weight.data.uniform_(0.5, 1.5, generator=generator)
            part.bias.data.normal_(0, 0.3, generator=generator)
            part.running_mean.normal_(0, 0.3, generator=generator)
            part.running_var.uniform_(0.5, 1.5, generator=generator)
    nn.init.normal_(backbone.head.weight, std=0.1, generator=generator)
    return backbone


@pytest.fixture
def random_backbone():
    """Function (name, …) → a backbone none of whose tensors is all zeros or all ones.

    Every call gives a copy of its own, which a test may train.
    """

    def build(name, num_classes=5, image_size=64, seed=0):
        return copy.deepcopy(_random_backbone(name, num_classes, image_size, seed))

    return build


@pytest.fixture
def images():
    """Function (number, size) → random images in channels_last."""

    def build(number=4, size=64, seed=0):
        generator = torch.Generator().manual_seed(seed)
        batch = torch.randn(number, 3, size, size, generator=generator)
        return batch.contiguous(memory_format=torch.channels_last)

    return build
