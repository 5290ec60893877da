"""Stochastic gradient descent for small devices."""

from collections.abc import Iterable

import torch
from torch import Tensor


class SGD:
    """SGD with momentum and weight decay: what `torch.optim.SGD` computes.

    The first step of any `torch.optim` optimiser imports `torch._dynamo`, which
    stays resident with some 150 MB; a device that trains in 40 cannot pay that.

    Args:
        parameters: of any shape; those without a gradient are passed over.
        learning_rate: per step.
        momentum: 0 keeps no buffer.
        weight_decay: on tensors of two and more dimensions; norms and biases are spared.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        learning_rate: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        self.parameters = list(parameters)
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.weight_decay = weight_decay
        self._velocity: dict[int, Tensor] = {}  # position → buffer

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter against its gradient, and drop the gradient."""
        for i, parameter in enumerate(self.parameters):
            direction = parameter.grad
            if direction is None:
                continue
            if self.weight_decay and parameter.ndim > 1:
                direction = direction.add(parameter, alpha=self.weight_decay)
            if self.momentum:
                if i not in self._velocity:
                    self._velocity[i] = torch.zeros_like(parameter)
                direction = self._velocity[i].mul_(self.momentum).add_(direction)
            parameter.add_(direction, alpha=-self.learning_rate)
            parameter.grad = None
