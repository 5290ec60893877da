"""Memory budget in, update plan out.

Candidates run on tensors without storage (`fleet.measure.dry_run`); the one
that trains the most blocks is taken, of these the most exact stash, and of
these the largest batch.
"""

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from fleet.backbones import Backbone
from fleet.config import LocalConfig
from fleet.errors import ConfigError
from fleet.measure import StepCost, dry_run
from fleet.plan import UpdatePlan

# From the most exact on; of the two that round nothing, the faster first.
STASHES_BY_EXACTNESS = ("float32", "recompute", "bfloat16", "int8")
MIN_BATCH_SIZE = 8  # statistics of smaller batches teach badly

MIB = 2**20

# Blocks, stash, batch size and whether features come from the cache → what a step takes.
Costs = MutableMapping[tuple[int, str, int, bool], StepCost]

_OWN_GROUP, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# Of control groups: files of the limit and of what is used; what of it the kernel drops.
_SECOND_VERSION = "memory.max", "memory.current", "inactive_file"
_FIRST_VERSION = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"


@dataclass(frozen=True, kw_only=True)
class Affordable:
    """The largest plan within a budget.

    Attributes:
        plan: what trains; of 0 blocks, the head alone.
        stash: what `mobiletl` keeps for backward.
        batch_size: images a step.
        first: predicted cost of a step on images.
        later: the same on features from the cache.
        why_not_larger: what the next larger plan would need; empty if there is none.
    """

    plan: UpdatePlan
    stash: str
    batch_size: int
    first: StepCost
    later: StepCost
    why_not_larger: str

    @property
    def peak_bytes(self) -> int:
        """Predicted allocator peak beyond the loaded model."""
        return max(self.first.peak_bytes, self.later.peak_bytes)

    def flops_an_epoch(self, num_examples: int) -> tuple[int, int]:
        """Of the first epoch, and of a later one, whose features come from the cache."""
        first, later = (
            cost.flops_prefix + cost.flops_forward + cost.flops_backward
            for cost in (self.first, self.later)
        )
        return first * num_examples // self.batch_size, later * num_examples // self.batch_size


def afford(
    backbone: Backbone,
    widest: UpdatePlan,
    budget_bytes: int,
    *,
    batch_sizes: tuple[int, ...] = (8, 16, 32),
    stashes: tuple[str, ...] = STASHES_BY_EXACTNESS,
    momentum: float = 0.9,
    momentum_dtype: torch.dtype = torch.float32,
    proximal: bool = False,
    cut: int | None = None,
    known: Costs | None = None,
) -> Affordable:
    """The largest sub-plan of `widest` whose training fits into a budget.

    Args:
        backbone: tells classes and image size; is not touched.
        widest: what there is to train at most.
        budget_bytes: for what PyTorch allocates beyond the loaded model.
        batch_sizes: to choose from, rising. How many blocks train, and with
            which stash, the smallest decides.
        stashes: to choose from, the most wanted first; of `mobiletl` only.
        momentum: of the optimiser; 0 keeps no buffers.
        momentum_dtype: of its buffers.
        proximal: the objective has a proximal term, on what travels.
        cut: step at which features are cut, as `TransferModel` takes it.
        known: costs that were found before with the same arguments, whatever the budget;
            those that are found now are added.

    Raises:
        ConfigError: if not even the narrowest plan fits; tells the floor.
    """
    if widest.method != "mobiletl":
        stashes = ("published",)

    known = {} if known is None else known

    def cost(blocks: int, stash: str, batch_size: int, cached: bool = False) -> StepCost:
        try:
            return step_cost(
                known,
                backbone,
                widest.narrow(blocks),
                stash,
                batch_size,
                cached,
                momentum=momentum,
                momentum_dtype=momentum_dtype,
                proximal=proximal,
                cut=cut,
            )
        except ValueError as error:  # of batch norm: one value a channel has no variance
            raise ConfigError(
                f"a batch of {batch_size} at {backbone.preprocessing.image_size} px is too little "
                f"to train on: {error}; raise batch-size or image-size"
            ) from error

    def fits(blocks: int, stash: str, batch_size: int) -> bool:
        return cost(blocks, stash, batch_size).peak_bytes <= budget_bytes

    def fitting(blocks: int) -> str | None:
        return next((stash for stash in stashes if fits(blocks, stash, batch_sizes[0])), None)

    def leanest(blocks: int) -> tuple[str, StepCost]:
        costs = {stash: cost(blocks, stash, batch_sizes[0]) for stash in stashes}
        return min(costs.items(), key=lambda item: item[1].peak_bytes)

    def too_large(blocks: int, stash: str, batch_size: int) -> str:
        need = cost(blocks, stash, batch_size)
        return (
            f"{_words(widest.narrow(blocks), stash)} needs {_mib(need.peak_bytes)} at batch "
            f"{batch_size}, the budget is {_mib(budget_bytes)}; {need.peak_in} needs the most"
        )

    choices = range(widest.blocks if widest.method == "full" else 0, widest.blocks + 1)
    if widest.method == "shifts":  # may take less than the weights that norms fold into, frozen
        blocks = next((k for k in reversed(choices) if fitting(k)), None)
    else:
        blocks = _last(choices, lambda k: fitting(k) is not None)
    if blocks is None:
        candidates = choices if widest.method == "shifts" else choices[:1]
        narrowest = min(candidates, key=lambda k: leanest(k)[1].peak_bytes)
        stash, floor = leanest(narrowest)
        raise ConfigError(
            f"budget-mib {budget_bytes / MIB:.4g} is below the floor of {_mib(floor.peak_bytes)}, "
            f"which {_words(widest.narrow(narrowest), stash)} takes at batch {batch_sizes[0]} and "
            f"{backbone.preprocessing.image_size} px; {floor.peak_in} sets it: raise the budget, "
            f"or lower batch-size or image-size"
        )
    stash = fitting(blocks)
    batch_size = _last(batch_sizes, lambda n: fits(blocks, stash, n))
    first, later = (cost(blocks, stash, batch_size, cached) for cached in (False, True))
    larger = None  # in the order in which the planner wishes: blocks, stash, batch
    if blocks < widest.blocks:
        larger = (blocks + 1, leanest(blocks + 1)[0], batch_sizes[0])
    elif stash != stashes[0]:
        larger = (blocks, stashes[stashes.index(stash) - 1], batch_sizes[0])
    elif batch_size < batch_sizes[-1]:
        larger = (blocks, stash, batch_sizes[batch_sizes.index(batch_size) + 1])
    return Affordable(
        plan=widest.narrow(blocks),
        stash=stash,
        batch_size=batch_size,
        first=first,
        later=later,
        why_not_larger="" if larger is None else too_large(*larger),
    )


