"""The C library's heap: what PyTorch gave back, given back to the system too."""

import ctypes
import sys
from functools import cache


def trim() -> None:
    """Return free heap pages to the system; does nothing without glibc.

    glibc keeps what a step released, in pieces that the next step may not fit
    into: between two steps that costs a device several MiB for nothing.
    """
    if (malloc_trim := _malloc_trim()) is not None:
        malloc_trim(0)


@cache
def _malloc_trim() -> "ctypes._NamedFuncPointer | None":
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
