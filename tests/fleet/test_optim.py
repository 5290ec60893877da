"""SGD against torch.optim.SGD."""

import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from fleet.errors import UpdateError
from fleet.measure import allocator_peak
from fleet.optim import SGD, stochastic_bfloat16

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


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_taken_in_backward_are_torchs_and_leave_no_gradient(momentum):
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)) for _ in "ab")
    theirs.load_state_dict(ours.state_dict())
    optimizer = SGD(ours.parameters(), 0.1, momentum)
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=momentum)
    for _ in range(5):
        x = torch.randn(4, 5)
        with optimizer.stepping_in_backward():
            ours(x).square().sum().backward()
        assert all(p.grad is None for p in ours.parameters())
        reference.zero_grad()
        theirs(x).square().sum().backward()
        reference.step()
        assert_close(list(ours.parameters()), list(theirs.parameters()))
    ours(x).sum().backward()  # the hooks are gone
    assert all(p.grad is not None for p in ours.parameters())


def test_gradients_are_not_there_all_at_once():
    layers = [torch.nn.Linear(256, 256, bias=False) for _ in range(16)]
    model = torch.nn.Sequential(*layers)
    peaks = {}
    for in_backward in (False, True):
        optimizer = SGD(model.parameters(), 1e-3)
        with allocator_peak() as peak:
            loss = model(torch.randn(2, 256)).sum()
            if in_backward:
                with optimizer.stepping_in_backward():
                    loss.backward()
            else:
                loss.backward()
                optimizer.step()
        peaks[in_backward] = peak.bytes
    assert peaks[True] < 0.25 * peaks[False]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradient_that_is_not_finite_moves_nothing(bad):
    ours = parameters()
    before = [p.detach().clone() for p in ours]
    give_gradients(ours, torch.Generator().manual_seed(0))
    ours[1].grad[2, 3] = bad
    with pytest.raises(UpdateError, match=r"a gradient of shape \(5, 4\) is not finite"):
        SGD(ours, 0.1).step()
    assert all(torch.equal(p, b) for p, b in zip(ours, before, strict=True))


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


@pytest.mark.parametrize("value", [1.001, -3.3e-5, 2.0, 0.0, 1e-40, -7.77e30])
def test_stochastic_rounding_takes_a_neighbour_and_is_right_on_average(value):
    torch.manual_seed(0)
    x = torch.full((200_000,), value)
    rounded = stochastic_bfloat16(x).double()
    exact = x[0].bfloat16()
    away = exact.nextafter(exact.new_tensor(float("inf") if x[0] > exact else float("-inf")))
    neighbours = {exact.item(), away.item()} if x[0] != exact.float() else {value}
    assert set(rounded.unique().tolist()) == neighbours
    gap = abs(away.item() - exact.item())
    assert abs(rounded.mean().item() - x[0].item()) <= 0.005 * gap  # four standard errors


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_stochastic_rounding_keeps_every_value_in_its_place(layout):
    x = torch.randn(3, 5, 4, 2).contiguous(memory_format=layout)
    assert_close(stochastic_bfloat16(x).float(), x, rtol=2**-7, atol=0)


def test_what_is_not_finite_stays_so():
    x = torch.tensor([float("inf"), float("-inf"), float("nan")])
    assert_close(stochastic_bfloat16(x).float(), x, equal_nan=True)


def test_momentum_in_bfloat16_takes_half_the_room():
    ours = parameters()
    optimizer = SGD(ours, 0.1, 0.9, momentum_dtype=torch.bfloat16)
    give_gradients(ours, torch.Generator().manual_seed(0))
    optimizer.step()
    assert sum(v.nbytes for v in optimizer._velocity.values()) == 2 * sum(p.numel() for p in ours)


