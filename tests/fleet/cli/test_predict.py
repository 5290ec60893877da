import json

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import fleet
from fleet.backbones import load_backbone
from fleet.cli import main
from fleet.records import RunRecord
from fleet.trained import facts_of


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    record = RunRecord.create(str(tmp_path_factory.mktemp("predict") / "run"), {})
    loaded = load_backbone("mobilenet_v3_small", num_classes=3, image_size=32, weights="none")
    with torch.no_grad():
        loaded.head.bias.copy_(torch.tensor([0.0, 2.0, 1.0]))
    facts = facts_of(loaded.name, loaded.model, ("cat", "[dog]", "yak"), loaded.preprocessing)
    record.save_model(loaded.model.state_dict(), facts)
    return record.path


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "a-photo-whose-name-is-longer-than-a-terminal-of-eighty-columns-is-wide.png"
    Image.new("RGB", (20, 20), "red").save(path)
    return path


def invoke(*arguments):
    return CliRunner().invoke(main, ["predict", *map(str, arguments)])


def test_predict_prints_class_and_probability_of_each_image(run, photo):
    result = invoke(run, photo)
    assert result.exit_code == 0, result.output
    ((name, probability),) = fleet.predict(run, [photo])[0].ranking
    (line,) = (line for line in result.stdout.splitlines() if ".png" in line)
    assert line.split() == [str(photo), name, f"{100 * probability:.1f}", "%"]
    assert name == "[dog]"


def test_predict_in_json_has_every_digit(run, photo):
    result = invoke(run, photo, "--top", 2, "--format", "json")
    values = json.loads(result.stdout)
    (one,) = fleet.predict(run, [photo], top=2)
    assert values == {
        "model": str(run),
        "predictions": [
            {
                "image": str(photo),
                "ranking": [{"class": n, "probability": p} for n, p in one.ranking],
                "fault": None,
            }
        ],
    }


def test_an_unreadable_image_is_named_and_ends_with_1(run, photo, tmp_path):
    result = invoke(run, tmp_path / "none.png", photo)
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: {tmp_path / 'none.png'} cannot be read: No such file or directory\n"
    )
    assert str(photo) in result.stdout
    values = json.loads(invoke(run, tmp_path / "none.png", photo, "--format", "json").stdout)
    assert [bool(one["ranking"]) for one in values["predictions"]] == [False, True]


def test_a_run_without_images_is_told_so(run):
    result = invoke(run)
    assert result.exit_code == 2
    assert "name at least one IMAGE behind RUN" in result.stderr


def test_what_is_no_model_is_one_line_without_a_traceback(photo, tmp_path):
    result = invoke(tmp_path / "none", photo)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: there is no model {tmp_path / 'none'}; name a run's")
