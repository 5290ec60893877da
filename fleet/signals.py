"""Signals that would end the process wait while files are written that belong together."""

import contextlib
import signal
import threading
from collections.abc import Iterator

# Ctrl-C, a service that is stopped, a terminal that is closed (which Windows does not have).
ENDING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Let what comes of `ENDING` meanwhile do its work afterwards.

    Python hands signals to its main thread alone; in any other nothing is held.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in ENDING}
    # None: a handler that is not Python's, and that Python could not put back.
    before = {number: handler for number, handler in before.items() if handler is not None}
    for number in before:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)
