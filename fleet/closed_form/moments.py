"""What a client's images come to: sums of features and of their products, in whole numbers.

Whole numbers add up exactly: the moments of a fleet are the same to the last
bit however its images lie on the clients and in whatever order they come. A
sum of floats is neither. To that end every image passes the model by itself
(in a batch, its features depend in the last bits on the batch's size), and
each feature is rounded to a multiple of 2^e, the same everywhere.

Coarse steps do no harm: rounding adds a variance of step²/12 to every feature,
which acts like a little more ridge. With the step as large as the features'
own deviation, accuracy is unchanged, and a product takes six bits on its way.

Source: Fed3R, Fanì et al., arXiv:2406.01116, with rounding in place of floats.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from fleet.backbones import Backbone, Preprocessing
from fleet.config import FeatureConfig
from fleet.data import ImageData
from fleet.errors import ConfigError, UpdateError
from fleet.features import FeatureSource
from fleet.mobiletl import TransferModel

MAX_CODE = 2047  # a feature's multiple of the step; further out it is clipped
EXPONENTS = range(-64, 65)  # of the step

_ROWS = 256  # images whose features are held at once
_PROBES = 16


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over images of their D features, counted in steps of 2^exponent.

    The constant feature that gives a bias needs no column: its products are
    `class_sums` and `counts`.

    Attributes:
        gram: (D, D) int64, the sum of outer products, in steps².
        class_sums: (C, D) int64, of the features of each class, in steps.
        counts: (C,) int64, images of each class.
        exponent: of the step.
    """

    gram: np.ndarray
    class_sums: np.ndarray
    counts: np.ndarray
    exponent: int

    @property
    def num_examples(self) -> int:
        """Images."""
        return int(self.counts.sum())

    @property
    def step(self) -> float:
        """What one step of a feature is worth."""
        return 2.0**self.exponent

    @cached_property
    def within(self) -> np.ndarray:
        """(D, D) float64: the Gram matrix of the features' distances to their class's mean."""
        there = self.counts > 0
        sums = self.class_sums[there].astype(np.float64)
        return self.gram - (sums / self.counts[there, None]).T @ sums


def moments_of(
    model: TransferModel,
    data: ImageData,
    preprocessing: Preprocessing,
    exponent: int,
    features: FeatureConfig | None = None,
) -> Moments:
    """Moments of what the head is given, the model in eval mode.

    Args:
        model: as pretrained; what lies below its cut may come from the cache,
            where later rounds find it again.
        data: labels count in the head's classes.
        preprocessing: the backbone's.
        exponent: of the step, for the whole fleet; see `step_exponent`.
        features: the cache; None: none. Only images themselves count, no views.

    Raises:
        ConfigError: if there is no image, or an exponent outside `EXPONENTS`.
        UpdateError: if a feature is not finite.
    """
    if not len(data):
        raise ConfigError(f"{data.name} has no images for this client; give it some")
    if exponent not in EXPONENTS:
        raise ConfigError(
            f"exponent of the features' step is {exponent}, expected {EXPONENTS[0]} to "
            f"{EXPONENTS[-1]}"
        )
    model.eval()
    classes, length = model.backbone.num_classes, model.backbone.head.in_features
    gram = np.zeros((length, length))  # whole numbers below 2^53: exact
    sums = np.zeros((classes, length), np.int64)
    rows = np.empty((min(_ROWS, len(data)), length))
    held = 0
    with torch.inference_mode():
        source = FeatureSource(model, data, preprocessing, features)
        for i, (x, label) in enumerate(source.batches(1)):
            codes = _codes(_head_input(model, x)[0], exponent, f"image {i} of {data.name}")
            sums[int(label)] += codes.astype(np.int64)
            rows[held] = codes
            held += 1
            if held == len(rows) or i + 1 == len(data):
                gram += rows[:held].T @ rows[:held]
                held = 0
    counts = np.bincount(data.labels, minlength=classes).astype(np.int64)
    return Moments(gram.astype(np.int64), sums, counts, exponent)


def total(moments: Iterable[Moments]) -> Moments:
    """Moments of all the images together; no order and no grouping changes a bit.

    Raises:
        UpdateError: if there are none, or they differ in step or shape.
    """
    moments = list(moments)
    if not moments:
        raise UpdateError("there are no moments to add up; wait for clients that send some")
    first = moments[0]
    for other in moments[1:]:
        if other.exponent != first.exponent or other.class_sums.shape != first.class_sums.shape:
            raise UpdateError(
                f"moments of {other.class_sums.shape} features in steps of 2^{other.exponent} do "
                f"not add to {first.class_sums.shape} in steps of 2^{first.exponent}; take the "
                f"server's"
            )
    return Moments(
        gram=sum(m.gram for m in moments),
        class_sums=sum(m.class_sums for m in moments),
        counts=sum(m.counts for m in moments),
        exponent=first.exponent,
    )


def step_exponent(backbone: Backbone) -> int:
    """A step for a backbone's features, chosen without any image of the task.

    The power of two nearest to three deviations of the head's inputs over
    patterns of random patches, which vary them less than images do: one to two
    deviations on digits at 64 pixels and CIFAR-10 at 128. It may differ between
    machines, so the server's goes to everyone.
    """
    size = backbone.preprocessing.image_size
    generator = torch.Generator().manual_seed(0)
    patches = (torch.randn(_PROBES, 3, s, s, generator=generator) for s in (2, 4, 8, 16, 32))
    images = sum(F.interpolate(p, size=(size, size), mode="bilinear") for p in patches)
    parameter = next(backbone.model.parameters())
    inputs = []
    backbone.model.eval()
    with torch.inference_mode():
        for image in images.split(1):
            x = (image / math.sqrt(5)).to(parameter.device)
            for step in backbone.steps[:-1]:
                x = step.forward(x)
            inputs.append(x[0])
    deviation = float(torch.stack(inputs).double().std(0).square().mean().sqrt())
    if not 0 < deviation < math.inf:
        return 0
    exponent = round(math.log2(3 * deviation))
    return min(max(exponent, EXPONENTS[0]), EXPONENTS[-1])


def _head_input(model: TransferModel, x: torch.Tensor) -> torch.Tensor:
    """(N, D) of what `model.features` returned: all steps above the cut but the head."""
    for step in model.backbone.steps[model.cut : -1]:
        x = step.forward(x)
    return x


def _codes(x: torch.Tensor, exponent: int, where: str) -> np.ndarray:
    """Whole multiples of the step, as (D,) float64."""
    values = x.double().cpu().numpy()
    if not np.isfinite(values).all():
        raise UpdateError(f"{where} has features that are NaN or infinite; load the weights again")
    return np.clip(np.rint(values * 2.0**-exponent), -MAX_CODE, MAX_CODE)
