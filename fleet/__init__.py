"""Fine-tune mobile CNNs within a device's memory, alone or in a fleet.

`fleet.fit` trains one model; the modules below are its parts, and a fleet's.
"""

from typing import Any

__all__ = ["fit"]


def __getattr__(name: str) -> Any:
    """`fit` when it is asked for: the rest of the package does without PyTorch until then."""
    if name == "fit":
        from fleet.finetune import fit

        return fit
    raise AttributeError(f"module 'fleet' has no attribute {name!r}")
