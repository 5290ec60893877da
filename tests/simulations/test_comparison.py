import math

import pytest

from simulations.comparison import COLUMNS, _cell

NAN = math.nan


@pytest.mark.parametrize(
    ("by_seed", "text"),
    [
        ({0: 3.0, 1: 3.0, 2: 3.0}, "3.0 ± 0.0"),
        ({0: 3.0, 1: NAN, 2: 3.0}, "2 of 3: 3.0 ± 0.0"),
        ({0: NAN, 1: NAN, 2: 4.0}, "1 of 3: 4.0"),
        ({0: NAN, 1: NAN}, "–"),
    ],
)
def test_a_mean_over_some_of_the_seeds_says_of_how_many(by_seed, text):
    assert _cell(by_seed, COLUMNS["rounds-to-target"]) == text
