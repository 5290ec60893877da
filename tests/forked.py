"""A fork of the tests' process, which has imported all, used as `subprocess.Popen` is."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import termios
import time
import traceback
from collections.abc import Callable, Iterator
from typing import IO

import pexpect.fdpexpect
import psutil


class Forked:
    """A process that runs a function, whose standard input and output are text of its parent's.

    Args:
        function: what it runs; SystemExit ends it with that code, another exception is told on
            standard error and ends it with code 1.
        errors: where its standard error goes.
    """

    def __init__(self, function: Callable[[], None], errors: IO) -> None:
        own_input, self.stdin = _pipe()
        self.stdout, own_output = _pipe()
        self.pid = os.fork()
        if not self.pid:
            _work(function, own_input.fileno(), own_output.fileno(), errors.fileno())
        own_input.close()
        own_output.close()
        self._code: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, or the number of the signal that ended it, below 0."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG if deadline else 0)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
                self.stdout.close()
            elif time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a fork", timeout)
            else:
                time.sleep(0.01)
        return self._code

    def poll(self) -> int | None:
        """As `wait`; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self._code

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def send_signal(self, number: int) -> None:
        if self._code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


@contextlib.contextmanager
def on_terminal(
    function: Callable[[], None], dimensions: tuple[int, int] = (24, 80)
) -> Iterator[tuple[int, pexpect.fdpexpect.fdspawn]]:
    """A fork that runs a function on a terminal of its own, and ends with the block.

    Args:
        function: as `Forked`'s.
        dimensions: rows and columns.

    Yields:
        Its process id, for `exit_code`, and what is at the other end of its terminal.
    """
    pid, handle = pty.fork()
    if not pid:
        code = 1
        try:
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            standard_files()
            termios.tcsetwinsize(0, dimensions)
            os.environ["TERM"] = "xterm"
            os.environ.pop("NO_COLOR", None)
            function()
            code = 0
        except SystemExit as ended:
            code = _code_of(ended)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    terminal = pexpect.fdpexpect.fdspawn(handle, encoding="utf-8", timeout=600)
    try:
        yield pid, terminal
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):  # the test has seen its end
            parent = psutil.Process(pid)
            for process in (*parent.children(recursive=True), parent):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            os.waitpid(pid, 0)
        with contextlib.suppress(OSError):
            os.close(handle)


def exit_code(pid: int) -> int:
    """Of a child, once it has ended; the number of the signal that ended it, below 0."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def standard_files() -> None:
    """Let Python's be those of this process, a fork, whatever the tests have put in their place."""
    sys.stdin, sys.stdout = open(0), open(1, "w", buffering=1)  # noqa: SIM115 - till the end
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1)  # noqa: SIM115


def _code_of(ended: SystemExit) -> int:
    """As Python's own end has it: a text is an error."""
    return ended.code if isinstance(ended.code, int) else int(ended.code is not None)


def _pipe() -> tuple[IO, IO]:
    read, write = os.pipe()
    return os.fdopen(read), os.fdopen(write, "w")


def _work(function: Callable[[], None], *standard: int) -> None:
    """The child; it never returns."""
    code = 1
    try:
        os.setsid()
        for number, handle in enumerate(standard):
            os.dup2(handle, number)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # no end of a pipe may stay open here
        signal.signal(signal.SIGINT, signal.default_int_handler)
        standard_files()
        function()
        code = 0
    except SystemExit as ended:
        code = _code_of(ended)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)
