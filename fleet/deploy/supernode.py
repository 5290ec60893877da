"""The SuperNode, made to end where Flower's would go on without effect.

    python -m fleet.deploy.supernode [--cold] ARGUMENTS    # those of flower-supernode

In Flower 1.41 three faults leave a process that looks alive and takes no part any
more: its heartbeat's thread dies of an answer it did not expect (500); its main
loop ends on such an answer, while its local server keeps the process; the SuperExec
that it started dies, and every task waits for ever. Each of them ends this process
with `HALF_DEAD`, and whoever supervises it starts it again.

ClientApps start warm (`clients.executor`), unless it is `--cold`: then each imports
PyTorch anew, which takes longer, and less memory between rounds.
"""

import argparse
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import psutil

from fleet.deploy.flower_process import end_with_parent, own_command
from fleet.deploy.supernode_link import improve
from fleet.heap import keep_little

HALF_DEAD = 70  # EX_SOFTWARE of sysexits.h

_WATCH_SECONDS = 2.0
_GRACE_SECONDS = 8.0  # Flower tells the server goodbye, and forces its own end after 5 s

_log = logging.getLogger("flwr")
_half_dead = threading.Event()


def main() -> None:
    """Run the SuperNode until it is told to end, is half dead, or its parent is gone."""
    end_with_parent()
    keep_little()  # it stays, and each message of a round passes through it
    threading.excepthook = _end_for_thread
    options, arguments = _read_arguments()
    superexec = "fleet.deploy.superexec" if options.cold else "clients.executor"
    _start(superexec, f"{options.host}:{options.port}")
    threading.Thread(target=_watch_superexec, name="superexec-watch", daemon=True).start()
    sys.argv = ["flower-supernode", *arguments]
    from flwr.supernode.cli import flower_supernode

    improve(give_up=_end)
    try:
        flower_supernode()
        _log.error("the SuperNode's main loop has ended, see above")
        _half_dead.set()
    finally:
        if _half_dead.is_set():
            os._exit(HALF_DEAD)  # its server's thread would keep the process


def _read_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Our own, and Flower's: the address that tasks find the SuperNode at is both's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", required=True)
    options, others = parser.parse_known_args()
    address = ("--host", options.host, "--port", options.port)
    return options, [*others, *address, "--isolation", "process"]


def _start(superexec: str, address: str) -> None:
    """It ends with this process, as the one that Flower would start."""
    subprocess.Popen(
        own_command(
            superexec,
            *("--runtime-api-address", address, "--insecure", "--parent-pid", os.getpid()),
        )
    )


def _end_for_thread(hook: threading.ExceptHookArgs) -> None:
    """A thread that dies takes the process with it."""
    if hook.exc_type is SystemExit:
        return
    name = hook.thread.name if hook.thread is not None else "a thread"
    _log.error("%s has died", name, exc_info=(hook.exc_type, hook.exc_value, hook.exc_traceback))
    _end()


def _watch_superexec() -> None:
    """The SuperExec is the one child of a SuperNode; tasks are children of the SuperExec."""
    process = psutil.Process()
    child: psutil.Process | None = None
    while child is None:
        time.sleep(_WATCH_SECONDS)
        child = next(iter(process.children()), None)
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        time.sleep(_WATCH_SECONDS)
    _log.error("the SuperExec has died")
    _end()


def _end() -> None:
    """Say goodbye to the server as on SIGTERM, so that it takes this node back at once."""
    _half_dead.set()
    threading.Timer(_GRACE_SECONDS, os._exit, [HALF_DEAD]).start()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
