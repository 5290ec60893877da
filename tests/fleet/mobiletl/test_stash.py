"""What is kept against what was given: how near it comes, and what must stay exact."""

import itertools

import pytest
import torch
import torch.nn as nn
from torch.testing import assert_close

from fleet.errors import ConfigError
from fleet.mobiletl.stash import check_stash, keep, restore
from fleet.plan import STASHES
from tests.many import many

ROUNDED = ("bfloat16", "int8")
ACTIVATIONS = [None, nn.ReLU(), nn.ReLU6(), nn.Hardswish(), nn.SiLU()]
# Where an activation's derivative is not nought; at the end points themselves it is.
WHERE_IT_RISES = [
    (nn.ReLU(), lambda x: x > 0),
    (nn.ReLU6(), lambda x: (x > 0) & (x < 6)),
    (nn.Hardswish(), lambda x: x > -3),
]
RISES = pytest.mark.parametrize(("activation", "rises"), WHERE_IT_RISES, ids=["V1", "V2", "V3"])


def random_map(seed):
    """From all but constant to wide, about nought or far from it."""
    generator = torch.Generator().manual_seed(seed)
    middle, log_width = torch.randn(2, generator=generator).tolist()
    x = torch.randn(3, 4, 5, 6, generator=generator)
    return x * 10**log_width + 5 * middle


def derivative(activation, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(activation(x).sum(), x)[0]


def beside(x):
    infinity = torch.tensor(torch.inf)
    return torch.cat([x, x.nextafter(infinity), x.nextafter(-infinity)])


CORNERS = beside(torch.tensor([0.0, 6.0, -3.0, 3.0]))
TINY = torch.tensor([1e-45, 1e-40, 1e-38, 1e-30, 1e-12])
HUGE = torch.tensor([7.0, 1e4, 1e30])
STRANGE = {
    "corners": CORNERS,
    "corners and tiny": torch.cat([CORNERS, TINY, -TINY]),
    "corners and huge": torch.cat([CORNERS, HUGE, -HUGE]),
    "everything": torch.cat([CORNERS, TINY, -TINY, HUGE, -HUGE, torch.tensor([-0.0])]),
    "tiny": torch.cat([TINY, -TINY]),
    "about -3": beside(beside(beside(torch.tensor([-3.0])))),
    "about 6": beside(beside(beside(torch.tensor([6.0])))),
    "all negative": -torch.tensor([0.1, 1.0, 2.9, 3.1, 100.0]),
    "all below -3": torch.tensor([-4.0, -5.0]),
    "all above 6": torch.tensor([6.5, 7.0, 1e30]),
} | {f"all {x}": torch.full((4,), x) for x in (0.0, 6.0, -3.0, 3.0, 1e-40, -1e30, 2.5)}


@many("seed", range(5))
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float32_is_the_map_itself(seed, activation, dtype):
    x = random_map(seed).to(dtype)
    (kept,) = keep(x, activation, "float32")
    back = restore([kept])
    assert kept is x and torch.equal(back, x) and back.dtype == dtype


@pytest.mark.parametrize("stash", ["float32", *ROUNDED])
def test_restored_map_is_the_caller_s_own(stash):
    kept = keep(random_map(0), nn.ReLU6(), stash)
    before = restore(kept)
    restore(kept).mul_(2).add_(1)
    assert torch.equal(restore(kept), before)


@pytest.mark.parametrize("stash", ROUNDED)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_restored_map_has_the_type_shape_and_layout_of_the_map(stash, activation):
    x = random_map(0).contiguous(memory_format=torch.channels_last)
    back = restore(keep(x, activation, stash))
    assert back.dtype == torch.float32 and back.shape == x.shape and back.stride() == x.stride()


@many("seed", range(30))
@pytest.mark.parametrize("activation", [None, nn.SiLU()], ids=repr)
def test_bfloat16_is_within_half_a_step(seed, activation):
    x = random_map(seed)
    assert_close(restore(keep(x, activation, "bfloat16")), x, rtol=2**-8, atol=0)


@many("seed", range(30))
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.Hardswish()], ids=repr)
def test_bfloat16_beside_a_corner_is_within_a_step(seed, activation):
    x = random_map(seed)
    assert_close(restore(keep(x, activation, "bfloat16")), x, rtol=2**-7, atol=0)


@many("seed", range(30))
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_int8_is_within_half_a_step_where_the_activation_is_not_flat(seed, activation):
    """A step is a 254th of what lies between the flat ends, or between the extremes."""
    x = random_map(seed)
    back = restore(keep(x, activation, "int8"))
    low = {nn.ReLU: 0.0, nn.ReLU6: 0.0, nn.Hardswish: -3.0}.get(type(activation), x.min().item())
    high = 6.0 if isinstance(activation, nn.ReLU6) else x.max().item()
    step = max(high - low, 0) / 254
    clamped = (t.clamp(low, max(low, high)) for t in (back, x))
    assert_close(*clamped, rtol=1e-6, atol=0.501 * step)


@many("seed", range(30))
@pytest.mark.parametrize("stash", ROUNDED)
@RISES
def test_activation_of_a_rounded_map_rises_where_it_did(seed, stash, activation, rises):
    x = random_map(seed)
    assert torch.equal(rises(restore(keep(x, activation, stash))), rises(x))


@many("x", STRANGE.values())
@pytest.mark.parametrize("stash", ROUNDED)
@RISES
def test_strange_maps_rise_where_they_did(x, stash, activation, rises):
    back = restore(keep(x, activation, stash))
    assert back.isfinite().all()
    assert torch.equal(rises(back), rises(x))


@pytest.mark.parametrize("stash", ROUNDED)
@RISES
def test_every_pair_of_strange_values_rises_where_it_did(stash, activation, rises):
    """The span of an int8 map is that of its values, so every neighbourhood counts."""
    for pair in itertools.combinations(STRANGE["everything"].unique(), 2):
        x = torch.stack(pair)
        assert torch.equal(rises(restore(keep(x, activation, stash))), rises(x)), pair


@many("x", STRANGE.values())
@pytest.mark.parametrize("stash", ROUNDED)
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6()], ids=repr)
def test_derivatives_of_relus_are_exact(x, stash, activation):
    assert torch.equal(
        derivative(activation, restore(keep(x, activation, stash))), derivative(activation, x)
    )


def test_bfloat16_stays_on_its_side_of_hard_swish_s_upper_corner():
    x = beside(torch.tensor([3.0, 2.999, 3.001]))
    back = restore(keep(x, nn.Hardswish(), "bfloat16"))
    assert torch.equal((back - 3).sign(), (x - 3).sign())
    assert_close(derivative(nn.Hardswish(), back), derivative(nn.Hardswish(), x), rtol=0.01, atol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
@pytest.mark.parametrize(
    ("stash", "a_value", "besides"), [("float32", 4, 0), ("bfloat16", 2, 0), ("int8", 1, 8)]
)
def test_bytes_kept(activation, stash, a_value, besides):
    x = random_map(0)
    assert sum(t.nbytes for t in keep(x, activation, stash)) == a_value * x.numel() + besides


@pytest.mark.parametrize("name", STASHES)
def test_known_stash_is_its_name(name):
    assert check_stash(name) == name


def test_unknown_stash_is_refused():
    with pytest.raises(
        ConfigError,
        match=r"unknown stash float16; known: recompute, int8, bfloat16, float32, published$",
    ):
        check_stash("float16")
