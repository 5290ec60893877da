import json
import tomllib

import pytest
from click.testing import CliRunner

from fleet.cli import main
from fleet.config import default_settings

SMALL = (
    *("--clients", "2", "--rounds", "1", "--train-examples", "60", "--test-examples", "30"),
    *("--image-size", "32", "--local-epochs", "1", "--blocks", "0,1"),
)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    result = invoke("simulate", *SMALL, "--run-dir", str(folder))
    assert result.exit_code == 0, result.output
    return folder


def invoke(*arguments):
    return CliRunner().invoke(main, arguments)


def test_simulate_has_an_option_for_every_setting():
    text = invoke("simulate", "--help").output
    for key in default_settings():
        assert f"--{key}" in text


def test_options_reach_the_run(run_dir):
    settings = tomllib.loads((run_dir / "config.toml").read_text())["settings"]
    assert settings["clients"] == 2
    assert settings["blocks"] == "0,1"
    assert settings.keys() == default_settings().keys()


def test_report_prints_the_table_and_the_paths(run_dir):
    text = invoke("report", str(run_dir)).output
    assert "acc. %" in text
    assert str(run_dir / "model.safetensors") in text.replace("\n", "")


def test_report_in_json_is_the_summary(run_dir):
    result = invoke("report", str(run_dir), "--format", "json")
    assert json.loads(result.output) == json.loads((run_dir / "summary.json").read_text())


def test_simulate_in_json_prints_nothing_else_on_standard_output(tmp_path):
    result = invoke("simulate", *SMALL, "--run-dir", str(tmp_path / "run"), "--format", "json")
    assert set(json.loads(result.stdout)) == {
        "accuracy",
        "loss",
        "rounds",
        "bytes_up",
        "bytes_down",
        "peak_client_bytes",
        "seconds",
        "refused",
        "strategy",
        "seed",
        "plan_digest",
    }


def test_a_recipe_is_read_and_options_go_before_it(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('momentum = 0.5\nblocks = "1"')
    options = [*SMALL, "--blocks", "0"]
    result = invoke("simulate", str(recipe), *options, "--run-dir", str(tmp_path / "run"))
    assert result.exit_code == 0, result.output
    settings = tomllib.loads((tmp_path / "run" / "config.toml").read_text())["settings"]
    assert (settings["blocks"], settings["momentum"]) == ("0", 0.5)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("ruonds = 3", "unknown setting ruonds; known: backbone"),
        ("rounds = 'three'", "rounds must be int, got 'three'"),
        ("rounds =", "is not TOML"),
        (None, "cannot read recipe"),
    ],
)
def test_a_recipe_that_is_wrong_is_refused_without_a_traceback(tmp_path, content, text):
    recipe = tmp_path / "recipe.toml"
    if content is not None:
        recipe.write_text(content)
    result = invoke("simulate", str(recipe))
    assert result.exit_code == 1
    assert text in result.output
    assert "Traceback" not in result.output


def test_a_folder_without_a_run_is_refused(tmp_path):
    result = invoke("report", str(tmp_path))
    assert result.exit_code == 1
    assert "holds no run" in result.output
