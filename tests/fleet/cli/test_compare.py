"""`fleet compare` before it has a comparison."""

import pytest
from click.testing import CliRunner

from fleet.cli import compare as module
from fleet.cli import main


@pytest.mark.parametrize("while_at", ["find_modules_here", "_asked", "_ask", "_shown"])
def test_it_can_be_stopped_from_its_first_moment_on(monkeypatch, tmp_path, while_at):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, while_at, interrupted)
    result = CliRunner().invoke(main, ["compare", "--set", "rounds=1", "--out", f"{tmp_path}/out"])
    assert result.exit_code == 130
    assert result.output == (
        f"stopped; the same command goes on with what is in {tmp_path / 'out'}\n"
    )


def test_nothing_to_compare_is_said_with_what_could_be(tmp_path):
    result = CliRunner().invoke(main, ["compare", "--target", "0.5", "--out", f"{tmp_path}/out"])
    assert result.exit_code == 1 and not (tmp_path / "out").exists()
    assert result.output == (
        "Error: nothing to compare; give a recipe, as simulations/recipes/strategies.toml, or an "
        "axis, as --vary strategy=fedavg,fedadam\n"
    )
