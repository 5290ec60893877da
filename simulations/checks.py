"""What is wrong with a run's settings, found before any run has begun."""

from pathlib import Path

from fleet.backbones import structure_of
from fleet.config import WEIGHTS, RunConfig
from fleet.data import check_partition, check_source
from fleet.errors import ConfigError
from fleet.plan import make_plan
from fleet.weights import check_weights_file
from strategies.aggregation import check_cohort


def check_settings(config: RunConfig) -> None:
    """Refuse what would end a run before its first round; no image is read.

    Raises:
        FleetError: for a partition, data, weights, backbone or number of blocks that
            there is not, or a fleet that `check_fleet` refuses.
    """
    check_fleet(config)
    check_partition(config.data.partition)
    check_source(config.data.source)
    if config.model.weights not in WEIGHTS:
        check_weights_file(Path(config.model.weights))
    backbone = structure_of(config.model.backbone)
    make_plan(backbone, method=config.plan.method, blocks=max(config.plan.choices))


def check_fleet(config: RunConfig) -> None:
    """Refuse what is only wrong where the number of clients is known.

    Raises:
        ConfigError: naming both settings.
    """
    federation = config.federation
    for key, value in (
        ("min-clients", federation.min_clients),
        ("sampled", federation.sampled),
        ("goal", federation.goal),
        ("min-updates", federation.min_updates),
        ("quorum", federation.quorum),
    ):
        if value > federation.clients:
            raise ConfigError(
                f"{key} is {value}, and the fleet has {federation.clients} clients; "
                f"lower it, or raise clients"
            )
    if ":" not in federation.strategy:
        check_cohort(federation.rule, {"clients": federation.clients})
    if federation.evaluation == "clients" and config.data.validation_fraction == 0:
        raise ConfigError(
            "evaluation is left to the clients, and validation-fraction is 0; raise it, "
            "or let the server evaluate"
        )
