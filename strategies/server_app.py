"""The ServerApp: reads the configuration and wires the parts."""

import contextlib
import math
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from logging import ERROR, INFO, WARNING
from pathlib import Path

from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from fleet.backbones import Backbone, backbone_of
from fleet.config import RunConfig, read_config
from fleet.data import ImageData, load_data
from fleet.errors import CANNOT_BEGIN, ConfigError, FleetError, PlanError, UpdateError
from fleet.evaluation import Evaluation, evaluate
from fleet.mobiletl import TransferModel
from fleet.plan import UpdatePlan, make_plan
from fleet.records import RoundReport, RunRecord, summarise
from fleet.remarks import Remarks
from fleet.report import write_page
from fleet.state import TrainableState, capture, load
from fleet.train import pick_device
from fleet.trained import facts_of
from strategies.algorithm import Algorithm, algorithm
from strategies.fleet_strategy import FleetStrategy
from strategies.head_start import HeadStarter
from strategies.patience import Patience
from strategies.prompt_grid import PromptGrid, prompt
from strategies.resume import Keeper, Standing, standing
from strategies.run_log import logged_beside
from strategies.sampling import Roster

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds and save what they came to."""
    try:
        with _cannot_begin():
            config = read_config(context.run_config)
        grid = prompt(grid)
        with _followed(grid, config) as remarks:
            run(grid, config, remarks)
    except FleetError as error:
        log(ERROR, "%s", error)
        raise


@contextlib.contextmanager
def _followed(grid: Grid, config: RunConfig) -> Iterator[Remarks]:
    """Log and remarks of a run with devices, in its folder; a simulation's are its terminal's."""
    if not isinstance(grid, PromptGrid) or not config.run_dir:
        yield Remarks(None)
        return
    folder = Path(config.run_dir)
    remarks = Remarks(folder)
    with logged_beside(folder), remarks.while_it_runs():
        yield remarks


def run(grid: Grid, config: RunConfig, remarks: Remarks) -> None:
    """One run over a grid of clients, or with `resume` what is left of one.

    Args:
        remarks: what there is to say of it as it goes on.

    Raises:
        FleetError: for a setting, data or weights that the user can mend.
    """
    with contextlib.ExitStack() as while_it_runs:
        kept = _standing(config, while_it_runs)
        federation = config.federation
        # What is wrong is told before anybody is waited for.
        with _cannot_begin():
            _check_plans(algorithm(federation, config.seed), config)
            if isinstance(grid, PromptGrid):
                _check_paths(config)
            test = _held_out(config) if federation.evaluation == "server" else None
        roster = Roster(
            grid, timeout=federation.round_timeout, tell=partial(remarks.say, "devices")
        )
        online = roster.wait_for({*kept.cohort} if kept else set(), federation.min_clients)
        classes = kept.classes if kept else test.classes if test else roster.classes()
        with _cannot_begin():
            model = _GlobalModel.of(config, classes)
        if kept and kept.plan_digest != model.plan.digest:
            raise ConfigError(
                f"the plan is {model.plan.digest[:8]}, and was {kept.plan_digest[:8]} as the run "
                f"in {config.run_dir} began; give it the weights and libraries that it had then"
            )
        clients = kept.clients if kept else len(online)
        record = _record(config, clients, while_it_runs)
        log(INFO, "records go to %s", record.path)
        patience = None
        if isinstance(grid, PromptGrid):
            patience = Patience(federation.rounds, tell=partial(remarks.say, "pause"))
        strategy, keeper = _strategy(roster, config, kept, model, record, clients, test, patience)
        strategy.run(grid)
        keeper.finish()
        _conclude(record, config, model.plan)


@contextlib.contextmanager
def _cannot_begin() -> Iterator[None]:
    """Mark what the user has to mend; that too few clients came is nothing of the kind."""
    try:
        yield
    except (ConfigError, PlanError) as error:
        raise type(error)(f"{CANNOT_BEGIN}{error}") from error


def _strategy(
    roster: Roster,
    config: RunConfig,
    kept: Standing | None,
    model: "_GlobalModel",
    record: RunRecord,
    clients: int,
    test: ImageData | None,
    patience: Patience | None,
) -> tuple[FleetStrategy, Keeper]:
    """The strategy as it begins, or goes on, and what keeps its rounds.

    Args:
        clients: of the fleet as the run began.
        test: held-out images; None leaves evaluation to the clients.
        patience: with devices; simulated clients would not change their minds.
    """
    federation = config.federation
    facts = {
        "run": kept.run if kept else secrets.token_hex(8),
        "clients": clients,
        "classes": model.classes,
        "plan_digest": model.plan.digest,
        "settings": kept.settings if kept else config.as_settings(),
    }
    keeper = Keeper(record, lambda state: model.save(state, record), facts)

    def end_round(report: RoundReport) -> None:
        _check_loss(report, federation.server_learning_rate)
        keeper.end_round(strategy, report)
        if patience is not None:
            patience.after(report)

    strategy = FleetStrategy(
        capture(model.backbone.model, model.plan),
        model.classes,
        roster,
        federation,
        config.seed,
        algorithm(federation, config.seed, clients=clients),
        evaluate=(lambda state: model.evaluate(state, test, config)) if test else None,
        on_round=end_round,
        run=facts["run"],
        head_start=HeadStarter.of(model.backbone) if federation.head_start else None,
    )
    if kept:
        strategy.restore(kept.strategy, kept.server_round)
        keeper.mend(strategy, kept)
        log(INFO, "the run goes on after round %d", kept.server_round)
    return strategy, keeper


def _standing(config: RunConfig, while_it_runs: contextlib.ExitStack) -> Standing | None:
    """Where the run to resume stands; its folder is held from before that is read."""
    if not config.resume:
        return None
    record = RunRecord(Path(config.run_dir))
    while_it_runs.enter_context(record.held())
    kept = standing(config)
    if kept is None:
        log(INFO, "run %s has no checkpoint yet; it begins anew there", record.path)
    return kept


def _record(config: RunConfig, clients: int, while_it_runs: contextlib.ExitStack) -> RunRecord:
    """The run's folder, held until the run ends."""
    settings = config.as_settings() | {"clients": clients}
    if config.resume:  # and held by now
        return RunRecord.reopen(config.run_dir, settings)
    record = RunRecord.create(config.run_dir, settings)
    while_it_runs.enter_context(record.held())
    return record


