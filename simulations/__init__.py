"""Simulated fleets on one machine.

from simulations import frame, simulate

record = simulate({"rounds": 5, "blocks": "1,3,5", "run-dir": "runs/first"})
print(record.summary()["accuracy"])
frame(record).plot(y="accuracy")  # or frame("runs/first")

comparison = compare("simulations/recipes/codecs.toml", "runs/codecs")
comparison.frame()
"""

from simulations.callbacks import Callback
from simulations.compare import compare
from simulations.frames import frame
from simulations.launch import simulate

__all__ = ["Callback", "compare", "frame", "simulate"]
