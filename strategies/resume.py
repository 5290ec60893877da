"""A run that goes on after its server was ended: what is kept of it after every round.

The checkpoint is the commit point. It is written first, with all that decides the
rounds to come and the round's report; model and rounds on record follow from
it, and are mended from it as the run is resumed. So a server that is killed at
any moment repeats one round at most.

A run may go on to more rounds than it was to have, and a run to round 4 that goes on to 6 is
bit for bit a run to 6: nothing of a round depends on how many there are to be. `schedule`
is that of one local training, and sampling, codecs and server optimisers count the rounds that
are done. An algorithm of one's own that reads `rounds` from its settings is another matter.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fleet.checkpoint import Checkpoints
from fleet.config import RunConfig, Value
from fleet.durable import waiting_for_room
from fleet.errors import CheckpointError, ConfigError
from fleet.records import RoundReport, RunRecord, parse_round, to_json
from fleet.signals import signals_held
from fleet.state import TrainableState
from fleet.tree import flatten
from strategies.fleet_strategy import FleetStrategy

# What a resumed run may be given otherwise: no round that is done would have been another.
# `clients` is of simulations, which compare it themselves; devices come and go.
MAY_CHANGE = {
    *("rounds", "resume", "run-dir", "clients", "min-clients", "round-timeout"),
    *("cache-dir", "cache-mib"),
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a run stands after a round.

    Attributes:
        server_round: that has ended.
        run: hexadecimal id under which clients remember the run.
        clients: of the fleet as the run began.
        classes: names of the head's outputs.
        cohort: clients that were asked in the round.
        plan_digest: of the widest plan.
        settings: in force as the run began.
        report: the round's, as a line of `rounds.jsonl`.
        strategy: snapshot of the `FleetStrategy`.
    """

    server_round: int
    run: str
    clients: int
    classes: tuple[str, ...]
    cohort: tuple[str, ...]
    plan_digest: str
    settings: dict[str, Value]
    report: str
    strategy: dict[str, Any]


def standing(config: RunConfig) -> Standing | None:
    """Where the run in `run-dir` stands; None for one that has to begin with round 0.

    Raises:
        CheckpointError: if there are rounds on record and no checkpoint that can be
            read, so that to begin anew would undo them; or if the checkpoint is another run's.
        ConfigError: for a setting that is not as it was when the run began, or fewer
            rounds than are done.
    """
    if not config.resume:
        return None
    record = RunRecord(Path(config.run_dir))
    found = Checkpoints(record.checkpoints_path).load()
    if found is None:
        if record.rounds_path.is_file() and any(True for _ in record.rounds()):
            raise CheckpointError(
                f"run {record.path} has rounds on record and no checkpoint, so it cannot go on; "
                f"begin it anew in another run-dir"
            )
        return None
    try:
        kept = Standing(**found[1])
    except TypeError as error:
        raise CheckpointError(
            f"the checkpoint of run {record.path} is another version's ({error}); resume it with "
            f"the version that began it"
        ) from error
    _check_settings(kept, config)
    _check_record(kept, record)
    return kept


class Keeper:
    """Keeps a run after every round: checkpoint, model, record, in this order.

    Args:
        record: the run's folder.
        save_model: writes `model.safetensors` of a state.
        facts: what of `Standing` stays the same from round to round.
        patience: seconds that a full disk is waited for; then the run ends, and can
            be resumed from the last round.
    """

    def __init__(
        self,
        record: RunRecord,
        save_model: Callable[[TrainableState], None],
        facts: Mapping[str, Any],
        patience: float = 120.0,
    ) -> None:
        self._record = record
        self._save_model = save_model
        self._facts = dict(facts)
        self._patience = patience
        self._checkpoints = Checkpoints(record.checkpoints_path)
        self._resumable = True

    def end_round(self, strategy: FleetStrategy, report: RoundReport) -> None:
        """Keep a round that has ended. A full disk is waited for.

        Raises:
            CheckpointError: if the checkpoint cannot be written; the last one is as it was.
            ConfigError: if model or record cannot be; resumed, the run mends them.
        """
        snapshot = self._snapshot(strategy, report)

        def keep() -> None:
            # A signal ends the run before all of it or after: the model is that of the
            # last round on record.
            with signals_held():
                if snapshot is not None:
                    self._checkpoints.save(report.server_round, snapshot)
                self._save_model(strategy.state)
                self._record.add_round(report)

        waiting_for_room(keep, self._patience)

    def mend(self, strategy: FleetStrategy, kept: Standing) -> None:
        """Make model and record those of the round that a resumed run goes on from.

        Raises:
            ConfigError: if they cannot be written.
        """
        self._save_model(strategy.state)
        self._record.end_with(kept.report)

    def finish(self) -> None:
        """After a run that has ended well, the checkpoint to fall back on goes."""
        self._checkpoints.drop_older()

    def _snapshot(self, strategy: FleetStrategy, report: RoundReport) -> dict[str, Any] | None:
        """What the checkpoint of a round holds; None if the strategy remembers what none can."""
        if not self._resumable:
            return None
        try:
            kept = Standing(
                server_round=report.server_round,
                cohort=report.asked,
                report=to_json(asdict(report)),
                strategy=strategy.snapshot(),
                **self._facts,
            )
            flatten(kept.strategy)
            return vars(kept)
        except CheckpointError as error:
            _log.warning("this run cannot be resumed, should it be ended: %s", error)
            self._resumable = False
            return None


def _check_record(kept: Standing, record: RunRecord) -> None:
    """Refuse a checkpoint whose round is on record, and was another: its rounds would be lost."""
    report = parse_round(kept.report)
    for there in record.rounds() if record.rounds_path.is_file() else ():
        if there.server_round < kept.server_round:
            continue
        if there.server_round == kept.server_round and there != report:
            raise CheckpointError(
                f"the checkpoint of run {record.path} is another run's: its round "
                f"{kept.server_round} took {report.seconds:g} s, and the one on record "
                f"{there.seconds:g} s; put this run's own {record.checkpoints_path.name} back, or "
                f"begin anew in another run-dir"
            )
        return  # what is behind it is cut off


def _check_settings(kept: Standing, config: RunConfig) -> None:
    now = config.as_settings()
    for key, before in kept.settings.items():
        if key not in MAY_CHANGE and now.get(key) != before:
            raise ConfigError(
                f"{key} is {now.get(key)}, and was {before} as the run in {config.run_dir} began; "
                f"leave it so, or begin anew in another run-dir"
            )
    if config.federation.rounds < kept.server_round:
        raise ConfigError(
            f"rounds is {config.federation.rounds}, and the run in {config.run_dir} has done "
            f"{kept.server_round}; raise it"
        )
