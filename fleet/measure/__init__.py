"""What training costs: bytes kept for backward, peaks, FLOPs and seconds."""

from fleet.measure.memory import AllocatorPeak, SavedBytes, allocator_peak, saved_for_backward

__all__ = ["AllocatorPeak", "SavedBytes", "allocator_peak", "saved_for_backward"]
