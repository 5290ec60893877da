"""A backbone run the way an update plan trains it."""

import math
from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fleet.backbones import Backbone
from fleet.errors import PlanError, UpdateError
from fleet.mobiletl.blocks import parameters_of, part_forward
from fleet.mobiletl.frozen import Part, frozen_tail, run_frozen
from fleet.mobiletl.inverted_residual import fits, inverted_residual
from fleet.mobiletl.prefix import run_prefix
from fleet.mobiletl.stash import check_stash
from fleet.plan import UpdatePlan
from fleet.structure import InvertedResidual, Step, Unit, UnknownBlock, parts_of


class TransferModel(nn.Module):
    """The backbone's model, trained as the plan says.

    Training writes into the backbone's own parameters; the original model is
    never rebuilt, so its `state_dict` keeps its keys. It runs in two halves,
    between which the frozen half's output may be cached:

    - `features`: the steps below the first that trains, without autograd and
      norms folded into convs; the same in training and eval mode;
    - `from_features`: the others; in training mode with what the method needs:
      `mobiletl`, `shifts` and `head` with operations that keep little for
      backward, `mobiletl` as the stash says; `blocks` with stock autograd and
      norms in training mode, as `full` for the whole model, dropout included.
      Blocks whose structure is unknown `mobiletl` trains as `blocks` does.

    In eval mode `forward` *is* the original model. A parameter has one
    `requires_grad`: of several `TransferModel`s on one backbone, the one whose
    `train()` was called last is ready to train.

    Args:
        backbone: trains in place.
        plan: what trains.
        stash: what `mobiletl` keeps for backward.
        cut: step at which the halves meet, at most the first that trains; None:
            just there. A fleet's devices cut where the widest plan does, as the
            steps above change from round to round.

    Attributes:
        frozen_steps: what `features` runs, of which nothing trains.
        accumulates: `gradients` runs backward several times.

    Raises:
        PlanError: for a cut above the first step that trains.
    """

    accumulates = False

    def __init__(
        self,
        backbone: Backbone,
        plan: UpdatePlan,
        stash: str = "recompute",
        cut: int | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.model = backbone.model
        self.plan = plan
        self.stash = check_stash(stash if plan.method == "mobiletl" else "published")
        first = first_trained_step(backbone.steps, plan)
        self.cut = first if cut is None else cut
        if not 0 <= self.cut <= first:
            raise PlanError(
                f"features cannot be cut at step {cut}, as step {first} is the first that trains; "
                f"cut there or below"
            )
        self.frozen_steps = backbone.steps[: self.cut]
        self._trained = backbone.steps[first:]
        self._prefix = tuple(parts_of(self.frozen_steps))
        self._between = tuple(parts_of(backbone.steps[self.cut : first]))
        self.train()
        *parts, self._head = parts_of(self._trained)
        top = _frozen_tail(parts) if self.stash != "published" else len(parts)
        self._parts, self._tail = tuple(parts[:top]), tuple(parts[top:])
        self._shapes: dict[int, tuple[int, ...]] = {}  # image size → of one image's features

    def train(self, mode: bool = True) -> "TransferModel":
        """Training mode readies what the plan trains and nothing else."""
        self.training = mode
        self.model.eval()
        if mode:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name in self.plan.trained)
            for module in self._stock_modules():
                module.train()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, 3, S, S)."""
        if not self.training:
            return self.model(images)
        return self.from_features(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """Output (N, …) of the frozen half for images (N, 3, S, S); at cut 0 the images."""
        return run_prefix(self._prefix, images)

    def features_shape(self, image_size: int) -> tuple[int, ...]:
        """(C, H, W) or (C,) of one image's features; found by a run, once for each size."""
        if image_size not in self._shapes:
            device = next(self.parameters()).device
            probe = self.features(torch.zeros(1, 3, image_size, image_size, device=device))
            self._shapes[image_size] = tuple(probe.shape[1:])
        return self._shapes[image_size]

    def from_features(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of what `features` returned."""
        if not self.training:
            return self._eval_from_features(x)
        if self.plan.method == "full":
            return self.model(x)
        x = run_prefix(self._between, x)
        if self.plan.method == "blocks":
            for step in self._trained:
                x = step.forward(x)
            return x
        for part in self._parts:
            if self.stash != "published" and isinstance(part, InvertedResidual) and fits(part):
                x = inverted_residual(part, x, self.stash)
            else:
                x = part_forward(part, x, exact=self.stash != "published")
        return self._head.forward(frozen_tail(self._tail, x) if self._tail else x)

    def gradients(self, x: Tensor, labels: Tensor) -> float:
        """Mean cross-entropy of a batch in nats; its gradients go into the parameters' own.

        Args:
            x: (N, …) as `features` returns.
            labels: (N,) int64.

        Raises:
            UpdateError: if the loss is not finite, before there is any gradient.
        """
        loss = F.cross_entropy(self.from_features(x), labels)
        value = finite(loss)
        loss.backward()
        return value

    @property
    def freezes_blocks(self) -> bool:
        """Whether `features` are worth keeping: the stem's output is larger than an image."""
        return any(step.block is not None for step in self.frozen_steps)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters of the plan, in the order of the model."""
        return list(self.trainable_by_name().values())

    def trainable_by_name(self) -> dict[str, nn.Parameter]:
        """Name → parameter, of the plan, in the order of the model."""
        trained = self.plan.trained
        return {name: p for name, p in self.model.named_parameters() if name in trained}

    @cached_property
    def _above_cut(self) -> tuple[Part, ...]:
        return tuple(parts_of(self.backbone.steps[self.cut :]))

    def _eval_from_features(self, x: Tensor) -> Tensor:
        return run_frozen(self._above_cut, x.clone())  # it works in place

    def _stock_modules(self) -> list[nn.Module]:
        """What stock autograd trains, with its norms on the batch's statistics."""
        if self.plan.method == "full":
            return [self.model]
        if self.plan.method == "blocks":
            return [step.module for step in self._trained if trains(step, self.plan)]
        stock = []
        for step in self._trained:
            if isinstance(step.block, InvertedResidual) and step.block.drop_path is not None:
                stock.append(step.block.drop_path)
            elif isinstance(step.block, UnknownBlock) and self.plan.method == "mobiletl":
                stock.append(step.module)
        return stock


def finite(loss: Tensor) -> float:
    """The value of a loss.

    Raises:
        UpdateError: if it is NaN or infinite.
    """
    if not math.isfinite(loss.item()):
        raise UpdateError(f"loss is {loss.item()}")
    return loss.item()


def _frozen_tail(parts: Sequence[InvertedResidual | Unit | Step]) -> int:
    """Index above which nothing trains."""
    top = len(parts)
    while top and not any(p.requires_grad for p in parameters_of(parts[top - 1])):
        top -= 1
    return top


def trains(step: Step, plan: UpdatePlan) -> bool:
    """Whether any tensor of a step is in the plan."""
    return any(name.startswith(f"{step.name}.") for name in plan.trained)


def first_trained_step(steps: tuple[Step, ...], plan: UpdatePlan) -> int:
    """Index of the lowest step that trains: everything below it is frozen."""
    return next(i for i, step in enumerate(steps) if trains(step, plan))
