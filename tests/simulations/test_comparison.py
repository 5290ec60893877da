import math
from itertools import count

import pytest
from rich.console import Console

from fleet.cli.compare import _fitting
from fleet.records import RoundReport, RunRecord
from simulations.compare import load_recipe
from simulations.comparison import COLUMNS, ComparedRow, Comparison, _cell

NAN = math.nan
DIFFERENCE = "difference, points"


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


@pytest.fixture
def compared(tmp_path):
    """Makes a comparison of rows: rule → accuracy of each seed, or why there is no run."""

    folders = (tmp_path / str(number) for number in count())

    def make(rows, **more):
        folder = next(folders)
        recipe = load_recipe({"seeds": 2, "vary": {"rule": [*rows]}, **more})
        made = []
        for variant in recipe.variants():
            row = ComparedRow(variant)
            for seed, came in enumerate(rows[variant.settings["rule"]]):
                if isinstance(came, str):
                    row.failed[seed] = came, "Traceback"
                    continue
                run = RunRecord.create(str(folder / f"runs/{len(made)}-{seed}"), {})
                run.add_round(RoundReport(server_round=0, accuracy=came, loss=1.0, bytes_up=7))
                row.runs[seed] = run, {"device_flops": 1e9}
            made.append(row)
        return Comparison(recipe, folder, made)

    return make


@pytest.mark.parametrize(
    ("columns", "place"),
    [((), 3), (("seconds", "accuracy", "refused"), 4), (("seconds", "refused"), 2)],
)
def test_the_difference_comes_right_behind_the_accuracy(compared, columns, place):
    table = compared({"mean": (0.5, 0.6), "median": (0.7, 0.8)}, columns=[*columns]).table()
    assert table.columns[place] == DIFFERENCE
    assert [row[place] for row in table.rows] == ["–", "+20.0 ± 0.0"]
    assert {len(row) for row in table.rows} == {len(table.columns)}
    if columns != ("seconds", "refused"):
        accuracy = place - 1
        assert table.columns[accuracy] == "accuracy %"
        assert table.rows[0][accuracy].startswith("55.0 ± ")


def test_a_narrow_terminal_has_accuracy_and_difference(compared):
    table = compared({"mean": (0.5, 0.6), "median": (0.7, 0.8)}).table()
    narrow = _fitting(table, Console(width=60))
    assert narrow.columns == ("row", "seeds", "accuracy %", DIFFERENCE)
    assert narrow.note.endswith(" 8 more columns are in table.md.")
    assert [row[3] for row in narrow.rows] == ["–", "+20.0 ± 0.0"]
    wide = _fitting(table, Console(width=400))
    assert wide == table


def test_a_notebook_shows_the_table(compared):
    shown = compared({"mean": (0.5, 0.6), "median": (0.7, 0.8)})._repr_html_().replace("<wbr>", "")
    assert shown.count("<table") == 1 and "<td>+20.0 ± 0.0</td>" in shown
    assert "rule=median" in shown and "<p>Mean over seeds" in shown


def test_the_markdown_says_why_rows_have_fewer_runs_than_seeds(compared):
    one = compared({"mean": (0.5, 0.6), "median": ("no | luck", "other"), "krum:0": (0.5, "late")})
    one.write()
    text = (one.folder / "table.md").read_text()
    table, below = text.split("## Failed")
    assert "| rule=median | 0 of 2 |" in table and "| rule=krum:0 | 1 of 2 |" in table
    lines = [line for line in below.splitlines() if line.startswith("| rule=")]
    assert lines == ["| rule=median | 0, 1 | no \\| luck |", "| rule=krum:0 | 1 | late |"]
    assert "other" not in below
    whole = compared({"mean": (0.5, 0.6)})
    whole.write()
    assert "Failed" not in (whole.folder / "table.md").read_text()


def test_a_first_row_without_a_run_is_named_as_the_reason_of_the_dashes(compared):
    rows = {"mean": ("late", "late"), "median": (0.7, 0.8)}
    lost = compared(rows).table()
    assert lost.rows[1][3] == lost.rows[1][4] == "–"
    said = " No run of rule=mean ended well: rows held against it have "
    assert lost.note.endswith(f"{said}neither difference nor target.")
    for more in ({"target": 0.5}, {"columns": ["accuracy", "seconds"]}):
        assert compared(rows, **more).table().note.endswith(f"{said}no difference.")
    # Where each is its own first row, and where the first has a run, nothing is missing.
    for fine in (
        compared(rows, within=["rule"]),
        compared({"median": (0.7, 0.8), "mean": ("late", "late")}),
    ):
        assert "No run of" not in fine.table().note
