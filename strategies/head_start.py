"""Round 0 on the server: a head from the moments that the clients sent."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fleet.backbones import Backbone
from fleet.closed_form import Moments, decode_moments, solve, step_exponent, total
from fleet.errors import UpdateError
from fleet.state import TrainableState
from strategies.gate import MAX_EXAMPLES


@dataclass(frozen=True, eq=False)
class HeadStart:
    """What came of round 0.

    Attributes:
        weight: (C, D) float32.
        bias: (C,) float32.
        num_examples: client → images whose moments are in it.
        refused: client → why its moments are not.
    """

    weight: np.ndarray
    bias: np.ndarray
    num_examples: Mapping[str, int]
    refused: Mapping[str, str]

    def into(self, state: TrainableState, head: str) -> TrainableState:
        """The same state with this head in the place of its own.

        Args:
            state: of any plan; every plan trains the head.
            head: its name, that of the backbone's last step.

        Raises:
            UpdateError: if the state has no such head.
        """
        own = {f"{head}.weight": self.weight, f"{head}.bias": self.bias}
        return TrainableState(state.plan, {**state.tensors, **own})


@dataclass(frozen=True)
class HeadStarter:
    """What the server has to know of a backbone for a head start.

    Attributes:
        head: name of the classifier.
        features: D, its inputs.
        classes: C, its outputs.
        exponent: of the step to which clients round features.
    """

    head: str
    features: int
    classes: int
    exponent: int

    @classmethod
    def of(cls, backbone: Backbone) -> "HeadStarter":
        """For a backbone as it was pretrained."""
        return cls(
            backbone.steps[-1].name,
            backbone.head.in_features,
            backbone.head.out_features,
            step_exponent(backbone),
        )

    @property
    def most_bytes(self) -> int:
        """More than an honest reply takes: eight bytes for every sum that it could hold."""
        return 8 * (self.features * (self.features + 1) // 2 + self.classes * (self.features + 1))

    def solve(self, replies: Mapping[str, bytes]) -> HeadStart:
        """As `head_from`."""
        return head_from(
            replies, features=self.features, classes=self.classes, exponent=self.exponent
        )


def head_from(
    replies: Mapping[str, bytes],
    *,
    features: int,
    classes: int,
    exponent: int,
    ridge: float | None = None,
) -> HeadStart:
    """Admit each client's moments by themselves, add up what is admitted, and solve.

    Args:
        replies: client → what its `moments_task` returned, or anything else.
        features: D, inputs of the head.
        classes: C.
        exponent: of the step that the clients were given.
        ridge: strength; None: by generalised cross-validation.

    Raises:
        UpdateError: with every reason, if none is admitted.
    """
    together: Moments | None = None
    refused: dict[str, str] = {}
    num_examples: dict[str, int] = {}
    for name in sorted(replies):
        try:
            moments = decode_moments(
                replies[name],
                features=features,
                classes=classes,
                exponent=exponent,
                max_examples=MAX_EXAMPLES,
            )
        except UpdateError as error:
            refused[name] = str(error)
            continue
        num_examples[name] = moments.num_examples
        # As they come: a thousand Gram matrices at once would take gigabytes.
        together = moments if together is None else total([together, moments])
    if together is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise UpdateError(
            f"no client's moments were admitted ({reasons or 'there are no replies'})"
        )
    weight, bias = solve(together, ridge)
    return HeadStart(weight, bias, num_examples, refused)
