"""How much a process may do at once."""

import os


def available_cores() -> int:
    """Cores that this process may use: at least 1, and fewer than there are if it is confined."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
