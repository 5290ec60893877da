"""What a codec's name means: `float32`, `int8`, `topk:0.01+int4`, `int4+feedback`."""

import math
from dataclasses import dataclass
from functools import lru_cache

from fleet.errors import ConfigError

BASES = ("float32", "float16", "int8", "int4")
GRAMMAR = (
    f"{', '.join(BASES)}, topk:SHARE alone or before one of them (topk:0.01+int4); "
    f"+feedback behind any"
)


@dataclass(frozen=True)
class CodecName:
    """A codec's name, taken apart.

    Attributes:
        base: precision of the numbers that travel, one of `BASES`.
        share: of a state's weights, how many travel; 1: all.
        feedback: what was not sent is kept and added to the next update; so the
            rounding is to nearest. Without it rounding is stochastic, so unbiased.
    """

    base: str
    share: float
    feedback: bool

    @property
    def sparse(self) -> bool:
        """Whether only the largest numbers travel."""
        return self.share < 1


@lru_cache(maxsize=64)
def parse_codec(name: str) -> CodecName:
    """Take a codec's name apart.

    Raises:
        ConfigError: with the known ones.
    """
    parts = str(name).split("+")
    share, feedback = 1.0, False
    if len(parts) > 1 and parts[-1] == "feedback":
        parts.pop()
        feedback = True
    if parts[0].startswith("topk:"):
        share, feedback = _share(parts.pop(0), str(name)), True
        parts = parts or ["float32"]
    if len(parts) != 1 or parts[0] not in BASES:
        raise ConfigError(f"unknown codec {str(name)[:40]}; known: {GRAMMAR}")
    return CodecName(parts[0], share, feedback)


def _share(part: str, name: str) -> float:
    try:
        share = float(part.removeprefix("topk:"))
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise ConfigError(f"topk in codec {name[:40]} must keep a share above 0 and below 1")
    return share