def step_cost(
    known: Costs,
    backbone: Backbone,
    plan: UpdatePlan,
    stash: str,
    batch_size: int,
    cached: bool,
    **fixed: Any,
) -> StepCost:
    """What a step takes: from `known`, or by a dry run, which is added to it.

    Args:
        known: costs of the same backbone and of plans narrowed from one, under the same `fixed`.
        fixed: further arguments of `dry_run`, as are the others.
    """
    key = plan.blocks, stash, batch_size, cached
    if key not in known:
        known[key] = dry_run(backbone, plan, stash, batch_size=batch_size, cached=cached, **fixed)
    return known[key]


def afford_locally(
    backbone: Backbone,
    widest: UpdatePlan,
    budget_bytes: int,
    local: LocalConfig,
    *,
    proximal: bool = False,
    cut: int | None = None,
    known: Costs | None = None,
) -> Affordable:
    """`afford` under a run's local settings: with its momentum, in batches up to its own.

    Args:
        backbone, widest, budget_bytes, proximal, cut, known: as `afford`'s.
        local: its batch size is the largest that is chosen from.

    Raises:
        ConfigError: as `afford`.
    """
    return afford(
        backbone,
        widest,
        budget_bytes,
        batch_sizes=batch_sizes_between(MIN_BATCH_SIZE, local.batch_size),
        momentum=local.momentum,
        momentum_dtype=getattr(torch, local.momentum_dtype),
        proximal=proximal,
        cut=cut,
        known=known,
    )


def batch_sizes_between(smallest: int, largest: int) -> tuple[int, ...]:
    """Doubled from `smallest` on, up to `largest`, which is one of them."""
    sizes = [min(smallest, largest)]
    while 2 * sizes[-1] < largest:
        sizes.append(2 * sizes[-1])
    return (*sizes, largest) if sizes[-1] < largest else tuple(sizes)


def available_bytes(reserve_bytes: int) -> int:
    """Memory that training may take here now, a reserve for everything else left out.

    Of what the system has available and what the process's own control group
    still allows (systemd's MemoryMax, a container's limit) the smaller.

    Raises:
        ConfigError: if there is not more than the reserve.
    """
    free = psutil.virtual_memory().available
    for limit, used in _control_groups():
        free = min(free, limit - used)
    if free <= reserve_bytes:
        raise ConfigError(
            f"{_mib(max(0, free))} of memory are free here and reserve-mib keeps "
            f"{_mib(reserve_bytes)} of it; lower reserve-mib, or end what else runs"
        )
    return free - reserve_bytes


def _control_groups() -> list[tuple[int, int]]:
    """(limit, used) in bytes of every control group that this process is in and that has one."""
    try:
        lines = _OWN_GROUP.read_text().splitlines()
    except OSError:  # no Linux
        return []
    found = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            found += _limits(_GROUPS, group, _SECOND_VERSION)
        elif "memory" in controllers.split(","):
            found += _limits(_GROUPS / "memory", group, _FIRST_VERSION)
    return found


def _limits(root: Path, group: str, files: tuple[str, str, str]) -> list[tuple[int, int]]:
    """Of a group and all around it; in a container the own group's folder may not be there."""
    limit_file, used_file, dropped = files
    own, found = root / group.lstrip("/"), []
    for folder in (own, *own.parents):
        if not folder.is_relative_to(root):
            break
        try:
            limit = (folder / limit_file).read_text().strip()
            if limit != "max":
                found.append((int(limit), _used_bytes(folder, used_file, dropped)))
        except (OSError, ValueError):  # the root has none, or it is not to be read
            continue
    return found


def _used_bytes(folder: Path, used: str, dropped: str) -> int:
    """Of a control group, without pages of files that the kernel drops before it kills."""
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return int((folder / used).read_text()) - int(stat.get(dropped, 0))


def _last(rising: range | tuple[int, ...], works: Callable[[int], bool]) -> int | None:
    """The last of values of which all up to some one work; None: not even the first does."""
    low, high = -1, len(rising) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if works(rising[middle]) else (low, middle - 1)
    return rising[low] if low >= 0 else None


def _words(plan: UpdatePlan, stash: str) -> str:
    if plan.method == "full":
        return "the whole model"
    if not plan.blocks:
        return "the head alone"
    with_stash = f" with stash {stash}" if plan.method == "mobiletl" else ""
    return f"{plan.method} of {plan.blocks} block{'s'[: plan.blocks > 1]}{with_stash}"


def _mib(size: int) -> str:
    return f"{size / MIB:.1f} MiB"
