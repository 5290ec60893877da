"""Time between rounds that no client counts in.

Devices that refuse answer at once: were each round followed by the next, a run would be over
within seconds, of a disk that is mounted late, a heat wave, or a wrong file on all devices.
"""

import time
from collections.abc import Callable, Sequence
from logging import WARNING

from flwr.common.logger import log

from fleet.records import RoundReport
from fleet.report.history import last_line

FIRST_SECONDS, MOST_SECONDS = 5.0, 300.0
_MOST_REASONS = 3


class Patience:
    """Makes rounds without an update last: at least 5 s, then 10, 20 and so on up to 300.

    Args:
        rounds: of the run; after the last there is nothing to wait for.
        sleep: lets seconds pass.
        tell: is given why it waits, in lines; none as the wait is over.
    """

    def __init__(
        self,
        rounds: int,
        sleep: Callable[[float], None] = time.sleep,
        tell: Callable[[Sequence[str]], None] = lambda lines: None,
    ) -> None:
        self._rounds = rounds
        self._sleep = sleep
        self._tell = tell
        self._least = FIRST_SECONDS  # of the next such round

    def after(self, report: RoundReport) -> None:
        """Wait for what is left of a round's least time; a round with updates has none."""
        if report.clients or not report.server_round:
            self._least = FIRST_SECONDS
            return
        left = self._least - report.seconds
        self._least = min(2 * self._least, MOST_SECONDS)
        if left > 0 and report.server_round < self._rounds:
            why = f"waiting {left:.0f} s, because {_no_update(report)}"
            log(WARNING, "%s", why)
            self._tell((why,))
            self._sleep(left)
            self._tell(())


def _no_update(report: RoundReport) -> str:
    """Why a round has no update, by its clients' reasons."""
    what = f"no update of round {report.server_round} counts"
    reasons = [
        f"{client}: {last_line(reason)}"
        for client, reason in list(report.refused.items())[:_MOST_REASONS]
    ]
    if more := len(report.refused) - len(reasons):
        reasons.append(f"and {more} more")
    return f"{what} ({'; '.join(reasons)})" if reasons else what
