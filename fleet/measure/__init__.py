"""What training costs: bytes kept for backward, peaks, FLOPs and seconds."""

from fleet.measure.dry_run import StepCost, dry_run, weightless
from fleet.measure.flops import FlopCount, count_flops
from fleet.measure.memory import AllocatorPeak, SavedBytes, allocator_peak, saved_for_backward

__all__ = [
    "AllocatorPeak",
    "FlopCount",
    "SavedBytes",
    "StepCost",
    "allocator_peak",
    "count_flops",
    "dry_run",
    "saved_for_backward",
    "weightless",
]
