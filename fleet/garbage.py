"""Python's collector of garbage, kept from looking for it where there is none."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """While modules are imported, do not look for garbage.

    A large library makes a few hundred thousand objects as it is imported, which
    all stay; collections that look through them, and through all that was there
    before, again and again take a fifth of its time.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
