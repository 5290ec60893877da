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


def trimmed_mean(updates, cut_of):
    """Mean of every element's sorted values without `cut_of(n)` on each side."""
    means = {}
    for name in {name for update in updates for name in update.delta}:
        copies = [update.delta[name] for update in updates if name in update.delta]
        cut = cut_of(len(copies))
        mean = np.empty(copies[0].shape)
        for index in np.ndindex(mean.shape):
            kept = sorted(float(copy[index]) for copy in copies)[cut : len(copies) - cut]
            mean[index] = math.fsum(kept) / len(kept)
        means[name] = mean
    return means


def groups(updates):
    """Sorted clients' names → the tensors that exactly these trained."""
    found = {}
    for name in {name for update in updates for name in update.delta}:
        clients = tuple(sorted(u.client for u in updates if name in u.delta))
        found.setdefault(clients, []).append(name)
    return {clients: sorted(names) for clients, names in found.items()}


def vector(update, names):
    """The named tensors of an update as one list of numbers."""
    return [float(x) for name in names for x in np.ravel(update.delta[name])]


def squared_distance(x, y):
    """Σ (x − y)², rounded once."""
    return math.fsum((a - b) ** 2 for a, b in zip(x, y, strict=True))


def norm(x):
    """Euclidean length."""
    return math.sqrt(math.fsum(a * a for a in x))


def krum_scores(vectors, hostile):
    """Sum of squared distances to the n − f − 2 nearest others, for every vector."""
    scores = []
    for i, x in enumerate(vectors):
        others = sorted(squared_distance(x, y) for j, y in enumerate(vectors) if j != i)
        scores.append(math.fsum(others[: len(vectors) - hostile - 2]))
    return scores


def centred_clipping(rounds, radius, momentum):
    """Aggregates of rounds of equal plans, client → vector: Karimireddy et al., algorithm 2."""
    momenta, centre, aggregates = {}, None, []
    for vectors in rounds:
        centre = centre or [0.0] * len(next(iter(vectors.values())))
        for client, x in vectors.items():
            old = momenta.get(client, x)
            momenta[client] = [
                momentum * m + (1 - momentum) * a for m, a in zip(old, x, strict=True)
            ]
        steps = []
        for client in vectors:
            apart = [m - v for m, v in zip(momenta[client], centre, strict=True)]
            factor = min(1.0, radius / norm(apart))
            steps.append([factor * a for a in apart])
        means = [math.fsum(step) / len(steps) for step in zip(*steps, strict=True)]
        centre = [v + mean for v, mean in zip(centre, means, strict=True)]
        aggregates.append(centre)
    return aggregates


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
