"""MobileNetV2 whole: 2.2 million parameters, 20 clients of 8 images, 5 a round.

As `small_task`: batches keep their order, and cohorts depend on the round alone.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import mobilenet_v2

CLIENTS = 20
IMAGES = 8  # of each client
SAMPLED = 5  # clients a round
BATCH = 4
CLASSES = 10
SIZE = 32  # pixels
LEARNING_RATE = 0.01
SEED = 0


def initial_net() -> nn.Module:
    """The network that every run begins with; without dropout, which draws at random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return mobilenet_v2(num_classes=CLASSES, dropout=0.0)


@cache
def everybodys_images() -> tuple[Tensor, Tensor]:
    """Images (20, 8, 3, 32, 32) and labels (20, 8): a picture a class, under noise."""
    rng = np.random.default_rng(SEED)
    pictures = rng.standard_normal((CLASSES, 3, SIZE, SIZE), dtype=np.float32)
    labels = rng.integers(0, CLASSES, (CLIENTS, IMAGES))
    noise = rng.standard_normal((CLIENTS, IMAGES, 3, SIZE, SIZE), dtype=np.float32)
    return torch.from_numpy(pictures[labels] + noise), torch.from_numpy(labels)


def cohort(server_round: int) -> list[int]:
    """The clients of a round, counted from 1, in rising order."""
    drawn = np.random.default_rng([SEED, server_round]).choice(CLIENTS, SAMPLED, replace=False)
    return sorted(int(client) for client in drawn)


def train(net: nn.Module, client: int) -> None:
    """One epoch of plain SGD, in place: 2 batches of 4."""
    net.train()
    images, labels = (all_[client].split(BATCH) for all_ in everybodys_images())
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)
    for x, y in zip(images, labels, strict=True):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


def loss_over_all(net: nn.Module) -> float:
    """Mean cross-entropy over the images of all clients, in eval mode."""
    net.eval()
    images, labels = everybodys_images()
    with torch.no_grad():
        return float(F.cross_entropy(net(images.flatten(0, 1)), labels.flatten()))