@dataclass(frozen=True)
class _GlobalModel:
    """The backbone into which a state is loaded to be evaluated or saved.

    Attributes:
        plan: the widest.
        transfer: what evaluates it.
        classes: names of the head's outputs.
    """

    backbone: Backbone
    plan: UpdatePlan
    transfer: TransferModel
    classes: tuple[str, ...]

    @classmethod
    def of(cls, config: RunConfig, classes: tuple[str, ...]) -> "_GlobalModel":
        backbone = backbone_of(config.model, classes, config.seed)
        backbone.model.to(pick_device(config.local.device))
        plan = make_plan(
            backbone,
            method=config.plan.method,
            blocks=max(config.plan.choices),
            train_tail=config.plan.train_tail,
            local_norms=config.plan.local_norms,
        )
        return cls(backbone, plan, TransferModel(backbone, plan), classes)

    def evaluate(self, state: TrainableState, test: ImageData, config: RunConfig) -> Evaluation:
        load(self.backbone.model, state)
        return evaluate(self.transfer, test, self.backbone.preprocessing, features=config.features)

    def save(self, state: TrainableState, record: RunRecord) -> None:
        load(self.backbone.model, state)
        own = self.backbone
        facts = facts_of(own.name, own.model, self.classes, own.preprocessing)
        record.save_model(own.model.state_dict(), facts)


def _check_loss(report: RoundReport, server_learning_rate: float) -> None:
    if report.loss is not None and not math.isfinite(report.loss):
        raise UpdateError(
            f"the global model's loss is {report.loss} after round {report.server_round} with "
            f"server-learning-rate {server_learning_rate}; lower it or learning-rate"
        )


def _conclude(record: RunRecord, config: RunConfig, plan: UpdatePlan) -> None:
    """Sum up a run whose rounds are done."""
    _check_trained(record.rounds())
    record.write_summary(
        summarise(record.rounds())
        | {
            "strategy": config.federation.strategy,
            "seed": config.seed,
            "plan_digest": plan.digest,
        }
    )
    try:
        write_page(record)
    except ConfigError as error:  # the run itself has succeeded
        log(WARNING, "%s", error)
    log(INFO, "model saved to %s", record.model_path)


def _check_plans(chosen: Algorithm, config: RunConfig) -> None:
    """A strategy that needs equal plans gets no settings that deal out others."""
    if not chosen.equal_plans:
        return
    for key, value, equal in (
        ("blocks", config.plan.blocks, len(set(config.plan.choices)) == 1),
        ("budget-mib", config.budget.mib, set(config.budget.choices) == {"off"}),
    ):
        if not equal:
            raise ConfigError(
                f"{key} is {value}, which gives clients unequal plans, and strategy "
                f"{config.federation.strategy} needs equal ones; set blocks to one value and "
                f"budget-mib to off"
            )


def _check_paths(config: RunConfig) -> None:
    """Refuse a path that `fleet run` has found, and this process does not see."""
    named = {"weights": config.model.weights}
    if config.federation.evaluation == "server":
        named["data"] = config.data.source
    for key, value in named.items():
        if Path(value).is_absolute() and not Path(value).exists():
            raise ConfigError(
                f"{key} {value} is not there for the server's process. A service sees nothing of "
                f"homes and /tmp but what it was installed with: fleet service install server "
                f"--readable {value}, then restart it; else name a path on the server's machine"
            )


def _check_trained(reports: Iterable[RoundReport]) -> None:
    """A run whose model never moved has not succeeded, whatever it wrote."""
    rounds, admitted, reasons = 0, False, Counter()
    for report in reports:
        if report.stepped and report.server_round > 0:
            return
        if report.server_round > 0:
            rounds += 1
            admitted |= bool(report.clients)
            reasons.update(report.refused.values())
    what = "the model did not move" if admitted else "no client's update was admitted"
    (reason, count), *_ = reasons.most_common(1) or [
        ("fewer updates than min-updates or quorum ask for", rounds)
    ]
    when = "in the only round" if rounds == 1 else f"in any of {rounds} rounds"
    times = "once" if count == 1 else f"{count} times"
    raise UpdateError(f"{what} {when}; {times} the reason was: {reason.strip().splitlines()[-1]}")


def _held_out(config: RunConfig) -> ImageData:
    data = config.data
    return load_data(
        data.source,
        "test",
        limit=data.test_examples,
        skip_unreadable=data.skip_unreadable,
        seed=config.seed,
    )
