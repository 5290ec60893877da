"""The default rule beside plain averaging, with and without hostile clients, on real images."""

from functools import cache
from statistics import mean

import pytest

from fleet.config import default_settings
from simulations import simulate

pytestmark = pytest.mark.usefixtures("quick_runs")

SETTINGS = {
    "method": "head",
    "clients": 10,
    "rounds": 6,
    "train-examples": 800,
    "test-examples": 240,
    "image-size": 32,
    "partition": "dirichlet:0.5",
    "learning-rate": 0.05,
    "local-epochs": 2,
    "validation-fraction": 0.0,
}
DEFAULT = default_settings()["rule"]


@pytest.fixture(scope="module")
def accuracy(tmp_path_factory):
    """Function (rule, attack by a fifth of the clients, seed) → accuracy of the last rounds."""

    @cache
    def run(rule, attack="", seed=0):
        folder = tmp_path_factory.mktemp("run") / "run"
        settings = SETTINGS | {"rule": rule, "seed": seed, "run-dir": str(folder)}
        record = simulate(settings, **({"attack": attack, "hostile": 0.2} if attack else {}))
        return 100 * mean(report.accuracy for report in list(record.rounds())[-3:])

    return run


def test_sign_flips_ruin_plain_averaging(accuracy):
    assert accuracy("mean", "sign_flip:10") < accuracy("mean") - 15


@pytest.mark.slow  # what it makes of honest updates is in strategies/aggregation
def test_the_default_rule_costs_nothing_without_an_attack(accuracy):
    assert accuracy(DEFAULT) > accuracy("mean") - 1


@pytest.mark.parametrize(
    "attack",
    [
        "sign_flip:10",  # the worst of them for a mean; what each sends is in test_attacks
        *(
            pytest.param(attack, marks=pytest.mark.slow)
            for attack in ("alie:1.5", "label_flip", "ipm:0.5", "nan")
        ),
    ],
)
def test_the_default_rule_withstands_a_fifth_of_hostile_clients(accuracy, attack):
    assert accuracy(DEFAULT, attack) > accuracy(DEFAULT) - 3


@pytest.mark.slow  # above: what the same attacks cost beside no attack
@pytest.mark.parametrize("attack", ["sign_flip:4", "label_flip"])
def test_hostile_clients_cost_what_their_data_are_worth(accuracy, attack):
    """A seed where that is much: under nan the gate refuses exactly the hostile clients."""
    assert accuracy(DEFAULT, attack, seed=1) > accuracy(DEFAULT, "nan", seed=1) - 3
