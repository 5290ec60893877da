"""Sees to it that a run that is wanted gets to its end, whatever happens to Flower.

Flower marks a run failed if its SuperLink was away for long, or the process of its
ServerApp has died. Such a run is submitted again and goes on from its checkpoint.
One that fails by its own fault would fail for ever: it is given up once it has
been lost three times in a row without a new round on record, and at once if its
ServerApp says that settings, data or weights keep it from beginning. For want of devices, or
of room on the disk, it is never given up: it waits until there is enough.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from fleet.deploy.control import ONLINE, ControlError, FlowerRun, Node
from fleet.deploy.room import want_of_room
from fleet.deploy.wishes import (
    FAILED,
    FINISHED,
    RUNNING,
    STOPPED,
    WAITING,
    Standing,
    Wish,
    Wishes,
)
from fleet.errors import CANNOT_BEGIN, TOO_FEW, ConfigError, FleetError
from fleet.records import RunRecord

MOST_FRUITLESS = 3
ASK_SECONDS = 3.0  # between two questions to Flower about a run that goes on
PAUSE_SECONDS = 5.0  # before it is submitted again, twice as long each time

_log = logging.getLogger(__name__)


class Runs(Protocol):
    """What of `Control` is needed for it."""

    def start_run(
        self, app: bytes, settings: Mapping[str, Any], signatures: Mapping[str, str]
    ) -> int: ...

    def run(self, run_id: int) -> FlowerRun | None: ...

    def unfinished(self, run_dir: str) -> int | None: ...

    def stop_run(self, run_id: int) -> None: ...

    def nodes(self) -> list[Node]: ...


class RunKeeper:
    """Brings every wish one step further, each time that it is asked to.

    Args:
        wishes: of the server.
        clock: seconds that pass.
    """

    def __init__(self, wishes: Wishes, clock: Callable[[], float] = time.monotonic) -> None:
        self._wishes = wishes
        self._clock = clock
        self._not_before: dict[str, float] = {}
        self._unreadable: set[str] = set()

    def attend(self, control: Runs) -> None:
        """Look after every wish.

        Raises:
            ControlError: if the SuperLink cannot be reached.
        """
        for name in self._wishes.names():
            try:
                wish, standing = self._wishes.read(name), self._wishes.standing(name)
                after = self._step(name, wish, standing, control)
                if after != standing:
                    self._wishes.write_standing(name, after)
                    _tell(name, after, standing)
                self._unreadable.discard(name)
            except ControlError:
                raise
            except FleetError as error:  # one wish that cannot be read, or a disk that is full
                if name not in self._unreadable:
                    _log.error("run %s is left as it is: %s", name, error)
                self._unreadable.add(name)

    def _step(self, name: str, wish: Wish, standing: Standing, control: Runs) -> Standing:
        if standing.attempt != wish.attempt:
            standing = _asked_to_go_on(standing, wish)
        if standing.over:
            return standing
        if not wish.wanted:
            return _stopped(standing, control)
        if standing.status == WAITING:
            if self._clock() < self._not_before.get(name, 0.0):
                return standing
            missing = _missing(wish, control)
            if missing:
                return replace(standing, reason=missing)
            return self._submit(name, wish, standing, control)
        ended_well = Path(wish.run_dir, "summary.json").is_file()
        if not ended_well and self._clock() < self._not_before.get(name, 0.0):
            return standing
        self._not_before[name] = self._clock() + ASK_SECONDS
        run = control.run(standing.flower_run)
        if run is not None and run.status != "finished":
            return standing
        more = ended_well and _to_have_more(wish)
        if ended_well and not more:
            return replace(standing, status=FINISHED, reason="")
        if more and run is not None and run.outcome == "completed":
            reason = f"it goes on to round {wish.settings['rounds']}"
            return replace(standing, status=WAITING, reason=reason)
        if run is not None and run.outcome == "stopped":
            return replace(standing, status=STOPPED, reason="it was stopped through Flower")
        if fault := _cannot_begin(run, wish):
            return replace(standing, status=FAILED, reason=fault)
        return self._lost(name, wish, standing, _why(run), _missing(wish, control))

    def _submit(self, name: str, wish: Wish, standing: Standing, control: Runs) -> Standing:
        # A server that was killed just after it had submitted finds the run in Flower's list.
        run_id = control.unfinished(wish.run_dir)
        if run_id is None:
            settings = dict(wish.settings) | {"run-dir": wish.run_dir}
            # A folder that holds a run is this one's, whose standing somebody has removed.
            if standing.submissions or Path(wish.run_dir, "config.toml").is_file():
                settings["resume"] = True
            try:
                run_id = control.start_run(self._wishes.app(name), settings, wish.signatures)
            except ControlError as error:
                if not error.refused:
                    raise
                return replace(standing, status=FAILED, reason=str(error))
        return replace(
            standing,
            status=RUNNING,
            flower_run=run_id,
            submissions=standing.submissions + 1,
            rounds=_rounds(wish),
            reason="",
        )

    def _lost(
        self, name: str, wish: Wish, standing: Standing, reason: str, missing: str
    ) -> Standing:
        # It may have waited for devices that are there again by now.
        waited = bool(missing) or TOO_FEW in reason
        fruitless = 0 if _rounds(wish) > standing.rounds else standing.fruitless + (not waited)
        if fruitless >= MOST_FRUITLESS:
            return replace(
                standing,
                status=FAILED,
                fruitless=fruitless,
                reason=f"given up: it was lost {fruitless} times in a row without a new round; "
                f"the last time: {reason}",
            )
        self._not_before[name] = self._clock() + PAUSE_SECONDS * 2**fruitless
        reason = f"it was lost ({reason}) and goes on from its checkpoint"
        return replace(standing, status=WAITING, fruitless=fruitless, reason=reason)


def _asked_to_go_on(standing: Standing, wish: Wish) -> Standing:
    """One that goes on as it is needs nothing; it may be to have more rounds after its end."""
    goes_on = standing.status == RUNNING
    return replace(
        standing,
        status=RUNNING if goes_on else WAITING,
        attempt=wish.attempt,
        fruitless=0,
        reason=standing.reason if goes_on else "asked to go on",
    )


def _stopped(standing: Standing, control: Runs) -> Standing:
    if standing.status == RUNNING:
        run = control.run(standing.flower_run)
        if run is not None and run.status != "finished":
            control.stop_run(standing.flower_run)
    return replace(standing, status=STOPPED, reason="it was asked to stop")


def _missing(wish: Wish, control: Runs) -> str:
    """What there is to wait for, in words; empty if the disk has room and enough are online."""
    if lacking := want_of_room(Path(wish.run_dir)):
        return f"it waits for room: {lacking}"
    online = sum(node.status == ONLINE for node in control.nodes())
    wanted = int(wish.settings["min-clients"])
    if online >= wanted:
        return ""
    return f"it waits for devices: {online} online, min-clients is {wanted}"


def _why(run: FlowerRun | None) -> str:
    if run is None:
        return "Flower does not know it any more"
    if run.outcome == "completed":
        return "Flower says that it is complete, and it has no summary"
    return run.details.strip() or f"Flower says that it has {run.outcome}"


def _cannot_begin(run: FlowerRun | None, wish: Wish) -> str:
    """What keeps a run from beginning, in the words of its ServerApp; empty: nothing known.

    One that has begun was able to: its data are away for a while, on a disk that is
    mounted late, for one. It is tried again.
    """
    if run is None or run.outcome != "failed" or _rounds(wish):
        return ""
    _, mark, why = run.details.partition(CANNOT_BEGIN)
    return f"{mark}{why}".strip()


def _rounds(wish: Wish) -> int:
    try:
        return sum(1 for _ in RunRecord(Path(wish.run_dir)).rounds())
    except ConfigError:  # nothing is on record yet
        return 0


def _to_have_more(wish: Wish) -> bool:
    """Whether rounds were asked for after the run was submitted with fewer."""
    try:
        return RunRecord(Path(wish.run_dir)).last_round < int(wish.settings["rounds"])
    except ConfigError:  # what cannot be read has no end to go on from
        return False


def _tell(name: str, now: Standing, before: Standing) -> None:
    if now.status == RUNNING and now.submissions == before.submissions:
        _log.info("run %s goes on, as it was asked to", name)
    elif now.status == RUNNING:
        _log.info(
            "run %s is submitted (Flower's run %d, submission %d)",
            name,
            now.flower_run,
            now.submissions,
        )
    elif now.status == WAITING:
        _log.warning("run %s: %s", name, now.reason)
    elif now.status == FAILED:
        _log.error("run %s has failed: %s", name, now.reason)
    else:
        _log.info("run %s has %s", name, now.status)
