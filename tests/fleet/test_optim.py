"""SGD against torch.optim.SGD."""

import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from fleet.optim import SGD

SHAPES = [(4, 3, 3, 3), (5, 4), (7,), ()]


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]


def give_gradients(tensors, generator):
    for tensor in tensors:
        tensor.grad = torch.randn(tensor.shape, generator=generator)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
@pytest.mark.parametrize("seed", range(3))
def test_ten_steps_are_torchs(momentum, weight_decay, seed):
    ours, theirs = parameters(seed), parameters(seed)
    groups = [
        {"params": theirs[:2], "weight_decay": weight_decay},
        {"params": theirs[2:], "weight_decay": 0.0},
    ]
    optimizer = SGD(ours, 0.1, momentum, weight_decay)
    reference = torch.optim.SGD(groups, lr=0.1, momentum=momentum)
    rng, same_rng = (torch.Generator().manual_seed(seed) for _ in range(2))
    for _ in range(10):
        give_gradients(ours, rng), give_gradients(theirs, same_rng)
        optimizer.step(), reference.step()
        assert_close(ours, theirs)


def test_parameter_without_a_gradient_stays_and_its_neighbours_move():
    first, second = parameters()[:2]
    before = [first.detach().clone(), second.detach().clone()]
    optimizer = SGD([first, second], 0.1, momentum=0.9, weight_decay=1e-2)
    second.grad = torch.ones_like(second)
    optimizer.step()
    assert torch.equal(first, before[0]) and not torch.equal(second, before[1])


def test_step_drops_the_gradients():
    ours = parameters()
    give_gradients(ours, torch.Generator().manual_seed(0))
    SGD(ours, 0.1).step()
    assert all(tensor.grad is None for tensor in ours)


def test_step_imports_no_compiler():
    script = (
        "import sys, torch\n"
        "from fleet.optim import SGD\n"
        "p = torch.ones(3, requires_grad=True)\n"
        "p.sum().backward()\n"
        "SGD([p], 0.1, momentum=0.9, weight_decay=0.1).step()\n"
        "assert p[0].item() < 1\n"
        "print('torch._dynamo' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
