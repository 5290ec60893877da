"""`flwr run .`, as a user types it, on a copy of the checkout."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from simulations.flower_env import checkout_environment

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sys.executable).parent
# `simulate` starts Flower's runtime by the same command, which is held in test_launch; that our
# settings are those of the app, in fleet/test_config.
pytestmark = pytest.mark.slow
TRIES = 5  # Flower gives its SuperLink 15 s to start, which a busy machine exceeds


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkout")
    for name in ("fleet", "clients", "strategies", "simulations", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", ".gitignore"):
        shutil.copy(ROOT / name, root / name)
    yield root
    _end_superlink(int(checkout_environment(root)["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"]))


def _end_superlink(port):
    """Flower leaves its local SuperLink running; this one is ours alone."""
    for process in psutil.process_iter(["cmdline"]):
        if str(port) in (process.info["cmdline"] or []):
            for part in (*process.children(recursive=True), process):
                with suppress(psutil.NoSuchProcess):  # a child may end by itself
                    part.terminate()


def flwr_run(checkout, *arguments):
    path = f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"
    for _ in range(TRIES):
        done = _run_once(checkout, path, *arguments)
        if "Failed to start local SuperLink within" not in done.stdout + done.stderr:
            break
    return done


def _run_once(checkout, path, *arguments):
    return subprocess.run(
        [str(SCRIPTS / "flwr"), "run", ".", "--stream", *arguments],
        cwd=checkout,
        env=os.environ | checkout_environment(checkout) | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_flwr_run_takes_our_settings_and_leaves_the_checkout_as_it_is(one_ray, checkout, tmp_path):
    before = (checkout / "pyproject.toml").read_text()
    run_dir = tmp_path / "run"
    settings = (
        'rounds=1 blocks="0,1" train-examples=60 test-examples=30 image-size=32 local-epochs=1 '
        f'run-dir="{run_dir}"'
    )
    done = flwr_run(checkout, "--run-config", settings, "--federation-config", "num-supernodes=2")
    assert (run_dir / "summary.json").is_file(), done.stdout + done.stderr
    rounds = [json.loads(line) for line in (run_dir / "rounds.jsonl").read_text().splitlines()]
    assert [client["blocks"] for client in rounds[1]["clients"]] == [0, 1]
    assert "round 1/1: accuracy" in done.stdout
    assert "uv sync" not in done.stdout
    assert (checkout / "pyproject.toml").read_text() == before


def test_flower_refuses_a_setting_that_there_is_not(checkout):
    done = flwr_run(checkout, "--run-config", "ruonds=3")
    assert done.returncode != 0
    assert "Invalid run configuration" in done.stdout + done.stderr
