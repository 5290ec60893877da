"""Clients and server of FedDyn together, on unlike quadratic losses whose optimum is known."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from fleet.objective import feddyn, fedprox, next_gradients
from fleet.optim import SGD
from strategies import server_opt
from tests import reference

SIZE, CLIENTS = 5, 8


def problem(seed):
    """Losses (θ − c)ᵀA(θ − c)/2 of clients that agree in nothing."""
    rng = np.random.default_rng(seed)
    hessians = []
    for _ in range(CLIENTS):
        q, _ = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))
        hessians.append(q @ np.diag(np.geomspace(0.3, 2.0, SIZE)) @ q.T)
    return hessians, [rng.normal(size=SIZE) for _ in range(CLIENTS)]


def optimum(hessians, minima):
    return np.linalg.solve(sum(hessians), sum(a @ c for a, c in zip(hessians, minima, strict=True)))


def cohorts_of(rng, size, rounds):
    return [rng.choice(CLIENTS, size, replace=False) for _ in range(rounds)]


@pytest.mark.parametrize("size", [CLIENTS, 3, 1])
@pytest.mark.parametrize("seed", range(3))
def test_rounds_are_those_of_the_paper_with_whole_and_with_partial_cohorts(seed, size):
    hessians, minima = problem(seed)
    alpha = 0.5
    cohorts = cohorts_of(np.random.default_rng(seed), size, 20)
    optimizer = server_opt.feddyn(CLIENTS)
    params = {"x": np.zeros(SIZE, np.float32)}
    state = optimizer.init(params)
    own = [{} for _ in range(CLIENTS)]
    for cohort, theirs in zip(
        cohorts, reference.feddyn(hessians, minima, alpha, cohorts), strict=True
    ):
        deltas = []
        for k in cohort:
            target = feddyn(params, alpha, own[k]).targets["x"]
            left = hessians[k] + alpha * np.eye(SIZE)
            end = np.linalg.solve(left, hessians[k] @ minima[k] + alpha * target)
            deltas.append((end - params["x"]).astype(np.float32))
            own[k] = next_gradients(own[k], alpha, {"x": deltas[-1]})
        mean, trainers = {"x": np.mean(deltas, axis=0)}, {"x": len(deltas)}
        params, state = optimizer.update(mean, state, params, trainers)
        assert_allclose(params["x"], theirs, rtol=1e-3, atol=1e-3)


def distance_after(objective, optimizer, hessians, minima, cohorts, strength=0.5, lost=0.0):
    """From the optimum of the mean loss, when clients take 10 steps of SGD each.

    A share of the updates is lost on its way, and moves nothing.
    """
    lots = np.random.default_rng(1)
    params = {"x": np.zeros(SIZE, np.float32)}
    state = optimizer.init(params)
    own = [{} for _ in range(CLIENTS)]
    tensors = [
        (torch.tensor(a).float(), torch.tensor(c).float())
        for a, c in zip(hessians, minima, strict=True)
    ]
    for cohort in cohorts:
        deltas = []
        for k in cohort:
            x = torch.tensor(params["x"]).requires_grad_()
            term = {}
            if objective == "fedprox":
                term = {"targets": [torch.tensor(fedprox(params, strength).targets["x"])]}
            elif objective == "feddyn":
                term = {"targets": [torch.tensor(feddyn(params, strength, own[k]).targets["x"])]}
            sgd = SGD([x], 0.3, proximal=strength if term else 0.0, **term)
            a, c = tensors[k]
            for _ in range(10):
                x.grad = a @ (x.detach() - c)
                sgd.step()
            if lots.random() < lost:
                continue
            deltas.append(x.detach().numpy() - params["x"])
            own[k] = next_gradients(own[k], strength, {"x": deltas[-1]})
        if not deltas:
            continue
        mean, trainers = {"x": np.mean(deltas, axis=0)}, {"x": len(deltas)}
        params, state = optimizer.update(mean, state, params, trainers)
    return np.linalg.norm(params["x"] - optimum(hessians, minima))


@pytest.mark.parametrize("size", [CLIENTS, 4])
@pytest.mark.parametrize("seed", range(2))
def test_it_finds_the_optimum_where_fedavg_and_fedprox_do_not(seed, size):
    hessians, minima = problem(seed)
    cohorts = cohorts_of(np.random.default_rng(seed), size, 60)
    ends = {
        objective: distance_after(objective, optimizer, hessians, minima, cohorts)
        for objective, optimizer in (
            ("plain", server_opt.sgd()),
            ("fedprox", server_opt.sgd()),
            ("feddyn", server_opt.feddyn(CLIENTS)),
        )
    }
    assert ends["feddyn"] < 2e-3
    assert min(ends["plain"], ends["fedprox"]) > 50 * ends["feddyn"]


def test_half_of_it_leads_elsewhere():
    """Why objective and strategy must be chosen together."""
    hessians, minima = problem(0)
    cohorts = cohorts_of(np.random.default_rng(0), CLIENTS, 60)
    lone_client = distance_after("feddyn", server_opt.sgd(), hessians, minima, cohorts)
    lone_server = distance_after("plain", server_opt.feddyn(CLIENTS), hessians, minima, cohorts)
    assert min(lone_client, lone_server) > 0.05


@pytest.mark.parametrize("lost", [0.1, 0.3, 0.5])
def test_lost_updates_slow_it_and_do_not_lead_it_astray(lost):
    hessians, minima = problem(0)
    cohorts = cohorts_of(np.random.default_rng(0), CLIENTS, 300)
    optimizer = server_opt.feddyn(CLIENTS)
    assert distance_after("feddyn", optimizer, hessians, minima, cohorts, lost=lost) < 2e-3
