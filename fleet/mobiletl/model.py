"""A backbone run the way an update plan trains it."""

from collections.abc import Sequence

import torch.nn as nn
from torch import Tensor

from fleet.backbones import Backbone
from fleet.mobiletl.blocks import parameters_of, part_forward
from fleet.mobiletl.frozen import frozen
from fleet.mobiletl.inverted_residual import fits, inverted_residual
from fleet.mobiletl.prefix import run_prefix
from fleet.mobiletl.stash import check_stash
from fleet.plan import UpdatePlan
from fleet.structure import InvertedResidual, Step, Unit, parts_of


class TransferModel(nn.Module):
    """The backbone's model, trained as the plan says.

    Training writes into the backbone's own parameters; the original model is
    never rebuilt, so its `state_dict` keeps its keys. In eval mode this *is*
    the original model. In training mode the steps below the first that trains
    run without autograd, those above with what the method needs:

    - `mobiletl`, `shifts`, `head`: operations that keep little for backward,
      for `mobiletl` as the stash says;
    - `blocks`: the original modules with stock autograd, norms in training mode;
    - `full`: the original model in training mode, dropout included.

    A parameter has one `requires_grad`: of several `TransferModel`s on one
    backbone, the one whose `train()` was called last is ready to train.
    """

    def __init__(self, backbone: Backbone, plan: UpdatePlan, stash: str = "recompute") -> None:
        super().__init__()
        self.model = backbone.model
        self.plan = plan
        self.stash = check_stash(stash if plan.method == "mobiletl" else "published")
        cut = first_trained_step(backbone.steps, plan)
        self._prefix, self._trained = backbone.steps[:cut], backbone.steps[cut:]
        self.train()
        *parts, self._head = parts_of(self._trained)
        top = _frozen_tail(parts) if self.stash != "published" else len(parts)
        self._parts, self._tail = tuple(parts[:top]), tuple(parts[top:])

    def train(self, mode: bool = True) -> "TransferModel":
        """Training mode readies what the plan trains and nothing else."""
        self.training = mode
        self.model.eval()
        if mode:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name in self.plan.by_name)
            for module in self._stock_modules():
                module.train()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, 3, S, S)."""
        if not self.training or self.plan.method == "full":
            return self.model(x)
        x = run_prefix(self._prefix, x)
        if self.plan.method == "blocks":
            for step in self._trained:
                x = step.forward(x)
            return x
        for part in self._parts:
            if self.stash != "published" and isinstance(part, InvertedResidual) and fits(part):
                x = inverted_residual(part, x, self.stash)
            else:
                x = part_forward(part, x)
        return self._head.forward(frozen(self._tail, x) if self._tail else x)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters of the plan, in the order of the model."""
        names = self.plan.by_name
        return [p for name, p in self.model.named_parameters() if name in names]

    def _stock_modules(self) -> list[nn.Module]:
        """What stock autograd trains, with its norms on the batch's statistics."""
        if self.plan.method == "full":
            return [self.model]
        if self.plan.method == "blocks":
            return [step.module for step in self._trained if trains(step, self.plan)]
        return [s.block.drop_path for s in self._trained if s.block and s.block.drop_path]


def _frozen_tail(parts: Sequence[InvertedResidual | Unit | Step]) -> int:
    """Index above which nothing trains."""
    top = len(parts)
    while top and not any(p.requires_grad for p in parameters_of(parts[top - 1])):
        top -= 1
    return top


def trains(step: Step, plan: UpdatePlan) -> bool:
    """Whether any tensor of a step is in the plan."""
    return any(name.startswith(f"{step.name}.") for name in plan.by_name)


def first_trained_step(steps: tuple[Step, ...], plan: UpdatePlan) -> int:
    """Index of the lowest step that trains: everything below it is frozen."""
    return next(i for i, step in enumerate(steps) if trains(step, plan))
