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
