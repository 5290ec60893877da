import subprocess
import sys
from importlib import import_module, metadata
from pathlib import Path

import pytest
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult
from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor

from fleet.deploy import app_process
from fleet.deploy.app_process import CLIENT_APP, SERVER_APP, install_apps_whole, start_here
from fleet.deploy.installed_app import install_whole


@pytest.fixture
def started(monkeypatch) -> list[tuple[list[str], dict]]:
    """Commands that were started, and how."""
    commands: list[tuple[list[str], dict]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda args, **how: commands.append((args, how)))
    return commands


@pytest.fixture
def flowers(started, monkeypatch):
    """What Flower's own executor starts, then let ours start apps."""
    launch = SubprocessExecutor.launch
    monkeypatch.setattr(SubprocessExecutor, "launch", launch)  # undone afterwards

    def words(spec: ExecutionSpec) -> list[str]:
        launch(SubprocessExecutor(), spec)
        return started.pop()[0]

    return words


def spec(task_type: str, **others) -> ExecutionSpec:
    settings = {
        "runtime_api_address": "127.0.0.1:1",
        "token": "a token",
        "insecure": True,
        "root_certificates_path": None,
        "runtime_dependency_install": False,
        "parent_pid": None,
        "suppress_output": False,
        "task_id": 1,
        "fab_hash": None,
    }
    return ExecutionSpec(task_type=task_type, **settings | others)


@pytest.mark.parametrize(
    "task_type", [TaskType.SERVER_APP, TaskType.CLIENT_APP, TaskType.AGENT_APP]
)
@pytest.mark.parametrize(
    "others",
    [
        {},
        {"insecure": False, "root_certificates_path": "ca.crt", "parent_pid": 7},
        {"runtime_dependency_install": True, "suppress_output": True},
    ],
)
def test_what_is_started_is_flowers_command_by_another_door(flowers, started, task_type, others):
    expected = flowers(spec(task_type, **others))
    start_here()
    assert SubprocessExecutor().launch(spec(task_type, **others)) == LaunchResult.accepted()
    ((words, how),) = started
    assert words[-len(expected) :] == expected
    ours = task_type != TaskType.AGENT_APP
    assert (words[: -len(expected)] == [sys.executable, "-P", "-m", app_process.__name__]) == ours
    assert (how["stdout"] == subprocess.DEVNULL) == others.get("suppress_output", False)


@pytest.mark.parametrize("command", [CLIENT_APP, SERVER_APP])
def test_the_process_is_flowers_command(command, monkeypatch, capsys):
    words = [sys.executable, "-P", "-m", app_process.__name__, command, "--help"]
    ours = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    (flowers,) = metadata.entry_points(group="console_scripts", name=command)
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    with pytest.raises(SystemExit):
        flowers.load()()
    assert ours == capsys.readouterr().out


@pytest.mark.parametrize("command", [CLIENT_APP, SERVER_APP])
def test_its_app_is_installed_whole(command, monkeypatch):
    runtime = import_module(app_process._MODULES[command][0])
    monkeypatch.setattr(runtime, "install_from_fab", runtime.install_from_fab)
    install_apps_whole(command)
    assert runtime.install_from_fab is install_whole
    assert "install_from_fab(fab.content, skip_prompt=True)" in Path(runtime.__file__).read_text()


def test_a_flower_that_installs_elsewhere_is_refused(monkeypatch):
    runtime = import_module(app_process._MODULES[SERVER_APP][0])
    monkeypatch.delattr(runtime, "install_from_fab")
    with pytest.raises(
        RuntimeError, match=r"run_serverapp of this Flower installs no app; install flwr 1.41"
    ):
        install_apps_whole(SERVER_APP)


def test_the_apps_own_packages_are_not_hidden_by_those_installed(tmp_path):
    """As its process begins, nothing of ours is imported that the app brings too."""
    (tmp_path / "fleet").mkdir()
    (tmp_path / "fleet" / "__init__.py").write_text("mine = True\n")
    code = (
        "import sys; from fleet.deploy.app_process import forget_ours, install_apps_whole; "
        f"install_apps_whole({SERVER_APP!r}); forget_ours(); "
        f"sys.path.insert(0, {str(tmp_path)!r}); import fleet; print(fleet.mine)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "True"
