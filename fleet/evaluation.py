"""Loss and accuracy, shared by server and devices."""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from fleet.backbones import Preprocessing
from fleet.config import FeatureConfig
from fleet.data import ImageBatches, ImageData
from fleet.errors import ConfigError
from fleet.features import FeatureSource
from fleet.mobiletl import TransferModel


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
    model: nn.Module,
    data: ImageData,
    preprocessing: Preprocessing,
    batch_size: int = 32,
    features: FeatureConfig | None = None,
) -> Evaluation:
    """Run a model in eval mode over all images.

    Args:
        model: any, for images (N, 3, S, S). Of a `TransferModel` the frozen
            half runs a couple of images at a time, or comes from a cache.
        data: at least one image.
        preprocessing: the backbone's.
        batch_size: images at a time.
        features: the cache, for a `TransferModel`; None: none.

    Raises:
        ConfigError: if there is no image.
    """
    if not len(data):
        raise ConfigError(f"{data.name} has no images to evaluate on; give it some")
    model.eval()
    device = next(model.parameters()).device
    if isinstance(model, TransferModel):
        forward = model.from_features
        batches = FeatureSource(model, data, preprocessing, features).batches(batch_size)
    else:
        forward, batches = model, ImageBatches(data, preprocessing, batch_size)
    loss, correct = 0.0, 0
    with torch.inference_mode():
        for x, labels in batches:
            labels = labels.to(device)
            logits = forward(x.to(device))
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += int((logits.argmax(1) == labels).sum())
    return Evaluation(len(data), loss / len(data), correct / len(data))
