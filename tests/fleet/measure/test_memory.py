"""Bytes kept and bytes allocated, in cases whose sizes are known."""

import psutil
import pytest
import torch
import torch.nn as nn
from torch.profiler import ProfilerActivity, profile

from fleet.measure import allocator_peak, saved_for_backward

KIB = 1024


def room(kib):
    return torch.empty(kib * KIB, dtype=torch.uint8)


def test_peak_of_one_tensor_is_its_size():
    with allocator_peak() as peak:
        room(256)
    assert peak.bytes == pytest.approx(256 * KIB, abs=4 * KIB)


def test_peak_counts_what_lives_at_once():
    with allocator_peak() as peak:
        first, second = room(256), room(128)
        del first
        third = room(64)
    assert peak.bytes == pytest.approx((256 + 128) * KIB, abs=4 * KIB)
    del second, third


def test_peak_does_not_add_up_what_lives_in_turn():
    with allocator_peak() as peak:
        for _ in range(10):
            room(256)
    assert peak.bytes == pytest.approx(256 * KIB, abs=4 * KIB)


def test_peak_is_of_the_block_alone():
    before = room(512)
    with allocator_peak() as peak:
        inside = room(64)
    after = room(1024)
    assert peak.bytes == pytest.approx(64 * KIB, abs=4 * KIB)
    del before, inside, after


def test_releasing_what_was_there_before_makes_no_room():
    before = room(512)
    with allocator_peak() as peak:
        del before
        inside = room(256)
    assert peak.bytes == pytest.approx(256 * KIB, abs=4 * KIB)
    del inside


def test_empty_block_has_no_peak():
    with allocator_peak() as peak:
        pass
    assert peak.bytes == 0


def test_device_that_is_not_followed_has_no_peak():
    with allocator_peak("meta") as peak:
        torch.empty(1000, device="meta")
    assert peak.bytes == 0


def test_peak_can_be_followed_again_after_an_error():
    with pytest.raises(ZeroDivisionError), allocator_peak():
        _ = 1 / 0
    with allocator_peak() as peak:
        room(256)
    assert peak.bytes == pytest.approx(256 * KIB, abs=4 * KIB)


def test_operations_are_not_recorded_as_they_would_take_more_than_a_step():
    x = torch.zeros(1)
    before = psutil.Process().memory_info().rss
    with allocator_peak() as peak:
        for _ in range(50_000):
            x.zero_()  # allocates nothing
        grown = psutil.Process().memory_info().rss - before
    assert peak.bytes == 0
    assert grown < 8 * 2**20  # a record of each took 45 MiB


def test_operations_are_recorded_again_for_others_afterwards():
    with allocator_peak():
        pass
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        torch.ones(4).sum()
    assert "aten::sum" in {event.key for event in profiler.key_averages()}


def train_step(layer, x):
    layer(x).square().sum().backward()
    layer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("groups", [1, 16])
def test_peak_of_a_training_step_is_the_profilers(groups):
    layer, x = nn.Conv2d(16, 16, 3, groups=groups), torch.randn(4, 16, 32, 32)
    train_step(layer, x)
    with allocator_peak() as peak:
        train_step(layer, x)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train_step(layer, x)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    assert highest > 2 * x.nbytes
    assert peak.bytes == pytest.approx(highest, abs=4 * KIB)


def test_saved_bytes_are_those_of_the_tensors_that_backward_needs():
    x = torch.randn(10, 20)
    w = torch.randn(20, 30, requires_grad=True)
    with saved_for_backward() as saved:
        y = (x @ w).exp()  # keeps x for w's gradient and its own result
    assert saved.total == x.nbytes + y.nbytes


def test_tensor_saved_twice_is_counted_once():
    x = torch.randn(100, requires_grad=True)
    with saved_for_backward() as saved:
        y = x.exp()
        z = y * y.sigmoid()
    assert saved.total == y.nbytes + z.nbytes  # the sigmoid's result is as large as z


def test_views_count_as_the_storage_that_they_keep_alive():
    x = torch.randn(100, requires_grad=True)
    y = x.exp()
    with saved_for_backward() as saved:
        y[:10].square()
    assert saved.total == y.nbytes


def test_excluded_tensors_and_their_views_are_not_counted():
    x, layer = torch.randn(8, 20), nn.Linear(20, 30)
    x.requires_grad_()
    with saved_for_backward(layer.parameters()) as saved:
        layer(x)
    assert saved.total == x.nbytes


def test_nothing_is_kept_without_autograd():
    x = torch.randn(100, requires_grad=True)
    with saved_for_backward() as saved, torch.no_grad():
        x.exp()
    assert saved.total == 0


def test_backward_works_on_what_was_counted():
    x = torch.randn(100, requires_grad=True)
    with saved_for_backward():
        y = x.exp()
    y.sum().backward()
    assert torch.equal(x.grad, y)
