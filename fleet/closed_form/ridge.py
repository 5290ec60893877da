"""Ridge regression onto one-hot targets from moments alone, and the scale that makes it logits."""

import math
from dataclasses import dataclass

import numpy as np

from fleet.closed_form.moments import Moments
from fleet.errors import ConfigError, UpdateError

MAX_SCALE = 1000.0  # of outputs that tell the classes apart without any error

_DRAWS = 4096
_SEED = 0


@dataclass(frozen=True, eq=False)
class Ridge:
    """A regression and what it was chosen by.

    Attributes:
        weight: (C, D) float64; zero for classes without images.
        bias: (C,) float64; zero for classes without images.
        ridge: strength, as scikit-learn's `alpha`.
        degrees: of freedom that the fit takes, the bias's among them.
        gcv: generalised cross-validation at this strength: n·RSS/(n − degrees)².
    """

    weight: np.ndarray
    bias: np.ndarray
    ridge: float
    degrees: float
    gcv: float


def solve(moments: Moments, ridge: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A classifier's head: ridge regression, scaled to logits.

    The scale comes from each class's outputs as normal deviates, with the mean
    and the pooled covariance that new images would have. (A fit sees its own
    images too near their targets: residuals divided by 1 − degrees/n stand for
    those of images left out, as in generalised cross-validation.) Moments do
    not tell how classes overlap, so it is the geometric mean of the best scales
    of two extremes: classes that are normal, and outputs that are themselves
    the odds of the classes. The first alone is up to twice
    too confident; on digits the mean is within 0.03 nats of the cross-entropy
    that the best scale has on other images, which a test holds.

    A class that nobody has an image of gets zero weight and the bias −ln n. As
    the regression's outputs add up to one, the largest logit is above zero:
    such a class is never predicted, and the first image of it can teach it.

    Args:
        moments: of all clients together.
        ridge: strength on the scale of the features; None: by generalised
            cross-validation. The bias is not penalised.

    Returns:
        Weight (C, D) and bias (C,), float32.

    Raises:
        ConfigError: for a negative strength.
        UpdateError: for moments of no image.
    """
    fit = fit_ridge(moments, ridge)
    scale = _scale(moments, fit)
    bias = np.where(moments.counts > 0, scale * fit.bias, -math.log(moments.num_examples))
    return (scale * fit.weight).astype(np.float32), bias.astype(np.float32)


def fit_ridge(moments: Moments, ridge: float | None = None) -> Ridge:
    """Least squares onto one-hot targets with a penalty ridge·‖weight‖².

    Raises:
        ConfigError: for a strength that is negative or not finite.
        UpdateError: for moments of no image.
    """
    if ridge is not None and not 0 <= ridge < math.inf:
        raise ConfigError(f"ridge must be at least 0 and finite, got {ridge}")
    n, counts = moments.num_examples, moments.counts.astype(np.float64)
    if n < 1:
        raise UpdateError("moments are of no image; a head needs some")
    sums = moments.class_sums * moments.step
    mean, shares = sums.sum(axis=0) / n, counts / n
    scatter = moments.gram * moments.step**2 - n * np.outer(mean, mean)
    values, vectors = np.linalg.eigh(scatter)
    values = np.maximum(values, 0)
    targets = vectors.T @ (sums - counts[:, None] * mean).T  # (D, C)
    energy = np.square(targets).sum(axis=1)
    spread = n - float(np.square(counts).sum()) / n  # of the one-hot targets about their mean
    # Directions that no image varies in have no say, and would divide by zero.
    there = values > 1e-12 * values.max(initial=0)
    values, vectors = values[there], vectors[:, there]
    targets, energy = targets[there], energy[there]
    # What no strength explains: nothing, where there are as many directions as images.
    beyond = max(spread - float((energy / values).sum()), 0.0) if len(values) < n - 1 else 0.0

    def score(strength: float) -> tuple[float, float]:
        """Generalised cross-validation, and degrees of freedom."""
        shrunk = strength / (values + strength)
        left = n - 1 - len(values) + float(shrunk.sum())
        residual = beyond + float((energy / values * shrunk**2).sum())
        return n * residual / left**2 if left > 0 else math.inf, n - left

    if ridge is None:
        ridge = min(_strengths(values), key=lambda strength: score(strength)[0])
    gcv, degrees = score(ridge)
    weight = (vectors @ (targets / (values + ridge)[:, None])).T
    weight[moments.counts == 0] = 0.0
    return Ridge(weight, shares - weight @ mean, float(ridge), degrees, gcv)


def _strengths(values: np.ndarray) -> np.ndarray:
    """Ten a decade, from next to nothing to all but the mean."""
    largest = values.max(initial=0) or 1.0
    return largest * np.logspace(-7, 3, 101)


def _scale(moments: Moments, fit: Ridge) -> float:
    """From the regression's outputs to logits."""
    counts = moments.counts[moments.counts > 0]
    outputs, labels = _drawn_outputs(*_left_out_outputs(moments, fit), counts)
    normal = _best_scale(outputs, np.eye(len(counts))[labels])
    odds = np.maximum(outputs, 0)
    linear = _best_scale(outputs, odds / odds.sum(axis=1, keepdims=True))
    return math.sqrt(normal * linear)


def _left_out_outputs(moments: Moments, fit: Ridge) -> tuple[np.ndarray, np.ndarray]:
    """Mean (C', C') of each class's outputs, and their covariance, for images left out.

    C' are the classes that there are.
    """
    there = moments.counts > 0
    counts, n = moments.counts[there], moments.num_examples
    weight, bias = fit.weight[there], fit.bias[there]
    means = moments.class_sums[there] / counts[:, None] * moments.step @ weight.T + bias
    covariance = weight @ (moments.within * moments.step**2) @ weight.T / n
    kept = max(1 - fit.degrees / n, 1 / n)
    targets = np.eye(len(counts))
    return targets - (targets - means) / kept, covariance / kept**2


def _drawn_outputs(
    means: np.ndarray, covariance: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(N, C') normal outputs of classes in their shares, and the (N,) classes; seeded."""
    shares = counts / counts.sum()
    places = (np.arange(_DRAWS // 2) + 0.5) / (_DRAWS // 2)
    labels = np.minimum(np.searchsorted(shares.cumsum(), places), len(shares) - 1)
    values, vectors = np.linalg.eigh(covariance)
    noise = np.random.default_rng(_SEED).standard_normal((len(labels), len(shares)))
    noise = (noise * np.sqrt(np.maximum(values, 0))) @ vectors.T
    # Every draw has its mirror image, so that the means are exact.
    return np.concatenate([means[labels] + noise, means[labels] - noise]), np.tile(labels, 2)


def _best_scale(outputs: np.ndarray, odds: np.ndarray) -> float:
    """The s of least mean cross-entropy of softmax(s·outputs) against the true odds.

    It is convex in s, so its slope has one zero, which halving finds.
    """
    margins = outputs - (odds * outputs).sum(axis=1, keepdims=True)  # cross-entropy: logsumexp

    def slope(scale: float) -> float:
        logits = scale * margins
        softmax = np.exp(logits - logits.max(axis=1, keepdims=True))
        return float(((softmax * margins).sum(axis=1) / softmax.sum(axis=1)).mean())

    low, high = 0.0, MAX_SCALE
    if slope(high) < 0:
        return high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return (low + high) / 2
