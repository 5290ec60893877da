"""A ServerApp or a ClientApp in a process of its own, whose app is there whole or not at all.

    python -m fleet.deploy.app_process COMMAND ARGUMENTS    # of flwr-serverapp, flwr-clientapp

Flower's own commands, with `installed_app` in the place of its way to install.
"""

import subprocess
import sys
from importlib import import_module, invalidate_caches
from typing import Any

from fleet.deploy.flower_process import own_command
from fleet.deploy.installed_app import install_whole

CLIENT_APP, SERVER_APP = "flwr-clientapp", "flwr-serverapp"
# Flower sends these with the app: a run's own must not be hidden by those installed.
OURS = ("clients", "fleet", "simulations", "strategies")
# Command → the module that installs its app, and the one that its function lies in.
_MODULES = {
    CLIENT_APP: ("flwr.supernode.runtime.run_clientapp", "flwr.supernode.cli.flwr_clientapp"),
    SERVER_APP: ("flwr.superlink.runtime.run_serverapp", "flwr.superlink.cli.flwr_serverapp"),
}


def install_apps_whole(command: str) -> None:
    """Let a command of Flower's, run in this process, install its app by `install_whole`.

    Raises:
        RuntimeError: if the Flower that is installed does not do it where 1.41 does.
    """
    runtime = import_module(_MODULES[command][0])
    if not hasattr(runtime, "install_from_fab"):
        raise RuntimeError(f"{runtime.__name__} of this Flower installs no app; install flwr 1.41")
    runtime.install_from_fab = install_whole


def forget_ours() -> None:
    """Let whatever of ours is imported from now on be the app's own."""
    for name in list(sys.modules):
        if name.partition(".")[0] in OURS:
            del sys.modules[name]
    invalidate_caches()


def start_here() -> None:
    """Let Flower's SuperExec, run in this process, start apps by this module."""
    from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor

    SubprocessExecutor.launch = _launch


def task_arguments(spec: Any) -> list[str]:
    """What Flower's own executor gives an app on its command line.

    Args:
        spec: of the task, an ExecutionSpec.
    """
    from flwr.supercore.constant import TASK_TYPE_TO_APPIO_API_ADDRESS_ARG

    arguments = [
        TASK_TYPE_TO_APPIO_API_ADDRESS_ARG[spec.task_type],
        spec.runtime_api_address,
        "--token",
        spec.token,
    ]
    if spec.insecure:
        arguments.append("--insecure")
    elif spec.root_certificates_path is not None:
        arguments += ["--root-certificates", spec.root_certificates_path]
    if spec.parent_pid is not None:
        arguments += ["--parent-pid", str(spec.parent_pid)]
    if spec.runtime_dependency_install:
        arguments.append("--allow-runtime-dependency-installation")
    return arguments


def _launch(executor: Any, spec: Any) -> Any:
    """As `SubprocessExecutor.launch`."""
    from flwr.supercore.constant import TASK_TYPE_TO_COMMAND
    from flwr.supercore.superexec.executor import LaunchResult

    command = TASK_TYPE_TO_COMMAND[spec.task_type]
    words = [command] if command not in _MODULES else own_command(__spec__.name, command)
    output = subprocess.DEVNULL if spec.suppress_output else None
    subprocess.Popen([*words, *task_arguments(spec)], stdout=output, stderr=output)
    return LaunchResult.accepted()


def main() -> None:
    """Be the command that is named, until it ends."""
    command, *arguments = sys.argv[1:]
    install_apps_whole(command)
    forget_ours()
    sys.argv = [command, *arguments]
    getattr(import_module(_MODULES[command][1]), command.replace("-", "_"))()


if __name__ == "__main__":
    main()
