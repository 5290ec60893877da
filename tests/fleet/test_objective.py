"""Local objectives against autograd of the papers' formulas, written out."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from fleet.objective import Proximal, feddyn, fedprox, next_gradients
from fleet.optim import SGD

SHAPES = {"conv.weight": (4, 3, 3, 3), "bn.bias": (4,), "head.weight": (5, 4)}


def arrays(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {n: (scale * rng.normal(size=s)).astype(np.float32) for n, s in SHAPES.items()}


def direction(proximal, parameters, gradients):
    """What SGD steps along, from its step of length 1."""
    tensors = {n: torch.tensor(p).requires_grad_() for n, p in parameters.items()}
    for name, tensor in tensors.items():
        tensor.grad = torch.tensor(gradients[name])
    targets = [
        torch.tensor(proximal.targets[n]) if n in proximal.targets else None for n in parameters
    ]
    SGD(tensors.values(), 1.0, proximal=proximal.strength, targets=targets).step()
    return {n: parameters[n] - t.detach().numpy() for n, t in tensors.items()}


def loss_of(parameters, c):
    return sum((c[n] * p).sin().sum() for n, p in parameters.items())


@pytest.mark.parametrize("strength", [0.01, 0.5, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_directions_are_gradients_of_the_papers_objectives(seed, strength):
    """FedProx: L(p) + μ/2·‖p − w‖². FedDyn: L(p) − ⟨h, p⟩ + μ/2·‖p − w‖². In float64."""
    received, here, c, h = (arrays(seed + 10 * i) for i in range(4))
    p = {n: torch.tensor(a, dtype=torch.float64, requires_grad=True) for n, a in here.items()}
    w, c64, h64 = ({n: torch.tensor(a).double() for n, a in x.items()} for x in (received, c, h))
    loss = loss_of(p, c64)
    plain = dict(zip(p, torch.autograd.grad(loss, p.values(), retain_graph=True), strict=True))
    gradients = {n: g.float().numpy() for n, g in plain.items()}
    near = sum((p[n] - w[n]).square().sum() for n in p) * strength / 2
    inner = sum((h64[n] * p[n]).sum() for n in p)
    for ours, theirs in (
        (fedprox(received, strength), loss + near),
        (feddyn(received, strength, h), loss - inner + near),
        (feddyn(received, strength), loss + near),
    ):
        wanted = torch.autograd.grad(theirs, p.values(), retain_graph=True)
        got = direction(ours, here, gradients)
        for name, gradient in zip(p, wanted, strict=True):
            assert_allclose(got[name], gradient.numpy(), rtol=1e-4, atol=2e-5)


def test_tensors_without_a_gradient_yet_are_pulled_to_what_was_received():
    received, h = arrays(0), arrays(1)
    del h["bn.bias"]
    h["blocks.9.weight"] = np.ones(3, np.float32)  # of a wider round
    targets = feddyn(received, 0.5, h).targets
    assert targets.keys() == received.keys()
    assert_array_equal(targets["bn.bias"], received["bn.bias"])
    assert_allclose(targets["head.weight"], received["head.weight"] + 2 * h["head.weight"], 1e-6)


def test_gradients_move_where_something_trained_and_stay_elsewhere():
    h, delta = arrays(0), arrays(1)
    del h["bn.bias"], delta["head.weight"]
    after = next_gradients(h, 0.25, delta)
    assert after.keys() == SHAPES.keys()
    assert_allclose(after["conv.weight"], h["conv.weight"] - 0.25 * delta["conv.weight"], 1e-6)
    assert_array_equal(after["bn.bias"], -0.25 * delta["bn.bias"])
    assert_array_equal(after["head.weight"], h["head.weight"])
    assert all(a.dtype == np.float32 for a in after.values())


def test_at_the_minimum_the_gradient_is_that_of_the_local_loss():
    """The paper's identity ∇L(θ_k) = h − μ·(θ_k − θ), on a quadratic loss solved exactly."""
    rng = np.random.default_rng(0)
    a, b, w, h = (rng.normal(size=6) for _ in range(4))
    a, strength = np.exp(a), 0.3
    target = feddyn({"x": w.astype(np.float32)}, strength, {"x": h.astype(np.float32)}).targets["x"]
    minimum = (a * b + strength * target) / (a + strength)  # of a/2·(p − b)² + μ/2·(p − target)²
    after = next_gradients({"x": h}, strength, {"x": minimum - w})["x"]
    assert_allclose(after, a * (minimum - b), rtol=1e-4, atol=1e-5)


def test_a_term_names_its_strength_and_targets():
    received = arrays(0)
    assert fedprox(received, 0.1) == Proximal(0.1, received)
