"""The recipes that come with the project: each is one, and has its results beside it."""

from pathlib import Path

import pytest

from fleet.config import default_settings, read_config, read_toml
from simulations.adversity import OF_ADVERSITY
from simulations.checks import check_settings
from simulations.compare import load_recipe

FOLDER = Path(__file__).parents[2] / "simulations" / "recipes"
RESULTS = FOLDER.parent / "results" / "recipes"
OF_A_RUN = {"cifar10"}  # settings for fleet simulate
NAMES = sorted(path.stem for path in FOLDER.glob("*.toml"))
COMPARED = [name for name in NAMES if name not in OF_A_RUN]


def test_all_of_them_are_here():
    assert set(COMPARED) == {"strategies", "budgets", "methods", "attacks", "codecs", "scale"}


@pytest.mark.parametrize("name", COMPARED)
def test_every_run_that_a_recipe_asks_for_can_be_begun(name):
    recipe = load_recipe(FOLDER / f"{name}.toml")
    assert recipe.num_cells >= 9
    for variant in recipe.variants():
        settings = {k: v for k, v in variant.settings.items() if k not in OF_ADVERSITY}
        check_settings(read_config(default_settings() | settings))


@pytest.mark.parametrize("name", COMPARED)
def test_every_row_of_a_recipe_has_a_result(name):
    table = (RESULTS / f"{name}.md").read_text().replace("\\", "")
    rows = {variant.name for variant in load_recipe(FOLDER / f"{name}.toml").variants()}
    assert {row for row in rows if f"| {row} |" not in table} == set()
    assert (RESULTS / f"{name}.svg").is_file()


@pytest.mark.parametrize("name", sorted(OF_A_RUN))
def test_settings_of_a_run_are_settings(name):
    read_config(default_settings() | read_toml(FOLDER / f"{name}.toml"))
