"""What of the server's plan a client trains in a round, and how: within its budget."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch

from clients.attempts import Experience
from clients.client import Client
from clients.forecasts import forecasts
from clients.memory import ClientMemory
from fleet.backbones import Backbone
from fleet.config import LocalConfig
from fleet.errors import ConfigError
from fleet.mobiletl import first_trained_step
from fleet.plan import UpdatePlan
from fleet.planner import Affordable, Costs, afford_locally, step_cost


class LimitTooLow(ConfigError):
    """Not even the narrowest plan fits into what a device has learnt that it has."""


@dataclass(frozen=True)
class Share:
    """A client's part of a plan.

    Attributes:
        plan: what it trains.
        local: how; stash and batch size are the planner's where there is a budget.
        budget_bytes: that it was planned within; None: there is none.
        peak_bytes: predicted, beyond the loaded model; 0 if nobody asks.
    """

    plan: UpdatePlan
    local: LocalConfig
    budget_bytes: int | None
    peak_bytes: int

    def metrics(self) -> dict[str, int]:
        """What the planner says, where there was a budget."""
        if self.budget_bytes is None:
            return {}
        return {"budget-bytes": self.budget_bytes, "planned-peak-bytes": self.peak_bytes}


def share_of(
    client: Client,
    backbone: Backbone,
    widest: UpdatePlan,
    learnt: Experience,
    memory: ClientMemory | None = None,
) -> Share:
    """The sub-plan that a client trains.

    Within a budget, or a limit that the device has learnt, the run's batch size
    is the most, and the stash is the planner's choice.

    Args:
        memory: of the run, on a device: what steps take is predicted once.

    Raises:
        ConfigError: if the budget is below the floor.
        LimitTooLow: if the limit is.
    """
    local, own = client.config.local, widest
    if widest.method not in ("head", "full"):
        own = widest.narrow(client.blocks(widest.blocks))
    cut = first_trained_step(backbone.steps, widest)
    pulled = client.config.federation.objective != "plain"
    fixed = {"proximal": pulled, "cut": cut}
    budget_bytes = learnt.within(client.budget_bytes())
    if memory is None:
        if budget_bytes is None:
            return Share(own, local, None, 0)
        afford = partial(_afford, backbone, own, budget_bytes, local, **fixed)
        return _planned(afford, local, budget_bytes, learnt)
    with forecasts(memory, backbone, own, local, **fixed) as known:
        if budget_bytes is None:
            return Share(own, local, None, _peak_bytes(backbone, own, local, pulled, cut, known))
        plan = partial(
            afford_locally,
            backbone,
            own,
            budget_bytes,
            local,
            proximal=pulled,
            cut=cut,
            known=known,
        )
        return _planned(plan, local, budget_bytes, learnt)


# A simulated fleet's devices have few different budgets.
_afford = lru_cache(maxsize=64)(afford_locally)


def _planned(
    afford: Callable[[], Affordable], local: LocalConfig, budget_bytes: int, learnt: Experience
) -> Share:
    try:
        found = afford()
    except ConfigError as error:
        if budget_bytes != learnt.limit_bytes:
            raise
        raise LimitTooLow(
            f"training was killed for memory, and what it is planned within since then is too "
            f"little: {error}; the next round may take a little more"
        ) from error
    local = replace(local, stash=found.stash, batch_size=found.batch_size)
    return Share(found.plan, local, budget_bytes, found.peak_bytes)


def _peak_bytes(
    backbone: Backbone,
    plan: UpdatePlan,
    local: LocalConfig,
    pulled: bool,
    cut: int,
    known: Costs,
) -> int:
    """Of a step on images, and of one on features from the cache."""
    costs = (
        step_cost(
            known,
            backbone,
            plan,
            local.stash,
            local.batch_size,
            cached,
            momentum=local.momentum,
            momentum_dtype=getattr(torch, local.momentum_dtype),
            proximal=pulled,
            cut=cut,
        )
        for cached in (False, True)
    )
    return max(cost.peak_bytes for cost in costs)
