"""The ServerApp: reads the configuration and wires the parts."""

import json
from logging import ERROR, INFO

from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp
from safetensors.torch import save_file

from fleet.backbones import Backbone, load_backbone
from fleet.config import RunConfig, read_config
from fleet.data import ImageData, load_data
from fleet.errors import FleetError
from fleet.evaluation import Evaluation, evaluate
from fleet.plan import make_plan
from fleet.records import RunRecord, summarise
from fleet.state import TrainableState, capture, load
from fleet.train import pick_device
from strategies.fleet_strategy import FleetStrategy
from strategies.sampling import Roster
from strategies.server_opt import server_optimizer

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
    optimizer = server_optimizer(
        federation.strategy,
        learning_rate=federation.server_learning_rate,
        momentum=federation.server_momentum,
    )
    test = _held_out(config) if federation.evaluation == "server" else None
    roster = Roster(grid, timeout=federation.round_timeout)
    if test is None:
        roster.online(federation.min_clients)
    classes = test.classes if test else roster.classes()
    backbone = _backbone(config, len(classes))
    plan = make_plan(
        backbone,
        method=config.plan.method,
        blocks=max(config.plan.choices),
        train_tail=config.plan.train_tail,
    )
    record = RunRecord.create(config.run_dir, config.as_settings())
    log(INFO, "records go to %s", record.path)

    def evaluate_state(state: TrainableState) -> Evaluation:
        load(backbone.model, state)
        return evaluate(backbone.model, test, backbone.preprocessing)

    strategy = FleetStrategy(
        capture(backbone.model, plan),
        classes,
        roster,
        federation,
        config.seed,
        optimizer,
        evaluate=evaluate_state if test else None,
        on_round=record.add_round,
    )
    load(backbone.model, strategy.run(grid))
    _save_model(record, backbone, classes)
    record.write_summary(
        summarise(strategy.reports)
        | {"strategy": federation.strategy, "seed": config.seed, "plan_digest": plan.digest}
    )
    log(INFO, "model saved to %s", record.model_path)


def _held_out(config: RunConfig) -> ImageData:
    data = config.data
    return load_data(
        data.source,
        "test",
        limit=data.test_examples,
        skip_unreadable=data.skip_unreadable,
        seed=config.seed,
    )


def _backbone(config: RunConfig, num_classes: int) -> Backbone:
    model = config.model
    backbone = load_backbone(
        model.backbone,
        num_classes=num_classes,
        image_size=model.image_size,
        weights=model.weights,
        seed=config.seed,
    )
    backbone.model.to(pick_device(config.local.device))
    return backbone


def _save_model(record: RunRecord, backbone: Backbone, classes: tuple[str, ...]) -> None:
    """The whole model under its original names, with what is needed to use it again."""
    tensors = {name: t.cpu().contiguous() for name, t in backbone.model.state_dict().items()}
    facts = {
        "backbone": backbone.name,
        "image_size": str(backbone.preprocessing.image_size),
        "classes": json.dumps(classes),
    }
    save_file(tensors, record.model_path, metadata=facts)
