"""What runs cache and clients remember goes to folders of the session; long files begin first."""

import copy
import fcntl
import gc
import tempfile
from pathlib import Path

import pytest

# Files that take longest, most of them because they start processes. With several workers
# (`make test`), each of which takes a file at a time, no worker is left alone with them.
LONG_FILES = (
    "test_fleet_server.py",
    "test_fleet_life.py",
    "test_compare.py",
    "test_launch.py",
    "test_slow_link.py",
    "test_server_app.py",
    "test_flwr_run.py",
    "test_inverted_residual.py",
    "test_cli.py",
    "test_without_compiler.py",
    "test_workers.py",
    "test_rules_under_attack.py",
    "test_gate_fuzz.py",
    "test_formats.py",
    "test_finetune.py",
    "test_dry_run.py",
    "test_notebooks.py",
    "test_benchmark_engines.py",
    "test_planner.py",
    "test_resume.py",
    "test_train.py",
    "test_benchmark_scale.py",
    "test_cli_plan.py",
    "test_stopping.py",
    "test_memory_limit.py",
    "test_readme.py",
    "test_model.py",
    "test_leaks.py",
    "test_killed_for_memory.py",
    "test_deciding.py",
    "test_local_update.py",
    "test_data.py",
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


@pytest.fixture(scope="module")
def quick_runs():
    """Runs of this process copy a backbone that one of them has built, and draw no pictures.

    Both together take half as long as a small run. That a build gives the same each time is
    tested in fleet/test_backbones, pages with pictures in fleet/report and test_cli; where
    matplotlib is not installed they have none. Nor do they freeze what is frozen already, see
    below: to count it takes a tenth of a small run.
    """
    import fleet.backbones
    from fleet.errors import ConfigError

    own, own_of_a_run = fleet.backbones.load_backbone, fleet.backbones._load

    def built(name, *, classes=None, weights="default", **more):
        classes = None if classes is None else tuple(classes)
        facts = (name, classes, weights, *sorted(more.items()))
        if facts not in _BUILT:
            if len(_BUILT) == 8:
                _BUILT.clear()
            _BUILT[facts] = own(name, classes=classes, weights=weights, **more)
        return _BUILT[facts]

    def copy_of(name, *, weights="default", **more):
        if weights not in ("default", "none"):  # a file may change
            return own(name, weights=weights, **more)
        return copy.deepcopy(built(name, weights=weights, **more))

    def kept(config, classes, seed):  # its caller copies it
        if config.weights not in ("default", "none"):
            return own_of_a_run(config, classes, seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fleet.backbones.load_backbone", built)
            return own_of_a_run(config, classes, seed)

    kept.cache_clear = lambda: None

    def no_pictures(*arguments):
        raise ConfigError("pictures need matplotlib")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fleet.backbones.load_backbone", copy_of)
        patch.setattr("fleet.backbones._kept", kept)
        patch.setattr("fleet.report.page.run_pictures", no_pictures)
        patch.setattr("simulations.local_engine.LocalGrid._freeze", lambda grid: None)
        yield


_BUILT = {}  # arguments of load_backbone → what it gave


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported stays: nobody need look through it for garbage, now or later.

    These are a million objects: each full collection would take a second.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist
        items.sort(key=_place)  # stable: a file's own order stays


def _place(item):
    name = Path(item.path).name
    return LONG_FILES.index(name) if name in LONG_FILES else len(LONG_FILES)
