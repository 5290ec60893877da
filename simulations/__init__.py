"""Simulated fleets on one machine."""
