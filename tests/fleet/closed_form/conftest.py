"""Moments of random images whose features look like pooled activations."""

import numpy as np
import pytest

from fleet.closed_form import Moments


@pytest.fixture
def moments_from():
    """Function (codes, labels, classes, exponent) → their moments, straight from the definition."""

    def build(codes, labels, classes=4, exponent=-1):
        gram = np.zeros((codes.shape[1],) * 2, np.int64)
        sums = np.zeros((classes, codes.shape[1]), np.int64)
        for row, label in zip(codes.astype(np.int64), labels, strict=True):
            gram += np.outer(row, row)
            sums[label] += row
        return Moments(gram, sums, np.bincount(labels, minlength=classes), exponent)

    return build


@pytest.fixture
def random_codes():
    """Function (seed, images, features, classes) → (N, D) whole features and (N,) labels."""

    def build(seed, images=60, features=16, classes=4):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, classes, images)
        centres = rng.exponential(2.0, (classes, features))
        noise = rng.gamma(1.0, rng.uniform(0.2, 3, features), (images, features))
        signs = np.where(rng.random(features) < 0.3, -1, 1)
        return np.rint(signs * (centres[labels] + noise)), labels

    return build
