"""Slow float64 oracles: one Python number at a time, straight from the definitions."""

import math

import numpy as np


def weighted_mean(updates, quorum=1):
    """Σ n·x / Σ n of every element, over the clients whose update has the tensor."""
    names = {name for update in updates for name in update.delta}
    means = {}
    for name in names:
        trained = [update for update in updates if name in update.delta]
        if len(trained) < quorum:
            continue
        mean = np.empty(trained[0].delta[name].shape)
        for index in np.ndindex(mean.shape):
            weighted, total = [], 0
            for update in trained:
                weighted.append(update.num_examples * float(update.delta[name][index]))
                total += update.num_examples
            mean[index] = math.fsum(weighted) / total
        means[name] = mean
    return means


def pooled_statistics(means, variances, counts):
    """First and second moments of the mixture, element by element: Σ w(v + m²) − mean²."""
    mean, variance = np.empty(means[0].shape), np.empty(means[0].shape)
    for index in np.ndindex(mean.shape):
        first, second = [], []
        for m, v, count in zip(means, variances, counts, strict=True):
            m, v = float(m[index]), float(v[index])
            first.append(count * m)
            second.append(count * (v + m * m))
        mean[index] = math.fsum(first) / sum(counts)
        variance[index] = math.fsum(second) / sum(counts) - mean[index] ** 2
    return mean, variance
