from fleet.plan import NORM_ROLES
from fleet.records import RoundReport
from fleet.report import bytes_by_role


def test_bytes_are_summed_by_link_and_role_in_the_order_of_training(rounds):
    sums = bytes_by_role(rounds)
    assert sums == {
        "up": {"weight": 3000, "bias": 40, "var": 0, "headers": 3 * 2**20 + 960},
        "down": {"weight": 750, "bias": 0, "var": 250, "headers": 1000},
    }
    assert list(sums["up"]) == list(sums["down"]) == ["weight", "bias", "var", "headers"]


def test_every_role_of_a_plan_comes_before_the_headers():
    roles = ("weight", "bias", *NORM_ROLES, "headers")
    report = RoundReport(
        server_round=1,
        accuracy=None,
        loss=None,
        bytes_by_role={"up": dict.fromkeys(sorted(roles), 1), "down": {}},
    )
    assert tuple(bytes_by_role([report])["up"]) == roles


def test_a_record_that_does_not_tell_has_no_roles(old_rounds):
    assert bytes_by_role(old_rounds) == {"up": {}, "down": {}}
