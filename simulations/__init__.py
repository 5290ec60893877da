"""Simulated fleets on one machine.

from simulations import simulate

record = simulate({"rounds": 5, "blocks": "1,3,5", "run-dir": "runs/first"})
print(record.summary()["accuracy"])
"""

from simulations.launch import simulate

__all__ = ["simulate"]
