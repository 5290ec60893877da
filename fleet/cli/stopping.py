"""Ctrl-C, SIGTERM and a closed terminal end a run with its record written; twice, and at once."""

import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import click
import psutil

from fleet.records import RunRecord
from fleet.signals import ENDING

_HANG_UP = getattr(signal, "SIGHUP", None)  # Windows has none
_ONE_SECONDS = 0.2  # GNU timeout signals a process, and then its group; a hand is slower


class Stopped(KeyboardInterrupt):
    """A signal has asked the command to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def stopping(record: RunRecord, again: str) -> Iterator[None]:
    """End a stopped command with the shell's code for its signal, and say what is left of the run.

    Args:
        record: of the run that goes on inside.
        again: options that the run's config.toml does not hold, for the command that
            goes on with it.
    """
    with signals_stop():
        try:
            yield
        except KeyboardInterrupt as stopped:
            click.echo(_what_is_left(record, again), err=True)
            raise click.exceptions.Exit(exit_code(stopped)) from None


def exit_code(stopped: KeyboardInterrupt) -> int:
    """The shell's code for the signal that stopped a command."""
    return 128 + getattr(stopped, "number", signal.SIGINT)


def _what_is_left(record: RunRecord, again: str) -> str:
    if not record.config_path.is_file():
        return f"stopped; nothing was written to {record.path} yet"
    rounds = list(record.rounds())
    run = shlex.quote(str(record.path))
    if not rounds:
        what = f"stopped before the first round; settings are in {record.path}"
    else:
        what = (
            f"stopped after round {rounds[-1].server_round}; its model and all rounds until then "
            f"are in {record.path}\nlook at them:  fleet report {run}"
        )
    return f"{what}\ngo on with it:  fleet simulate --resume {run}{again}"


@contextlib.contextmanager
def signals_stop() -> Iterator[None]:
    """Raise `Stopped` at the first signal; end this process and all its children at the next.

    What comes within `_ONE_SECONDS` of the first is the same wish.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    children: list[psutil.Process] = []
    first = 0.0  # when it came
    terminals = [number for number in (1, 2) if os.isatty(number)]

    def stop(number: int, frame: Any) -> None:
        nonlocal first
        first = time.monotonic()
        for each in before:
            signal.signal(each, end_at_once)
        if number == _HANG_UP:
            _silence(terminals)
        # Now: what is ended first leaves its own children to nobody.
        children.extend(_children())
        raise Stopped(number)

    def end_at_once(number: int, frame: Any) -> None:
        if time.monotonic() - first < _ONE_SECONDS:
            if number == _HANG_UP:
                _silence(terminals)
            return
        for child in {*children, *_children()}:
            with contextlib.suppress(psutil.Error):  # kills no stranger with the same number
                child.kill()
        if sys.__stderr__ is not None and sys.__stderr__.isatty():
            os.write(2, b"\x1b[?25h\n")  # progress had hidden the cursor
        os._exit(128 + number)

    # What is ignored stays so: a shell's background job does not hear the terminal's Ctrl-C.
    before = {number: signal.getsignal(number) for number in ENDING}
    before = {n: handler for n, handler in before.items() if handler not in (None, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _silence(terminals: Sequence[int]) -> None:
    """Send what is still written to a terminal that is gone nowhere: it would raise."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in terminals:
        os.dup2(nowhere, number)
    os.close(nowhere)


def _children() -> list[psutil.Process]:
    try:
        return psutil.Process().children(recursive=True)
    except psutil.Error:
        return []
