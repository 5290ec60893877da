import json

import pytest
from click.testing import CliRunner

from fleet.backbones import load_backbone
from fleet.cli import main
from fleet.records import RunRecord
from fleet.trained import facts_of, read_trained


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    record = RunRecord.create(str(tmp_path_factory.mktemp("export") / "run"), {})
    loaded = load_backbone("mobilenet_v3_small", num_classes=3, image_size=32, weights="none")
    facts = facts_of(loaded.name, loaded.model, ("a", "b", "c"), loaded.preprocessing)
    record.save_model(loaded.model.state_dict(), facts)
    return record.path


def invoke(*arguments):
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


def test_export_says_what_it_wrote(run, tmp_path):
    to = tmp_path / "model.safetensors"
    result = invoke(run, "--to", to)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{to}: {to.stat().st_size / 2**20:.2f} MiB\n"
    assert read_trained(to).classes == ("a", "b", "c")


def test_export_in_json(run, tmp_path):
    to = tmp_path / "model.safetensors"
    result = invoke(run, "--to", to, "--format", "json")
    expected = {"path": str(to), "bytes": to.stat().st_size, "description": None}
    assert json.loads(result.stdout) == expected


def test_an_unknown_suffix_is_one_line_without_a_traceback(run, tmp_path):
    result = invoke(run, "--to", tmp_path / "model.h5")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: cannot export to {tmp_path / 'model.h5'}: .h5 names")


def test_help_names_every_format():
    text = invoke("--help").output
    for suffix in (".safetensors", ".pt2", ".pt", ".onnx", ".pte"):
        assert f"{suffix} " in text or f"{suffix}," in text
