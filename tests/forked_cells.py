"""A worker of a comparison's cells that is a fork of the tests' process, which has imported all."""

import contextlib
import os
import signal
import time

from simulations import cell_pool, cell_worker


class ForkedWorker:
    """What `subprocess.Popen` is to a pool: a process that reads tasks and answers in lines.

    Args:
        said: where its standard error goes.
    """

    def __init__(self, said):
        tasks, self.stdin = _pipe()
        self.stdout, answers = _pipe()
        self.pid = os.fork()
        if not self.pid:
            _work(tasks.fileno(), answers.fileno(), said.fileno())
        tasks.close()
        answers.close()
        self._code = None

    def wait(self, timeout=None):
        """Its exit code, or the number of the signal that ended it below 0."""
        deadline = time.monotonic() + (timeout or 600)
        while self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
                self.stdout.close()
            elif time.monotonic() > deadline:
                raise cell_pool.subprocess.TimeoutExpired("a worker", timeout)
            else:
                time.sleep(0.01)
        return self._code

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def start(process):
    """In place of the pool's own `_start`, which starts a fresh Python."""
    process._process = ForkedWorker(process._said)


def _pipe():
    ours, theirs = os.pipe()
    return os.fdopen(ours), os.fdopen(theirs, "w")


def _work(tasks, answers, said):
    """The child: never returns."""
    code = 1
    try:
        os.setsid()
        for number, handle in enumerate((tasks, answers, said)):
            os.dup2(handle, number)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # no end of a pipe may stay open here
        signal.signal(signal.SIGINT, signal.default_int_handler)
        cell_worker.main()
        code = 0
    finally:
        os._exit(code)
