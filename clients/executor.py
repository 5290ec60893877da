"""Flower's SuperExec with warm ClientApps: a device imports PyTorch once, not for every message.

    python -m clients.executor …the arguments of flower-superexec…

Flower starts a fresh Python for each message. What such a process imports before it can
train takes seconds on a desktop, and most of a round on a Raspberry Pi. So one process
imports the libraries, and nothing else, and forks: every message still has a process of
its own, from the same clean state, with the code that Flower sent for its run.

It knows as one of them dies, too. Flower's SuperNode takes that from heartbeats that stay
away, 40 to 60 s later; here it is told at once, and takes the next message.
"""

import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

import httpx
from flwr.common.constant import SubStatus
from flwr.common.logger import log
from flwr.proto.runtime_pb2 import PushTaskOutputRequest
from flwr.supercore.cli.flower_superexec import flower_superexec
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.superexec import run_superexec
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult
from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor
from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

from fleet.deploy.app_process import (
    CLIENT_APP,
    forget_ours,
    install_apps_whole,
    start_here,
    task_arguments,
)
from fleet.heap import trim

# What a ClientApp imports, directly or as it trains.
LIBRARIES = ("clients.client_app", "timm", "torchvision")

# Where memory runs out, training ends, not what would report it.
_OOM_SCORE = "500"
_MESSAGE = 64 * 1024  # bytes; one request's arguments


class WarmExecutor(SubprocessExecutor):
    """Starts ClientApps as forks of a process that has imported what they need.

    Anything else, and everything once that process is gone, starts by itself.

    Args:
        template: where requests for a fork go, `fork_template`.
    """

    def __init__(self, template: socket.socket) -> None:
        self._template: socket.socket | None = template
        self._under_way: dict[str, ExecutionSpec] = {}  # by token

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Start the process of a task."""
        if spec.task_type == TaskType.CLIENT_APP and self._template is not None:
            try:
                request = {"token": spec.token, "arguments": task_arguments(spec)}
                self._template.sendall(json.dumps(request).encode())
                self._under_way[spec.token] = spec
                return LaunchResult.accepted()
            except OSError as error:
                log(WARNING, "no warm ClientApp (%s); messages start a process each", error)
                self.close()
        return super().launch(spec)

    def reconcile(self) -> None:
        """Tell the SuperNode which ClientApps have died; called between two looks for a task."""
        while self._template is not None:
            try:
                ended = self._template.recv(_MESSAGE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                ended = b""
            if not ended:  # the template has: `launch` will find out
                return
            told = json.loads(ended)
            spec = self._under_way.pop(told["token"], None)
            if spec is not None and told["code"]:
                tell_of_death(spec, told["code"])

    def close(self) -> None:
        """Let the template end; ClientApps that run go on."""
        if self._template is not None:
            self._template.close()
            self._template = None


def tell_of_death(spec: ExecutionSpec, code: int) -> None:
    """Tell the SuperNode that a task has failed; one that said so itself is over there already.

    Args:
        spec: of the task.
        code: that its process ended with; negative: the signal that killed it.
    """
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    certificates = spec.root_certificates_path
    client = RuntimeHttpClient.from_server_address(
        spec.runtime_api_address,
        spec.insecure,
        Path(certificates).read_bytes() if certificates else None,
        [
            RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"),
            RuntimeTokenHttpInterceptor(spec.token),
        ],
    )
    try:
        client.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.FAILED, details=how))
        log(WARNING, "a ClientApp has died: %s", how)
    except httpx.HTTPStatusError:  # its token is spent
        pass
    except httpx.HTTPError as error:
        log(WARNING, "a ClientApp has died (%s), and the SuperNode was not told: %s", how, error)
    finally:
        client.close()


def fork_template() -> socket.socket:
    """Fork the process that ClientApps are forked from.

    It ends once the socket is closed, by this process or by its end.

    Returns:
        Takes a message for each ClientApp, a JSON object of its token and arguments, and
        gives one back as it ends, of token and exit code.
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
    install_apps_whole(CLIENT_APP)
    start_here()
    template = fork_template()
    # The one place where Flower chooses an executor.
    run_superexec.get_executor = lambda *args, **kwargs: WarmExecutor(template)
    flower_superexec()


def _serve(requests: socket.socket) -> None:
    """Import the libraries, fork a ClientApp for each request, and tell as it ends."""
    # Ctrl-C reaches the whole group: the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _import_libraries()
    # Shared pages stay so: a collection would write to the headers of all objects.
    gc.collect()
    trim()
    gc.freeze()
    log(INFO, "ClientApps start warm")
    children_end, noted = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(noted)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)  # else nothing is noted
    tokens: dict[int, str] = {}  # process id → of its task
    while True:
        readable, _, _ = select.select([requests, children_end], [], [])
        if children_end in readable:
            os.read(children_end, _MESSAGE)
            _tell_of_ended(tokens, requests)
        if requests in readable:
            request = requests.recv(_MESSAGE)
            if not request:
                return
            asked = json.loads(request)
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                for each in (children_end, noted):
                    os.close(each)
                requests.close()
                _run(asked["arguments"])
            tokens[pid] = asked["token"]


def _tell_of_ended(tokens: dict[int, str], requests: socket.socket) -> None:
    with suppress(ChildProcessError):  # there are none
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            pid, status = ended
            told = {"token": tokens.pop(pid, ""), "code": os.waitstatus_to_exitcode(status)}
            with suppress(OSError):  # the executor has ended
                requests.sendall(json.dumps(told).encode())


def _import_libraries() -> None:
    from fleet.without_compiler import compiler_aside  # brings PyTorch: for the template alone

    with compiler_aside():
        for name in LIBRARIES:
            try:
                importlib.import_module(name)
            except ImportError as error:  # the ClientApp will say so to whom it concerns
                log(WARNING, "%s cannot be imported beforehand: %s", name, error)
    forget_ours()


def _run(arguments: Sequence[str]) -> None:
    """Be a ClientApp, and end."""
    code: Any = 1
    try:
        for number in (signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with suppress(OSError):  # not Linux
            Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)
        sys.argv = [CLIENT_APP, *arguments]
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


if __name__ == "__main__":
    main()
