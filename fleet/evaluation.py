"""Loss and accuracy, shared by server and devices."""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from fleet.backbones import Preprocessing
from fleet.data import ImageBatches, ImageData
from fleet.errors import ConfigError


@dataclass(frozen=True)
class Evaluation:
    """How a model does on some images.

    Attributes:
        num_examples: images.
        loss: mean cross-entropy, in nats.
        accuracy: share of images whose largest logit is the label's, 0…1.
    """

    num_examples: int
    loss: float
    accuracy: float


def evaluate(
    model: nn.Module, data: ImageData, preprocessing: Preprocessing, batch_size: int = 32
) -> Evaluation:
    """Run a model in eval mode over all images.

    Raises:
        ConfigError: if there is none.
    """
    if not len(data):
        raise ConfigError(f"{data.name} has no images to evaluate on; give it some")
    model.eval()
    device = next(model.parameters()).device
    loss, correct = 0.0, 0
    with torch.inference_mode():
        for images, labels in ImageBatches(data, preprocessing, batch_size):
            labels = labels.to(device)
            logits = model(images.to(device))
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += int((logits.argmax(1) == labels).sum())
    return Evaluation(len(data), loss / len(data), correct / len(data))
