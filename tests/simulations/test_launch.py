import json
import logging
import signal
import subprocess
import sys
import time
import tomllib

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

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
        ({"clients": 100}, "60 examples cannot be dealt out to 100 clients; use fewer"),
        ({"strategy": "fedsgd"}, "unknown strategy fedsgd; known: fedavg, fedavgm, fedadam"),
        ({"clients": 1}, "min-clients is 2, and the fleet has 1 clients; lower it, or raise"),
        ({"sampled": 5}, "sampled is 5, and the fleet has 2 clients; lower it"),
        (
            {"evaluation": "clients", "validation-fraction": 0.0},
            "evaluation is left to the clients, and validation-fraction is 0; raise it",
        ),
        ({"data": "a" * 300}, "data 'aaa.*' is neither a known name nor a path here"),
        ({"weights": "a" * 300}, "no weights file aaa"),
        ({"data": " "}, "data is empty; name one"),
        ({"weights": ""}, "weights is empty; name one"),
        ({"seed": 2**63}, r"seed must lie in \[0, 2\^63\), got 9223372036854775808"),
        ({"blocks": [1, 3]}, r'blocks must be text, such as "1,3,5"; got the list \[1, 3\]'),
        ({"backbone": "torchvision:resnet18", "weights": "none"}, "no inverted-residual blocks"),
        ({"data": "nowhere"}, "data 'nowhere' is neither a known name nor a path here"),
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


def test_a_folder_does_not_take_the_place_of_a_built_in_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits" / "cat").mkdir(parents=True)
    (tmp_path / "default").mkdir()
    settings = tomllib.loads(simulate(SMALL).config_path.read_text())["settings"]
    assert (settings["data"], settings["weights"]) == ("digits", "default")


def test_a_run_in_which_nobody_could_train_is_no_success(tmp_path):
    settings = SMALL | {"batch-size": 1, "blocks": "1", "run-dir": str(tmp_path / "run")}
    text = "no client's update was admitted in any of 1 rounds; 2 times .* a batch of one image"
    with pytest.raises(FleetError, match=text):
        simulate(settings)
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_server_that_diverges_stops_with_the_last_good_model(tmp_path):
    settings = SMALL | {"server-learning-rate": 1e30, "run-dir": str(tmp_path / "run")}
    with pytest.raises(FleetError, match=r"loss is (nan|inf) after round 1 with server-learning-r"):
        simulate(settings)
    tensors = load_file(tmp_path / "run" / "model.safetensors")
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())


def test_flower_s_log_is_as_loud_after_a_run_as_before(tmp_path):
    level = logging.getLogger("flwr").level
    simulate(SMALL | {"run-dir": str(tmp_path / "run")})
    assert logging.getLogger("flwr").level == level


def test_an_interrupted_run_on_flower_leaves_no_process_behind(tmp_path):
    pytest.importorskip("ray", reason="Flower's simulation runtime needs the extra sim")
    run_dir = tmp_path / "run"
    settings = SMALL | {"rounds": 200, "run-dir": str(run_dir)}
    code = (
        # Python leaves an interrupt ignored where its parent does, as a shell's background job.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"from simulations import simulate; simulate({settings!r}, engine='flower')"
    )
    run = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    family = []
    try:
        deadline = time.monotonic() + 200
        while not (run_dir / "rounds.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.3)
        family = psutil.Process(run.pid).children(recursive=True)
        run.send_signal(signal.SIGINT)
        run.wait(timeout=100)
    finally:
        run.kill()
    assert len(family) > 3
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
