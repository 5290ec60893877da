"""A device that hangs, as on a file that never comes, is back for the next round."""

import faulthandler
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from clients.client import Client

# Beyond `round-timeout`: who gives up by itself then, as one that waits to cool down, says why.
GRACE_SECONDS = 20.0


@contextmanager
def ended_at_deadline(client: Client) -> Iterator[None]:
    """End the process if the block takes much longer than the server waits for any reply.

    The time is the run's `round-timeout` and `GRACE_SECONDS`, from when the message had come:
    nobody waits for what it would come to. Where it hung is said on standard error. A device
    has a process for each message; simulated clients share theirs, which is not ended.
    """
    if client.simulated:
        yield
        return
    seconds = min(seconds_waited_for(client) + GRACE_SECONDS, threading.TIMEOUT_MAX)
    # A thread of C's: it also ends a process that holds Python's lock, or waits in the kernel.
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def seconds_waited_for(client: Client) -> float:
    """How much longer the server waits for the reply to this message; not below 0."""
    waited = time.monotonic() - client.began
    return max(0.0, client.config.federation.round_timeout - waited)
