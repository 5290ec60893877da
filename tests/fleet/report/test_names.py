"""Names in pictures: shorter, and still told apart."""

import random

import pytest

from fleet.report.names import labels, lines_in, without_shared


def test_names_that_fit_stay_as_they_are():
    names = ["partition=iid", "partition=dirichlet:0.1"]
    assert labels(names, 24) == names


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (  # a setting's name that all rows have
            ["nan, rule=mean", "nan, rule=trimmed_mean:0.2", "alie, rule=mean"],
            ["nan, mean", "nan,\ntrimmed_mean:0.2", "alie, mean"],
        ),
        (  # a part that is the same in all
            [f"clients=100, strategy=fedavg, seed={i}" for i in (1, 2)],
            ["seed=1", "seed=2"],
        ),
        (  # no parts: a common beginning and a common end, whole words of them
            ["greenhouse-device-number-01 in May", "greenhouse-device-number-02 in May"],
            ["…01…", "…02…"],
        ),
        (["one name alone, that is long"], ["one name alone,\nthat is long"]),
    ],
)
def test_what_all_share_goes(names, shown):
    assert labels(names, 16, lines=2) == shown


def test_what_tells_apart_is_in_the_middle_and_stays():
    names = [f"{'a' * 40}{i}{'b' * 40}" for i in range(3)]
    shown = labels(names, 12)
    assert len({*shown}) == 3 and all(len(name) <= 12 for name in shown)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("lines", [1, 2])
def test_different_names_stay_different_and_short(seed, lines):
    rng = random.Random(seed)
    words = ["mean", "rule=", ", ", "=", " ", "median", "trimmed_mean:0.2", "x" * 30, "-", "1", "2"]
    names = ["".join(rng.choices(words, k=rng.randint(1, 12))) or "x" for _ in range(12)]
    names = list({name.strip() or "x": None for name in names})
    shown = labels(names, 18, lines)
    assert len({*shown}) == len(names)
    assert all(shown) and lines_in(shown) <= lines
    assert max(len(line) for name in shown for line in name.split("\n")) <= 18


def test_what_is_not_printable_is_a_mark_of_its_own():
    assert labels(["a\nb", "c\x00d"], 10) == ["a�b", "c�d"]


def test_parts_are_only_left_out_where_all_names_have_as_many():
    names = ["head", "shifts, k=5", "mobiletl, k=5"]
    assert without_shared(names) == names
    assert without_shared(names[1:]) == ["shifts", "mobiletl"]
