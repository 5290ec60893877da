"""A command that is sooner at its work."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def collecting_once_begun() -> Iterator[Callable[[], None]]:
    """Collect no garbage before the function that is given is called, or the block ends.

    Half a million objects come with what a run imports, and stay. Python would look through
    all of them every time that there are a quarter more: a fifth of a start. The engine
    leaves them out of later collections.
    """
    was_on = gc.isenabled()
    gc.disable()

    def begun() -> None:
        if was_on:
            gc.enable()

    try:
        yield begun
    finally:
        begun()
