import inspect
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest
from flwr.proto.runtime_pb2 import PushTaskOutputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors.http.runtime_token import TASK_TOKEN_HEADER
from flwr.supercore.superexec import run_superexec
from flwr.supercore.superexec.executor import ExecutionSpec
from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor

from clients import executor
from clients.executor import WarmExecutor, fork_template
from fleet.deploy.app_process import OURS

LIBRARY = "library_to_be_warm"
SPEC = ExecutionSpec(
    task_type=TaskType.CLIENT_APP,
    runtime_api_address="127.0.0.1:1",
    token="a token",
    insecure=True,
    root_certificates_path=None,
    runtime_dependency_install=False,
    parent_pid=os.getpid(),
    suppress_output=False,
    task_id=1,
    fab_hash=None,
)


@pytest.fixture
def started(monkeypatch) -> list[list[str]]:
    """Commands that Flower's own executor would have run."""
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda args, **kwargs: commands.append(args))
    return commands


@pytest.fixture(autouse=True)
def library(tmp_path, monkeypatch):
    (tmp_path / f"{LIBRARY}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def template(warm) -> psutil.Process:
    """The process that ClientApps are forked from."""
    (process,) = (c for c in psutil.Process().children() if c.pid not in warm.before)
    return process


@pytest.fixture
def warm(tmp_path, monkeypatch):
    """An executor whose ClientApps write down what they see, each in a file of its pid."""

    def client_app() -> None:
        seen = {
            "argv": sys.argv,
            "parent": os.getppid(),
            "modules": sorted(name.partition(".")[0] for name in sys.modules),
            "oom": Path("/proc/self/oom_score_adj").read_text().strip(),
        }
        (tmp_path / f"{os.getpid()}.part").write_text(json.dumps(seen))
        (tmp_path / f"{os.getpid()}.part").rename(tmp_path / f"{os.getpid()}.json")
        raise SystemExit(3)

    monkeypatch.setattr(executor, "LIBRARIES", ("clients.client", LIBRARY))
    monkeypatch.setattr(executor, "flwr_clientapp", client_app)
    before = {child.pid for child in psutil.Process().children()}
    made = WarmExecutor(fork_template())
    made.before = before
    yield made
    made.close()


@contextmanager
def runtime_api():
    """A SuperNode's Runtime API: its address, and token, status and details of what it was told."""
    outputs: list[tuple[str, str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            told = PushTaskOutputRequest.FromString(body)
            assert self.path.endswith("push-task-output")
            outputs.append((self.headers[TASK_TOKEN_HEADER], told.sub_status, told.details))
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.server_port}", outputs
        server.shutdown()
        thread.join()


def reports(folder: Path, count: int) -> dict[int, dict]:
    """What so many ClientApps saw, by their process ids."""
    deadline = time.monotonic() + 60
    while len(found := sorted(folder.glob("*.json"))) < count:
        assert time.monotonic() < deadline, f"{len(found)} of {count} ClientApps ran"
        time.sleep(0.02)
    return {int(path.stem): json.loads(path.read_text()) for path in found}


def test_every_message_has_a_process_of_its_own_with_the_libraries_loaded(warm, tmp_path, started):
    assert LIBRARY not in sys.modules
    for _ in range(3):
        assert warm.launch(SPEC).status == "accepted"
    seen = reports(tmp_path, 3)
    assert os.getpid() not in seen
    for each in seen.values():
        assert LIBRARY in each["modules"]
        assert each["parent"] not in (os.getpid(), *seen)
    assert started == []


def test_the_projects_own_packages_are_not_loaded_as_flower_sends_the_runs(warm, tmp_path):
    warm.launch(SPEC)
    (seen,) = reports(tmp_path, 1).values()
    assert set(OURS).isdisjoint(seen["modules"])


def test_a_client_app_is_the_first_to_go_where_memory_runs_out(warm, tmp_path):
    warm.launch(SPEC)
    (seen,) = reports(tmp_path, 1).values()
    assert int(seen["oom"]) > int(Path("/proc/self/oom_score_adj").read_text())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"insecure": False, "root_certificates_path": "/a/ca.crt"},
        {"parent_pid": None, "runtime_dependency_install": True},
    ],
)
def test_a_client_app_has_the_arguments_that_flowers_executor_gives(
    warm, tmp_path, started, changes
):
    spec = ExecutionSpec(**{**vars(SPEC), **changes})
    warm.launch(spec)
    (seen,) = reports(tmp_path, 1).values()
    SubprocessExecutor().launch(spec)
    assert seen["argv"] == started[0]


def test_other_tasks_start_as_in_flower(warm, started):
    warm.launch(ExecutionSpec(**{**vars(SPEC), "task_type": TaskType.SERVER_APP}))
    assert started[0][0] == "flwr-serverapp"


def test_without_its_template_every_message_starts_a_process_as_in_flower(warm, template, started):
    template.kill()
    template.wait(30)
    for _ in range(2):
        assert warm.launch(SPEC).status == "accepted"
    assert [command[0] for command in started] == ["flwr-clientapp"] * 2


@pytest.mark.parametrize(
    ("end", "how"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed by signal 9"),
        (lambda: os._exit(1), "exit code 1"),
    ],
)
def test_the_supernode_is_told_at_once_of_a_client_app_that_dies(monkeypatch, end, how):
    monkeypatch.setattr(executor, "LIBRARIES", ())
    monkeypatch.setattr(executor, "flwr_clientapp", end)
    with runtime_api() as (address, outputs):
        made = WarmExecutor(fork_template())
        made.launch(ExecutionSpec(**{**vars(SPEC), "runtime_api_address": address}))
        deadline = time.monotonic() + 60
        while not outputs:
            assert time.monotonic() < deadline
            made.reconcile()  # as Flower's loop calls it
            time.sleep(0.02)
        made.close()
    assert outputs == [(SPEC.token, "failed", how)]


def test_the_supernode_is_told_nothing_of_a_client_app_that_ends_well(monkeypatch):
    monkeypatch.setattr(executor, "LIBRARIES", ())
    monkeypatch.setattr(executor, "flwr_clientapp", lambda: os._exit(int("bad" in sys.argv)))
    with runtime_api() as (address, outputs):
        made = WarmExecutor(fork_template())
        for token in ("good", "bad"):
            spec = {**vars(SPEC), "runtime_api_address": address, "token": token}
            made.launch(ExecutionSpec(**spec))
        deadline = time.monotonic() + 60
        while made._under_way:
            assert time.monotonic() < deadline
            made.reconcile()
            time.sleep(0.02)
        made.close()
    assert [token for token, *_ in outputs] == ["bad"]


def test_a_supernode_that_is_gone_is_no_error(caplog):
    executor.tell_of_death(SPEC, -9)  # nothing listens on port 1
    assert "killed by signal 9), and the SuperNode was not told" in caplog.text


def test_the_template_ends_with_its_executor(warm, template):
    warm.close()
    template.wait(30)


def test_a_library_that_is_missing_leaves_the_others_warm(tmp_path, monkeypatch, started):
    monkeypatch.setattr(executor, "LIBRARIES", ("no_such_library", LIBRARY))
    monkeypatch.setattr(
        executor, "flwr_clientapp", lambda: (tmp_path / "1.json").write_text('"ran"')
    )
    made = WarmExecutor(fork_template())
    made.launch(SPEC)
    assert reports(tmp_path, 1) == {1: "ran"}
    made.close()


def test_flower_still_chooses_its_executor_where_ours_is_put_in_its_place():
    loop = inspect.getsource(run_superexec.run_superexec)
    assert "executor = get_executor(" in loop and "executor.reconcile()" in loop
