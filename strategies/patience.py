"""Time between rounds that no client counts in.

Devices that refuse answer at once: were each round followed by the next, a run would be over
within seconds, of a disk that is mounted late, a heat wave, or a wrong file on all devices.
"""

import time
from collections.abc import Callable
from logging import WARNING

from flwr.common.logger import log

from fleet.records import RoundReport

FIRST_SECONDS, MOST_SECONDS = 5.0, 300.0


class Patience:
    """Makes rounds without an update last: at least 5 s, then 10, 20 and so on up to 300.

    Args:
        rounds: of the run; after the last there is nothing to wait for.
        sleep: lets seconds pass.
    """

    def __init__(self, rounds: int, sleep: Callable[[float], None] = time.sleep) -> None:
        self._rounds = rounds
        self._sleep = sleep
        self._least = FIRST_SECONDS  # of the next such round

    def after(self, report: RoundReport) -> None:
        """Wait for what is left of a round's least time; a round with updates has none."""
        if report.clients or not report.server_round:
            self._least = FIRST_SECONDS
            return
        left = self._least - report.seconds
        self._least = min(2 * self._least, MOST_SECONDS)
        if left > 0 and report.server_round < self._rounds:
            log(
                WARNING,
                "no update of round %d counts; the next round begins in %.0f s",
                report.server_round,
                left,
            )
            self._sleep(left)
