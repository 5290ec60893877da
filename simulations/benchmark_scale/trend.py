"""A straight line through what was seen, and how sure its slope is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Trend:
    """A least-squares line.

    Attributes:
        slope: of y, for each unit of x.
        standard_error: of the slope, if deviations from the line are independent.
    """

    slope: float
    standard_error: float


def trend(x: Sequence[float], y: Sequence[float]) -> Trend:
    """The line through points, three at least.

    Source: any textbook; s² = Σr²/(n − 2), SE = √(s²/Σ(x − x̄)²).
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(x) < 3:
        raise ValueError(f"a slope and its error need 3 points, got {len(x)}")
    from_mean = x - x.mean()
    spread = from_mean @ from_mean
    slope = from_mean @ y / spread
    rest = y - y.mean() - slope * from_mean
    return Trend(float(slope), float(np.sqrt(rest @ rest / (len(x) - 2) / spread)))
