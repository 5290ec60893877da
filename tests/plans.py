"""Toy plans and their numbers: all roles, blocks to cut off, and shapes that are awkward."""

import numpy as np

from fleet.plan import TensorSpec, UpdatePlan
from fleet.state import TrainableState


def plan_of(*specs, blocks):
    """A plan of a backbone that is not there."""
    return UpdatePlan(
        backbone="toy",
        preprocessing={},
        step_digests={},
        weights_digest="0" * 64,
        method="mobiletl",
        blocks=blocks,
        train_tail=False,
        specs=tuple(specs),
    )


def toy_plan(width=6, blocks=2):
    """Blocks of a conv, a depthwise conv and a norm with its statistics, and a head."""
    specs = []
    for depth in range(blocks, 0, -1):
        name = f"blocks.{blocks - depth}"
        specs += [
            TensorSpec(
                name=f"{name}.conv.weight", shape=(width, 4, 1, 1), role="weight", depth=depth
            ),
            TensorSpec(
                name=f"{name}.dw.weight", shape=(width, 1, 3, 3), role="weight", depth=depth
            ),
            TensorSpec(name=f"{name}.bn.weight", shape=(width,), role="scale", depth=depth),
            TensorSpec(name=f"{name}.bn.bias", shape=(width,), role="shift", depth=depth),
            TensorSpec(name=f"{name}.bn.running_mean", shape=(width,), role="mean", depth=depth),
            TensorSpec(name=f"{name}.bn.running_var", shape=(width,), role="var", depth=depth),
        ]
    specs += [
        TensorSpec(name="head.weight", shape=(3, width), role="weight", depth=0),
        TensorSpec(name="head.bias", shape=(3,), role="bias", depth=0),
    ]
    return plan_of(*specs, blocks=blocks)


def random_arrays(plan, seed, scale=1.0):
    """Normal numbers, each channel of a magnitude of its own; variances are positive."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for spec in plan.specs:
        numbers = rng.normal(size=spec.shape) * scale
        if len(spec.shape) > 1:
            numbers *= 4.0 ** rng.normal(size=(spec.shape[0], *[1] * (len(spec.shape) - 1)))
        arrays[spec.name] = (np.abs(numbers) if spec.role == "var" else numbers).astype(np.float32)
    return arrays


def random_state(plan, seed):
    """A state of such numbers."""
    return TrainableState(plan, random_arrays(plan, seed))
