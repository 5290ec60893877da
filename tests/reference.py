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


def feddyn(hessians, minima, alpha, cohorts):
    """FedDyn as the paper writes it, on losses (θ − c)ᵀA(θ − c)/2 that clients minimise exactly.

    Yields θ after every round. Acar et al., arXiv:2111.04263, algorithm 1.
    """
    m, size = len(hessians), len(minima[0])
    theta, server, own = np.zeros(size), np.zeros(size), [np.zeros(size) for _ in hessians]
    for cohort in cohorts:
        ends = {}
        for k in cohort:  # argmin L(θ_k) − ⟨own, θ_k⟩ + α/2·‖θ_k − θ‖²
            left = hessians[k] + alpha * np.eye(size)
            ends[k] = np.linalg.solve(left, hessians[k] @ minima[k] + own[k] + alpha * theta)
            own[k] = own[k] - alpha * (ends[k] - theta)
        server = server - alpha / m * sum(end - theta for end in ends.values())
        theta = sum(ends.values()) / len(ends) - server / alpha
        yield theta
