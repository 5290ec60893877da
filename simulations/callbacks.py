"""What follows a run from outside: a protocol of five methods."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fleet.config import Value
from fleet.errors import ConfigError
from fleet.records import RoundReport, RunRecord


class Callback:
    """Follows a run; a subclass overrides what it wants to hear of.

    The run goes on whatever these raise: the first exception is told in a
    warning, and from then on the callback hears of the end alone. All are
    called in the run's own thread and should return soon.
    """

    def on_run_start(self, record: RunRecord, settings: Mapping[str, Value]) -> None:
        """A run begins; all of its settings are known, and nothing has been written yet."""

    def on_reply(self, answered: int, asked: int) -> None:
        """So many of the clients that were asked have answered (engine `local` only)."""

    def on_round_end(self, report: RoundReport) -> None:
        """A round is on record; round 0 is the model before any training."""

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        """The run has ended well, with this `summary.json`."""

    def on_run_error(self, error: BaseException) -> None:
        """The run has failed, or was interrupted: then the error is a KeyboardInterrupt."""


_EVENTS = tuple(name for name in vars(Callback) if name.startswith("on_"))


class Callbacks(Callback):
    """Tells several callbacks what happens, none of which can end the run.

    Raises:
        ConfigError: for what is no callback.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        if not isinstance(callbacks, Iterable):
            raise ConfigError(
                f"callbacks must be a list of simulations.Callback, got {callbacks!r:.80}; put "
                f"a single one into a list too"
            )
        self._callbacks = list(callbacks)
        for each in self._callbacks:
            if lacking := [name for name in _EVENTS if not callable(getattr(each, name, None))]:
                raise ConfigError(
                    f"callback {each!r:.80} has no {', '.join(lacking)}; let its class inherit "
                    f"from simulations.Callback, which has all"
                )
        self._failed: set[int] = set()  # by place: a callback need not be hashable

    def on_run_start(self, record: RunRecord, settings: Mapping[str, Value]) -> None:
        """Pass it on."""
        self._tell("on_run_start", record, settings)

    def on_reply(self, answered: int, asked: int) -> None:
        """Pass it on."""
        self._tell("on_reply", answered, asked)

    def on_round_end(self, report: RoundReport) -> None:
        """Pass it on."""
        self._tell("on_round_end", report)

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        """Pass it on, to those that failed too: they may have something open."""
        self._tell("on_run_end", summary, last=True)

    def on_run_error(self, error: BaseException) -> None:
        """Pass it on, to those that failed too: they may have something open."""
        self._tell("on_run_error", error, last=True)

    def _tell(self, event: str, *arguments: Any, last: bool = False) -> None:
        for place, callback in enumerate(self._callbacks):
            if place in self._failed and not last:
                continue
            try:
                getattr(callback, event)(*arguments)
            except Exception as error:  # whatever a tracker's server, disk or network does
                if place not in self._failed:
                    self._failed.add(place)
                    warnings.warn(
                        f"callback {type(callback).__name__} failed in {event} "
                        f"({type(error).__name__}: {error}); the run goes on without it",
                        RuntimeWarning,
                        stacklevel=2,
                    )
