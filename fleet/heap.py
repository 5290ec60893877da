"""The C library's heap: what was given back to it, given back to the system too."""

import ctypes
import sys
from collections.abc import Mapping
from functools import cache

# Source: malloc.h of glibc, mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_KEEP_LITTLE = {_TRIM_THRESHOLD: 128 * 1024, _MMAP_THRESHOLD: 128 * 1024, _ARENA_MAX: 1}

# The largest that glibc takes for a threshold of what it maps; and no threshold that is reached.
_REUSE = {_MMAP_THRESHOLD: 32 * 2**20, _TRIM_THRESHOLD: 2**31 - 1}


def trim() -> None:
    """Return free heap pages to the system; does nothing without glibc.

    glibc keeps what a step released, in pieces that the next step may not fit
    into: between two steps that costs a device several MiB for nothing.
    """
    if (malloc_trim := _of_glibc("malloc_trim")) is not None:
        malloc_trim(0)


def keep_little() -> None:
    """Let this process return what it releases, from now on; does nothing without glibc.

    For processes that hold whole messages for a moment and then wait: glibc keeps a heap
    for each of the first threads, and, once a large block was released, puts others of
    its size into them. Each such block then takes the system's time anew.
    """
    _set(_KEEP_LITTLE)


def reuse() -> None:
    """Let this process take anew what it released, until it trims; does nothing without glibc.

    For training: a step makes and releases feature maps by the hundred. glibc would give
    many of them back to the system at once, which then hands out the next page by page:
    an eighth of a step's CPU time. And where blocks of all sizes come from one heap, the
    peak is lower too, as holes are filled.
    """
    _set(_REUSE)


def _set(parameters: Mapping[int, int]) -> None:
    if (mallopt := _of_glibc("mallopt")) is not None:
        for parameter, value in parameters.items():
            mallopt(parameter, value)


@cache
def _of_glibc(name: str) -> "ctypes._NamedFuncPointer | None":
    """A function that glibc alone has, or None."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return getattr(library, name, None) if hasattr(library, "gnu_get_libc_version") else None
