"""Commands that go on until SIGINT or SIGTERM, and then end in order."""

import signal
from collections.abc import Callable

from fleet.signals import ENDING


def until_signal(stop: Callable[[], None]) -> None:
    """Let the first signal stop the work; what the process does then is its own."""
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: stop())
