"""Whether a device can take part, before and after the project is installed on it.

Everything here needs the standard library alone, and any Python from 3.9 on: `python3 -m
clients.doctor` runs from a checkout, or from the wheel as one file on PYTHONPATH. PyTorch is
imported in a process of its own, which may crash.
"""

from clients.doctor.checkup import CHECKS, Subject, diagnose
from clients.doctor.findings import OK, PROBLEM, STATES, UNKNOWN, WARNING, Finding, report

__all__ = [
    "CHECKS",
    "OK",
    "PROBLEM",
    "STATES",
    "UNKNOWN",
    "WARNING",
    "Finding",
    "Subject",
    "diagnose",
    "report",
]