def test_momentum_in_bfloat16_gathers_what_rounding_to_nearest_would_lose():
    """Increments of 1/1000 of the velocity: the mean over elements is that of float32."""
    torch.manual_seed(0)
    moved = []
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.zeros(20_000, requires_grad=True)
        optimizer = SGD([weight], 1.0, momentum=0.999, momentum_dtype=dtype)
        for step in range(50):
            weight.grad = torch.full_like(weight, 1.0 if step == 0 else 0.002)
            optimizer.step()
        moved.append(weight.detach().mean())
    assert_close(moved[1], moved[0], rtol=1e-3, atol=0)
    velocity = torch.ones((), dtype=torch.bfloat16)
    assert (velocity * 0.999 + 0.002).bfloat16() == velocity  # as to nearest it would have stayed


def pulled(tensors, targets, gradients, strength, decay=0.0):
    """Gradients of Σ g·p + strength/2·‖p − target‖² + decay/2·‖p‖², as autograd takes them."""
    objective = 0.0
    for p, t, g in zip(tensors, targets, gradients, strict=True):
        objective = objective + (g * p).sum()
        if t is not None:
            objective = objective + strength / 2 * (p - t).square().sum()
        if p.ndim > 1:
            objective = objective + decay / 2 * p.square().sum()
    return torch.autograd.grad(objective, tensors)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
@pytest.mark.parametrize("seed", range(3))
def test_a_proximal_term_is_that_of_the_written_out_objective(momentum, weight_decay, seed):
    ours, theirs = parameters(seed), parameters(seed)
    targets = [None if p.ndim == 1 else p.detach() for p in parameters(seed + 100)]
    optimizer = SGD(ours, 0.1, momentum, weight_decay, proximal=0.3, targets=targets)
    reference = torch.optim.SGD(theirs, lr=0.1, momentum=momentum)
    rng = torch.Generator().manual_seed(seed)
    for _ in range(10):
        gradients = [torch.randn(p.shape, generator=rng) for p in ours]
        wanted = pulled(theirs, targets, gradients, 0.3, weight_decay)
        for mine, same, g, w in zip(ours, theirs, gradients, wanted, strict=True):
            mine.grad, same.grad = g.clone(), w
        optimizer.step(), reference.step()
        assert_close(ours, theirs)


def test_a_proximal_term_in_backward_and_with_bfloat16_momentum_is_the_same():
    torch.manual_seed(0)
    start = torch.randn(20_000)
    target = torch.randn(20_000)
    ends = []
    for in_backward, dtype in (
        (False, torch.float32),
        (True, torch.float32),
        (True, torch.bfloat16),
    ):
        weight = start.clone().requires_grad_()
        optimizer = SGD(
            [weight], 0.1, 0.9, momentum_dtype=dtype, proximal=0.5, targets=[target.clone()]
        )
        for _ in range(20):
            if in_backward:
                with optimizer.stepping_in_backward():
                    weight.square().sum().backward()
            else:
                weight.square().sum().backward()
                optimizer.step()
        ends.append(weight.detach())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], start)
    assert_close(ends[2], ends[0], rtol=0, atol=0.05)
    assert (ends[2] - ends[0]).mean().abs() < 1e-3  # rounding leads nowhere


def test_targets_count_and_none_are_kept_without_a_term():
    ours = parameters()
    size = 4 * sum(p.numel() for p in ours)
    targets = [torch.zeros_like(p) for p in ours]
    assert SGD(ours, 0.1, 0.9).nbytes == 0
    assert SGD(ours, 0.1, 0.9, targets=targets).nbytes == 0
    optimizer = SGD(ours, 0.1, 0.9, proximal=1.0, targets=[None, *targets[1:]])
    assert optimizer.nbytes == size - targets[0].nbytes
    give_gradients(ours, torch.Generator().manual_seed(0))
    optimizer.step()
    assert optimizer.nbytes == 2 * size - targets[0].nbytes


def test_too_few_targets_are_a_mistake_of_the_code():
    with pytest.raises(ValueError, match="shorter"):
        SGD(parameters(), 0.1, proximal=1.0, targets=[None])
