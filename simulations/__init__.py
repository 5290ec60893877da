"""Simulated fleets on one machine.

from simulations import frame, simulate

record = simulate({"rounds": 5, "blocks": "1,3,5", "run-dir": "runs/first"})
print(record.summary()["accuracy"])
frame(record).plot(y="accuracy")

comparison = compare("simulations/recipes/codecs.toml", "runs/codecs")
comparison.frame()
"""

# Read as they are asked for: a run of Flower's own apps (`simulations.local_engine`) needs none.
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fleet.report.frame import frame
    from simulations.callbacks import Callback
    from simulations.comparing import compare
    from simulations.launch import simulate

__all__ = ["Callback", "compare", "frame", "simulate"]

_WHERE = {
    "Callback": "simulations.callbacks",
    "compare": "simulations.comparing",
    "frame": "fleet.report.frame",
    "simulate": "simulations.launch",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
