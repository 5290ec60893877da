"""Stochastic gradient descent for small devices."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fleet.errors import UpdateError


class SGD:
    """SGD with momentum and weight decay: what `torch.optim.SGD` computes.

    With a proximal term it descends loss + proximal/2·‖parameter − target‖²: its
    direction is gradient + proximal·(parameter − target).

    The first step of any `torch.optim` optimiser imports `torch._dynamo`, some
    150 MB resident. This one imports nothing; but torchvision 0.29 imports it
    too, so that models read by way of it pay all the same.

    Args:
        parameters: float32, of any shape; those without a gradient are passed over.
        learning_rate: per step.
        momentum: 0 keeps no buffer.
        weight_decay: on tensors of two and more dimensions; norms and biases are spared.
        momentum_dtype: of the buffers between steps. bfloat16 halves them, and
            is rounded stochastically, from PyTorch's global generator: rounded
            to nearest, a buffer would lose all increments below 1/256 of it.
        proximal: weight of the proximal term; 0 has none, and keeps no targets.
        targets: beside each parameter, a tensor of its shape and device; None
            for one without a proximal term.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        learning_rate: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        momentum_dtype: torch.dtype = torch.float32,
        proximal: float = 0.0,
        targets: Sequence[Tensor | None] = (),
    ) -> None:
        self.parameters = list(parameters)
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.momentum_dtype = momentum_dtype
        self.proximal = proximal
        self._targets: dict[int, Tensor] = {}  # position → target
        if proximal:
            pairs = zip(self.parameters, targets, strict=True)
            self._targets = {i: t for i, (_, t) in enumerate(pairs) if t is not None}
        self._velocity: dict[int, Tensor] = {}  # position → buffer

    @property
    def nbytes(self) -> int:
        """Bytes of momentum buffers and targets."""
        held = (*self._velocity.values(), *self._targets.values())
        return sum(tensor.nbytes for tensor in held)

    def step(self) -> None:
        """Move every parameter against its gradient, and drop the gradient.

        Raises:
            UpdateError: for a gradient that is not finite; no parameter has moved.
        """
        moving = [i for i, parameter in enumerate(self.parameters) if parameter.grad is not None]
        for i in moving:
            self._check(i)
        for i in moving:
            self._move(i)

    @contextmanager
    def stepping_in_backward(self) -> Iterator[None]:
        """While this is open, backward moves each parameter as soon as its gradient is there.

        So no two blocks' gradients are there at once, and `step` has nothing
        left to do. Only for a loss whose backward pass is the step's only one.
        An `UpdateError` leaves those parameters moved whose gradients came
        before the one that is not finite.
        """

        def hook(i: int) -> None:
            self._check(i)
            self._move(i)

        handles = [
            parameter.register_post_accumulate_grad_hook(lambda _, i=i: hook(i))
            for i, parameter in enumerate(self.parameters)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check(self, i: int) -> None:
        # One value that is not finite leaves no sum finite; a sum needs no room.
        total = self.parameters[i].grad.sum()
        if not total.is_meta and not total.isfinite():
            raise UpdateError(
                f"a gradient of shape {tuple(self.parameters[i].shape)} is not finite"
            )

    @torch.no_grad()
    def _move(self, i: int) -> None:
        parameter = self.parameters[i]
        direction = parameter.grad
        decay = self.weight_decay if parameter.ndim > 1 else 0.0
        if i in self._targets:
            # The difference first: near the target, it is small beside the two.
            direction = parameter.sub(self._targets[i]).mul_(self.proximal).add_(direction)
            if decay:
                direction.add_(parameter, alpha=decay)
        elif decay:
            direction = direction.add(parameter, alpha=decay)
        if self.momentum:
            direction = self._gather(i, direction)
        parameter.add_(direction, alpha=-self.learning_rate)
        parameter.grad = None

    def _gather(self, i: int, direction: Tensor) -> Tensor:
        """The parameter's velocity with this step's direction in it."""
        if i not in self._velocity:
            self._velocity[i] = torch.zeros_like(direction, dtype=self.momentum_dtype)
        buffer = self._velocity[i]
        if buffer.dtype == torch.float32:
            return torch.add(direction, buffer, alpha=self.momentum, out=buffer)
        velocity = buffer.float().mul_(self.momentum).add_(direction)
        buffer.copy_(stochastic_bfloat16(velocity))
        return velocity


def stochastic_bfloat16(x: Tensor) -> Tensor:
    """Round to one of the two neighbours in bfloat16, so that the mean is x.

    Args:
        x: float32, any shape; NaN and ±inf stay what they are.

    Returns:
        bfloat16, the upper neighbour with a probability that rises linearly
        from 0 at the lower to 1 at the upper.
    """
    # A float32 is a bfloat16 and sixteen bits more: random ones are added, and carry or do not.
    bits = torch.randint_like(x, 1 << 16, dtype=torch.int32)
    bits.add_(x.view(torch.int32)).bitwise_and_(-1 << 16)
    return bits.view(torch.float32).masked_fill_(x.isnan(), torch.nan).to(torch.bfloat16)
