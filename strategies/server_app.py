"""The ServerApp: reads the configuration and wires the parts."""

import math
import secrets
from collections import Counter
from collections.abc import Iterable
from logging import ERROR, INFO, WARNING

from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from fleet.backbones import Backbone, backbone_of
from fleet.config import RunConfig, read_config
from fleet.data import ImageData, load_data
from fleet.errors import ConfigError, FleetError, UpdateError
from fleet.evaluation import Evaluation, evaluate
from fleet.mobiletl import TransferModel
from fleet.plan import make_plan
from fleet.records import RoundReport, RunRecord, summarise
from fleet.report import write_page
from fleet.signals import signals_held
from fleet.state import TrainableState, capture, load
from fleet.train import pick_device
from fleet.trained import facts_of
from strategies.algorithm import Algorithm, algorithm
from strategies.fleet_strategy import FleetStrategy
from strategies.head_start import HeadStarter
from strategies.sampling import Roster

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds and save what they came to."""
    try:
        run(grid, read_config(context.run_config))
    except FleetError as error:
        log(ERROR, "%s", error)
        raise


def run(grid: Grid, config: RunConfig) -> None:
    """One run over a grid of clients.

    Raises:
        FleetError: for a setting, data or weights that the user can mend.
    """
    federation = config.federation
    # What is wrong is told before anybody is waited for.
    _check_plans(algorithm(federation, config.seed), config)
    test = _held_out(config) if federation.evaluation == "server" else None
    roster = Roster(grid, timeout=federation.round_timeout)
    online = roster.online(federation.min_clients)
    classes = test.classes if test else roster.classes()
    backbone = _backbone(config, classes)
    plan = make_plan(
        backbone,
        method=config.plan.method,
        blocks=max(config.plan.choices),
        train_tail=config.plan.train_tail,
        local_norms=config.plan.local_norms,
    )
    model = TransferModel(backbone, plan)
    record = RunRecord.create(config.run_dir, config.as_settings() | {"clients": len(online)})
    log(INFO, "records go to %s", record.path)

    def evaluate_state(state: TrainableState) -> Evaluation:
        load(backbone.model, state)
        return evaluate(model, test, backbone.preprocessing, features=config.features)

    def end_round(report: RoundReport) -> None:
        if report.loss is not None and not math.isfinite(report.loss):
            raise UpdateError(
                f"the global model's loss is {report.loss} after round {report.server_round} with "
                f"server-learning-rate {federation.server_learning_rate}; lower it or learning-rate"
            )
        load(backbone.model, strategy.state)
        # In this order: a round that is on record has its model. A signal ends the run
        # before both or after both: the model is that of the last round on record.
        with signals_held():
            record.save_model(backbone.model.state_dict(), _facts(backbone, classes))
            record.add_round(report)

    strategy = FleetStrategy(
        capture(backbone.model, plan),
        classes,
        roster,
        federation,
        config.seed,
        algorithm(federation, config.seed, clients=len(online)),
        evaluate=evaluate_state if test else None,
        on_round=end_round,
        run=secrets.token_hex(8),
        head_start=HeadStarter.of(backbone) if federation.head_start else None,
    )
    strategy.run(grid)
    _check_trained(record.rounds())
    record.write_summary(
        summarise(record.rounds())
        | {"strategy": federation.strategy, "seed": config.seed, "plan_digest": plan.digest}
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
    raise UpdateError(
        f"{what} in any of {rounds} rounds; "
        f"{count} times the reason was: {reason.strip().splitlines()[-1]}"
    )


def _held_out(config: RunConfig) -> ImageData:
    data = config.data
    return load_data(
        data.source,
        "test",
        limit=data.test_examples,
        skip_unreadable=data.skip_unreadable,
        seed=config.seed,
    )


def _backbone(config: RunConfig, classes: tuple[str, ...]) -> Backbone:
    backbone = backbone_of(config.model, classes, config.seed)
    backbone.model.to(pick_device(config.local.device))
    return backbone


def _facts(backbone: Backbone, classes: tuple[str, ...]) -> dict[str, str]:
    """What is needed to use the model again."""
    return facts_of(backbone.name, backbone.model, classes, backbone.preprocessing)
