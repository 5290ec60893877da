"""The small job that all engines do: 62,006 parameters, 100 clients of 50 images, 10 a round.

It knows PyTorch and NumPy only, since every engine runs it in its own environment.
Batches keep their order, and cohorts depend on the round alone: so all engines take the same steps.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLIENTS = 100
IMAGES = 50  # of each client
SAMPLED = 10  # clients a round
BATCH = 10
CLASSES = 10
LEARNING_RATE = 0.05
SEED = 0


class SmallNet(nn.Module):
    """The network of Flower's PyTorch tutorial, for (N, 3, 32, 32) images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (N, 10)."""
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        return self.fc3(F.relu(self.fc2(x)))


def initial_net() -> SmallNet:
    """The network that every run begins with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return SmallNet()


@cache
def everybodys_images() -> tuple[Tensor, Tensor]:
    """Images (100, 50, 3, 32, 32) and labels (100, 50): a picture a class, under noise."""
    rng = np.random.default_rng(SEED)
    pictures = rng.standard_normal((CLASSES, 3, 32, 32), dtype=np.float32)
    labels = rng.integers(0, CLASSES, (CLIENTS, IMAGES))
    noise = rng.standard_normal((CLIENTS, IMAGES, 3, 32, 32), dtype=np.float32)
    return torch.from_numpy(pictures[labels] + noise), torch.from_numpy(labels)


def batches(client: int) -> list[tuple[Tensor, Tensor]]:
    """One epoch of a client: 5 batches of 10."""
    images, labels = everybodys_images()
    return list(zip(images[client].split(BATCH), labels[client].split(BATCH), strict=True))


def cohort(server_round: int) -> list[int]:
    """The ten clients of a round, counted from 1, in rising order."""
    drawn = np.random.default_rng([SEED, server_round]).choice(CLIENTS, SAMPLED, replace=False)
    return sorted(int(client) for client in drawn)


def train(net: nn.Module, client: int) -> None:
    """One epoch of plain SGD, in place."""
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)
    for images, labels in batches(client):
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()


def loss_over_all(net: nn.Module) -> float:
    """Mean cross-entropy over the images of all clients."""
    images, labels = everybodys_images()
    with torch.no_grad():
        return float(F.cross_entropy(net(images.flatten(0, 1)), labels.flatten()))
