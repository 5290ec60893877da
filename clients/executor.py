"""Flower's SuperExec with warm ClientApps: a device imports PyTorch once, not for every message.

    python -m clients.executor …the arguments of flower-superexec…

Flower starts a fresh Python for each message. What such a process imports before it can
train takes seconds on a desktop, and most of a round on a Raspberry Pi. So one process
imports the libraries, and nothing else, and forks: every message still has a process of
its own, from the same clean state, with the code that Flower sent for its run.
"""

import gc
import importlib
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

from flwr.common.logger import log
from flwr.supercore.cli.flower_superexec import flower_superexec
from flwr.supercore.constant import TASK_TYPE_TO_APPIO_API_ADDRESS_ARG, TaskType
from flwr.supercore.superexec import run_superexec
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult
from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor
from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

from fleet.heap import trim

# What a ClientApp imports, directly or as it trains.
LIBRARIES = ("clients.client_app", "timm", "torchvision")
# Flower sends these with the app: a run's own must not be hidden by those installed.
OURS = ("clients", "fleet", "simulations", "strategies")

# Where memory runs out, training ends, not what would report it.
_OOM_SCORE = "500"
_MESSAGE = 64 * 1024  # bytes; one request's arguments


class WarmExecutor(SubprocessExecutor):
    """Starts ClientApps as forks of a process that has imported what they need.

    Anything else, and everything once that process is gone, starts as Flower's own
    executor starts it.

    Args:
        template: where requests for a fork go, `fork_template`.
    """

    def __init__(self, template: socket.socket) -> None:
        self._template: socket.socket | None = template

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Start the process of a task."""
        if spec.task_type == TaskType.CLIENT_APP and self._template is not None:
            try:
                self._template.sendall(json.dumps(_arguments(spec)).encode())
                return LaunchResult.accepted()
            except OSError as error:
                log(WARNING, "no warm ClientApp (%s); messages start a process each", error)
                self.close()
        return super().launch(spec)

    def close(self) -> None:
        """Let the template end; ClientApps that run go on."""
        if self._template is not None:
            self._template.close()
            self._template = None


def fork_template() -> socket.socket:
    """Fork the process that ClientApps are forked from.

    It ends once the socket is closed, by this process or by its end.

    Returns:
        Takes a message for each ClientApp: its arguments, a JSON list.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork():
        theirs.close()
        return ours
    ours.close()
    try:
        _serve(theirs)
    except BaseException:  # this is a fork: nothing of its parent's may run
        traceback.print_exc()
    finally:
        os._exit(0)


def main() -> None:
    """Run the SuperExec."""
    template = fork_template()
    # The one place where Flower chooses an executor.
    run_superexec.get_executor = lambda *args, **kwargs: WarmExecutor(template)
    flower_superexec()


def _serve(requests: socket.socket) -> None:
    """Import the libraries and fork a ClientApp for each request."""
    # Ctrl-C reaches the whole group: the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the ended
    _import_libraries()
    # Shared pages stay so: a collection would write to the headers of all objects.
    gc.collect()
    trim()
    gc.freeze()
    log(INFO, "ClientApps start warm")
    while request := requests.recv(_MESSAGE):
        if os.fork() == 0:
            requests.close()
            _run(json.loads(request))


def _import_libraries() -> None:
    from fleet.without_compiler import compiler_aside  # brings PyTorch: for the template alone

    with compiler_aside():
        for name in LIBRARIES:
            try:
                importlib.import_module(name)
            except ImportError as error:  # the ClientApp will say so to whom it concerns
                log(WARNING, "%s cannot be imported beforehand: %s", name, error)
    for name in list(sys.modules):
        if name.partition(".")[0] in OURS:
            del sys.modules[name]
    importlib.invalidate_caches()


def _run(arguments: Sequence[str]) -> None:
    """Be a ClientApp, and end."""
    code: Any = 1
    try:
        for number in (signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with suppress(OSError):  # not Linux
            Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)
        sys.argv = ["flwr-clientapp", *arguments]
        flwr_clientapp()
        code = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def _arguments(spec: ExecutionSpec) -> list[str]:
    """As Flower's own executor gives them on the command line."""
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


if __name__ == "__main__":
    main()
