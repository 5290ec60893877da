"""The example notebooks run, and what they show was shown by a run."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "simulations" / "notebooks").glob("*.ipynb"))


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shapes(cell):
    """What kinds of output a cell has, and its text with numbers taken out of it."""
    return [
        (
            output.output_type,
            sorted(output.get("data", {})),
            re.sub(r"[\d.\-e]+|NaN", "#", output.get("text", "")),
        )
        for output in cell.outputs
    ]


def test_there_is_a_notebook():
    assert [path.name for path in NOTEBOOKS] == ["first_fleet.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_and_shows_what_it_says(path, tmp_path, monkeypatch):
    # The kernel is a process of its own; it finds the packages beside this test.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    committed = nbformat.read(path, as_version=4)
    fresh = nbformat.read(path, as_version=4)
    client = NotebookClient(
        fresh, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()  # raises what a cell raises
    for before, now in zip(code_cells(committed), code_cells(fresh), strict=True):
        assert shapes(before) == shapes(now), before.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_committed_as_a_run_from_top_to_bottom_left_it(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any("image/png" in o.get("data", {}) for cell in cells for o in cell.outputs)
    assert not any(o.output_type == "error" for cell in cells for o in cell.outputs)
    assert path.stat().st_size < 100_000
    # Neither where it ran nor what went wrong there.
    texts = [str(output) for cell in cells for output in cell.outputs]
    texts = [re.sub(r"'image/png': '[^']*'", "", text) for text in texts]
    assert not re.search(r"(?<![\w<])/(?!\w*>)\w+/|\\\\Users|stderr", " ".join(texts))
