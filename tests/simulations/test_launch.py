import json

import pytest

from fleet.errors import ConfigError, FleetError
from simulations import simulate

SMALL = {
    "clients": 2,
    "rounds": 1,
    "train-examples": 60,
    "test-examples": 30,
    "image-size": 32,
    "local-epochs": 1,
    "blocks": "0,1",
}


def test_a_run_reports_its_rounds_in_order_and_its_replies(tmp_path):
    rounds, replies = [], []
    simulate(
        SMALL | {"run-dir": str(tmp_path / "run")},
        on_round=lambda report: rounds.append(report.server_round),
        on_reply=lambda answered, asked: replies.append((answered, asked)),
    )
    assert rounds == [0, 1]
    assert replies[-2:] == [(1, 2), (2, 2)]


def test_a_run_leaves_records_model_and_page(tmp_path):
    record = simulate(SMALL | {"run-dir": str(tmp_path / "run")})
    names = {path.name for path in record.path.iterdir()}
    assert names == {
        "config.toml",
        "rounds.jsonl",
        "summary.json",
        "model.safetensors",
        "report.html",
    }


def test_a_run_directory_that_holds_a_run_is_refused_and_kept(tmp_path):
    (tmp_path / "config.toml").write_text("kept")
    with pytest.raises(ConfigError, match="holds a run already; name another"):
        simulate(SMALL | {"run-dir": str(tmp_path)})
    assert (tmp_path / "config.toml").read_text() == "kept"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"blocks": "17"}, "blocks is 17, efficientnet_lite0 has 16; choose 0 to 16"),
        ({"clients": 100}, "100"),
        ({"strategy": "fedsgd"}, "fedsgd"),
        ({"backbone": "torchvision:resnet18", "weights": "none"}, "no inverted-residual blocks"),
        ({"data": "nowhere"}, "nowhere"),
    ],
)
def test_what_the_user_can_mend_is_said_before_anything_is_written(tmp_path, settings, text):
    with pytest.raises(FleetError, match=text):
        simulate(SMALL | settings | {"run-dir": str(tmp_path / "run")})
    assert not (tmp_path / "run" / "rounds.jsonl").exists()


def test_an_unknown_engine_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="unknown engine cloud; known: local, flower"):
        simulate(SMALL, engine="cloud")


def test_both_engines_end_with_the_same_tensors(tmp_path):
    load_file = pytest.importorskip("safetensors.numpy").load_file
    pytest.importorskip("ray", reason="Flower's simulation runtime needs the extra sim")
    runs = {
        engine: simulate(SMALL | {"run-dir": str(tmp_path / engine)}, engine=engine)
        for engine in ("local", "flower")
    }
    local, flower = (load_file(record.model_path) for record in runs.values())
    assert local.keys() == flower.keys()
    assert all((local[name] == flower[name]).all() for name in local)
    sizes = [json.loads(r.summary_path.read_text())["bytes_up"] for r in runs.values()]
    assert sizes[0] == sizes[1]


def test_a_run_that_fails_on_flower_says_why(tmp_path):
    pytest.importorskip("ray", reason="Flower's simulation runtime needs the extra sim")
    settings = SMALL | {"run-dir": str(tmp_path / "run"), "backbone": "mobilenet_v9"}
    with pytest.raises(
        FleetError, match=r"the run on Flower failed: .*unknown backbone mobilenet_v9"
    ):
        simulate(settings, engine="flower")
