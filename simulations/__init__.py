"""Simulated fleets on one machine.

from simulations import frame, simulate

record = simulate({"rounds": 5, "blocks": "1,3,5", "run-dir": "runs/first"})
print(record.summary()["accuracy"])
frame(record).plot(y="accuracy")
"""

from fleet.report.frame import frame
from simulations.callbacks import Callback
from simulations.launch import simulate

__all__ = ["Callback", "frame", "simulate"]
