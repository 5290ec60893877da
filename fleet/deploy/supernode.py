"""The SuperNode, made to end where Flower's would go on without effect.

    python -m fleet.deploy.supernode ARGUMENTS    # those of flower-supernode

In Flower 1.41 three faults leave a process that looks alive and takes no part any
more: its heartbeat's thread dies of an answer it did not expect (500); its main
loop ends on such an answer, while its local server keeps the process; the SuperExec
that it started dies, and every task waits for ever. Each of them ends this process
with `HALF_DEAD`, and whoever supervises it starts it again.

A fourth one leaves it a step behind for good. The main loop takes a message, waits for
a reply, and sends what there is. If a run ends while its message is being fetched, the
loop does not wait for that reply; from then on it sends each time the reply to the
message before, and the server waits in vain for the last one. So here the loop also
sends when it has found no message and a reply lies there.
"""

import logging
import os
import signal
import sys
import threading
import time
from typing import Any

import psutil

from fleet.deploy.flower_process import end_with_parent

HALF_DEAD = 70  # EX_SOFTWARE of sysexits.h

_WATCH_SECONDS = 2.0
_LATE = 0  # in place of a run's number
_GRACE_SECONDS = 8.0  # Flower tells the server goodbye, and forces its own end after 5 s

_log = logging.getLogger("flwr")
_half_dead = threading.Event()


def main() -> None:
    """Run the SuperNode until it is told to end, is half dead, or its parent is gone."""
    end_with_parent()
    threading.excepthook = _end_for_thread
    threading.Thread(target=_watch_superexec, name="superexec-watch", daemon=True).start()
    sys.argv[0] = "flower-supernode"
    from flwr.supernode import start_client_internal
    from flwr.supernode.cli import flower_supernode

    send_late_replies(start_client_internal)
    try:
        flower_supernode()
        _log.error("the SuperNode's main loop has ended, see above")
        _half_dead.set()
    finally:
        if _half_dead.is_set():
            os._exit(HALF_DEAD)  # its server's thread would keep the process


def send_late_replies(loop: Any) -> None:
    """Let Flower's main loop send whatever reply is there, message or no message.

    Args:
        loop: the module `flwr.supernode.start_client_internal`.
    """
    pull = loop._pull_and_store_message

    def pull_or_send(state: Any, **others: Any) -> int | None:
        run_id = pull(state=state, **others)
        # The loop goes on to send for any number; nothing else depends on which.
        return _LATE if run_id is None and has_unsent_reply(state) else run_id

    loop._pull_and_store_message = pull_or_send


def has_unsent_reply(state: Any) -> bool:
    """Whether a reply lies in a SuperNode's store; unlike Flower's question, it takes none out."""
    with state.lock_msg_store:
        return any(
            entry.message.metadata.reply_to_message_id and not entry.is_retrieved
            for entry in state.msg_store.values()
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
