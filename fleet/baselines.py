"""What MobileTL is held against: other ways to fine-tune within less memory, on stock autograd.

All of them train the model of a `TransferModel` and are used as one.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import groupby

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fleet.backbones import Backbone
from fleet.errors import ConfigError
from fleet.mobiletl import TransferModel
from fleet.mobiletl.chunks import chunks
from fleet.mobiletl.model import finite
from fleet.mobiletl.prefix import MICRO_BATCH
from fleet.plan import METHODS, make_plan
from fleet.structure import Step


class Checkpointed(TransferModel):
    """Stock autograd that keeps each block's input and runs the block again in backward.

    What lies between blocks, as the stem and all from the last block to the
    logits, is one segment: activations in it may work in place.

    Source: Chen et al., Training Deep Nets with Sublinear Memory Cost,
    arXiv:1604.06174; `torch.utils.checkpoint`.
    """

    def from_features(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of what `features` returned."""
        for _, steps in groupby(self._trained, lambda step: step.block):
            segment = tuple(steps)
            contexts = partial(_contexts, segment)
            run = partial(_run, segment)
            x = checkpoint(run, x, use_reentrant=False, context_fn=contexts)
        return x


class FrozenNorms(TransferModel):
    """Stock autograd with every norm frozen and gradients accumulated, two images at a time.

    The strong simple baseline: nothing couples the images of a batch, so the
    gradient is the whole batch's.
    """

    accumulates = True

    def gradients(self, x: Tensor, labels: Tensor) -> float:
        """Mean cross-entropy of a batch in nats; its gradients go into the parameters' own."""
        total = 0.0
        for part in chunks(len(x), MICRO_BATCH):
            logits = self.from_features(x[part])
            share = F.cross_entropy(logits, labels[part], reduction="sum") / len(x)
            total += finite(share)
            share.backward()
        return total

    def _stock_modules(self) -> list[nn.Module]:
        return []


def _full_checkpointed(backbone: Backbone, blocks: int) -> TransferModel:
    return Checkpointed(backbone, make_plan(backbone, method="full", blocks=0))


def _blocks_checkpointed(backbone: Backbone, blocks: int) -> TransferModel:
    return Checkpointed(backbone, make_plan(backbone, method="blocks", blocks=blocks))


def _frozen_norms(backbone: Backbone, blocks: int) -> TransferModel:
    plan = make_plan(backbone, method="blocks", blocks=blocks)
    specs = tuple(spec for spec in plan.specs if spec.role in ("weight", "bias"))
    return FrozenNorms(backbone, replace(plan, specs=specs))


def _bias_only(backbone: Backbone, blocks: int) -> TransferModel:
    """TinyTL-B: the shifts of all blocks and of the tail, and the head.

    No conv's input is kept, as in the original; MobileNets' convs have no
    biases but their norms' shifts.

    Source: Cai et al., TinyTL, NeurIPS 2020, arXiv:2007.11622.
    """
    everything = len(backbone.blocks)
    plan = make_plan(backbone, method="shifts", blocks=everything, train_tail=True)
    return TransferModel(backbone, plan)


BASELINES: dict[str, Callable[[Backbone, int], TransferModel]] = {
    "full+checkpoint": _full_checkpointed,
    "blocks+checkpoint": _blocks_checkpointed,
    "blocks+frozen-norms": _frozen_norms,
    "bias-only": _bias_only,
}
CONTENDERS = (*METHODS, *BASELINES)


def contender(
    backbone: Backbone, method: str, blocks: int, stash: str = "recompute"
) -> TransferModel:
    """A backbone ready to train by a method of update plans or by a baseline.

    Args:
        method: one of `CONTENDERS`.
        blocks: top blocks; those methods that have no choice take no notice.
        stash: of `mobiletl`.

    Raises:
        ConfigError: for an unknown method.
        PlanError: for more blocks than there are.
    """
    if method in BASELINES:
        return BASELINES[method](backbone, blocks)
    if method not in METHODS:
        raise ConfigError(f"unknown method {method}; known: {', '.join(CONTENDERS)}")
    blocks = 0 if method in ("full", "head") else blocks
    return TransferModel(backbone, make_plan(backbone, method=method, blocks=blocks), stash)


def _run(segment: tuple[Step, ...], x: Tensor) -> Tensor:
    for step in segment:
        x = step.forward(x)
    return x


def _contexts(segment: tuple[Step, ...]) -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), _statistics_held(segment)


@contextmanager
def _statistics_held(segment: tuple[Step, ...]) -> Iterator[None]:
    """Running the segment again for backward must not count its batch twice."""
    modules = (part for step in segment if step.module for part in step.module.modules())
    norms = [part for part in modules if isinstance(part, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
