"""What runs cache and clients remember goes to folders of the session; long files begin first."""

import fcntl
import gc
import tempfile
from pathlib import Path

import pytest

# Files that take longest, most of them because they start processes. With several workers
# (`make test`), each of which takes a file at a time, no worker is left alone with them.
LONG_FILES = (
    "test_killed_mid_round.py",
    "test_fleet_life.py",
    "test_fleet_server.py",
    "test_launch.py",
    "test_slow_link.py",
    "test_compare.py",
    "test_stopping.py",
    "test_benchmark_scale.py",
    "test_gate_fuzz.py",
    "test_resume.py",
    "test_flwr_run.py",
    "test_memory_limit.py",
    "test_formats.py",
    "test_killed_for_memory.py",
    "test_finetune.py",
    "test_inverted_residual.py",
    "test_dry_run.py",
    "test_notebooks.py",
    "test_cli.py",
    "test_planner.py",
    "test_server_app.py",
)


@pytest.fixture(autouse=True, scope="session")
def feature_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEET_CACHE", str(tmp_path_factory.mktemp("features")))
        yield


@pytest.fixture(autouse=True, scope="session")
def client_memories(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEET_STATE", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture
def one_ray():
    """Flower's simulation runtime, which no other test process uses meanwhile.

    Two that start at once on two cores may each take longer than the 30 s that Ray waits.
    """
    pytest.importorskip("ray", reason="Flower's simulation runtime needs the extra sim")
    with (Path(tempfile.gettempdir()) / "fleet-tests-ray.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported stays: nobody need look through it for garbage, again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist
        items.sort(key=_place)  # stable: a file's own order stays


def _place(item):
    name = Path(item.path).name
    return LONG_FILES.index(name) if name in LONG_FILES else len(LONG_FILES)
