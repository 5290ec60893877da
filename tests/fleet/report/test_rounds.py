from dataclasses import replace

from fleet.report import refusals, round_line


def test_the_line_of_a_round_gives_every_figure_with_its_unit(rounds):
    assert round_line(rounds[1], 2) == (
        "round 1/2: accuracy 50.0 %, loss 1.250, up 3.00 MiB, down 2.00 MiB, "
        "client peak 1.0 MiB, 1.5 s, 2 clients, 3 refused"
    )


def test_what_was_not_measured_is_a_dash_not_a_zero(rounds):
    assert "accuracy – %, loss –" in round_line(rounds[2], 2)


def test_the_line_of_a_round_tells_of_those_it_went_on_without(rounds):
    assert round_line(rounds[2], 3).endswith("1 clients, 0 refused, 1 late")


def test_the_line_of_an_abandoned_round_says_so(rounds):
    assert round_line(rounds[3], 3).endswith(
        "0 clients, 2 refused; abandoned, the model stayed as it was"
    )
    assert not any("abandoned" in round_line(report, 3) for report in rounds[:3])


def test_round_0_is_not_abandoned_for_training_nobody(rounds):
    assert "abandoned" not in round_line(replace(rounds[0], stepped=False), 3)


def test_a_refusal_is_one_line_with_round_client_and_reason(rounds):
    assert refusals(rounds[1:2]) == [
        "round 1: pi-03: <b>ValueError</b>: bad",
        "round 1: pi-01: evaluation: loss is NaN",
        "round 1: unknown sender: reply to no message that waits for one; dropped",
    ]
