"""What training steps take, as predicted once in a run and kept on the device's disk.

A planner that looks for a plan predicts some ten of them, a second of CPU time on a desktop and
several on a Raspberry Pi, and each message has a process of its own: without this it would be
every round's.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict

import torch

from clients.memory import ClientMemory
from fleet.backbones import Backbone
from fleet.config import LocalConfig
from fleet.errors import ConfigError
from fleet.measure import StepCost
from fleet.plan import UpdatePlan
from fleet.planner import Costs

PART = "forecasts"  # of the memory


@contextmanager
def forecasts(
    memory: ClientMemory,
    backbone: Backbone,
    plan: UpdatePlan,
    local: LocalConfig,
    *,
    proximal: bool,
    cut: int,
) -> Iterator[Costs]:
    """What is known of a run's steps; what is added in the block is kept.

    Args:
        memory: of the run: its code stays as it is.
        plan: that the costs are of, narrowed.
        local, proximal, cut: with these settings; of others nothing is known.

    Raises:
        ConfigError: if the memory cannot be read. One that cannot be written forgets.
    """
    of = json.dumps(
        [
            torch.__version__,
            plan.digest,
            backbone.preprocessing.image_size,
            local.momentum,
            local.momentum_dtype,
            proximal,
            cut,
        ]
    )
    known = _read(memory, of)
    before = len(known)
    try:
        yield known
    finally:  # also where nothing fits: the next round asks the same
        if len(known) > before:
            rows = [[*key, asdict(cost)] for key, cost in known.items()]
            with suppress(ConfigError):
                memory.write(PART, {}, {"of": of, "costs": json.dumps(rows)})


def _read(memory: ClientMemory, of: str) -> Costs:
    found = memory.read(PART)
    if found is None or found.facts.get("of") != of:
        return {}
    try:
        return {
            (blocks, stash, batch_size, cached): StepCost(**cost)
            for blocks, stash, batch_size, cached, cost in json.loads(found.facts["costs"])
        }
    except (KeyError, TypeError, ValueError):  # of another version: predicted anew
        return {}
