"""Fine-tune mobile CNNs within a device's memory, alone or in a fleet.

`fleet.fit` trains one model, `fleet.predict` and `fleet.export` use it; the
modules below are their parts, and a fleet's.
"""

from importlib import import_module
from typing import Any

_MODULES = {"fit": "fleet.finetune", "predict": "fleet.inference", "export": "fleet.formats"}

__all__ = ["export", "fit", "predict"]


def __getattr__(name: str) -> Any:
    """A function when it is asked for: the rest of the package does without PyTorch until then."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'fleet' has no attribute {name!r}")
