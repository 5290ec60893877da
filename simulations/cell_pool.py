"""Processes that run the cells of a comparison, each kept for many."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simulations.cells import Cell

OnRound = Callable[[Cell, int, float | None], None]  # cell, round, its accuracy if it has one

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from simulations.cell_worker import main; main()"
)
_GOODBYE_SECONDS = 15.0
_TAIL = 4000  # bytes of what a process said last


@dataclass(frozen=True)
class Ended:
    """How a cell ended.

    Attributes:
        cell: which.
        measured: beside its record; None if it failed.
        reason: why it failed, in a line.
        details: the same at length.
    """

    cell: Cell
    measured: dict[str, Any] | None
    reason: str = ""
    details: str = ""


def run_cells(
    cells: Sequence[Cell],
    folder: Path,
    jobs: int,
    keep_models: bool,
    on_round: OnRound = lambda cell, number, accuracy: None,
) -> Iterator[Ended]:
    """Run cells, each as it comes up, and tell how each ended, in the order of ending.

    Args:
        folder: of the runs.
        jobs: processes at once.
        keep_models: leave every run its model and its page.
        on_round: is told a cell's round and accuracy, by another thread.
    """
    waiting, ended = deque(cells), queue.SimpleQueue()
    processes = [_Process(folder, keep_models) for _ in range(min(jobs, len(cells)))]

    def work(process: _Process) -> None:
        while True:
            try:
                cell = waiting.popleft()
            except IndexError:
                return
            try:
                ended.put(process.run(cell, on_round))
            except Exception as error:
                ended.put(error)
                return

    threads = [threading.Thread(target=work, args=(p,), daemon=True) for p in processes]
    try:
        for thread in threads:
            thread.start()
        for _ in cells:
            one = ended.get()
            if isinstance(one, Exception):  # as of a disk that is full
                raise one
            yield one
    finally:
        waiting.clear()
        for process in processes:
            process.dismiss()
        for process in processes:
            process.end()


class _Process:
    """A worker; started when it is first needed, and again after a crash."""

    def __init__(self, folder: Path, keep_models: bool) -> None:
        self._task = {"folder": str(folder), "keep_models": keep_models}
        self._process: subprocess.Popen | None = None
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `end`
        self._dismissed = False

    def run(self, cell: Cell, on_round: OnRound) -> Ended:
        """Run one cell to its end."""
        if self._process is None:
            self._start()
        variant = cell.variant
        task = self._task | {
            "key": cell.key,
            "settings": {**variant.settings, "seed": cell.seed, "state-dir": "", "resume": False},
            "engine": variant.engine,
            "workers": variant.workers,
            "adversity": dict(variant.adversity),
        }
        with contextlib.suppress(OSError):  # it has ended: there will be no answer
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            answer = json.loads(line)
            event = answer.pop("event")
            if event == "round":
                on_round(cell, answer["round"], answer["accuracy"])
            elif event == "done":
                return Ended(cell, answer["measured"])
            else:
                return Ended(cell, None, answer["reason"], answer["details"])
        return self._crashed(cell)

    def dismiss(self) -> None:
        """Nothing more will be asked; what is under way ends."""
        self._dismissed = True
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def end(self) -> None:
        """Wait until it is gone."""
        if self._process is not None:
            try:
                self._process.wait(_GOODBYE_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._said.close()

    def _start(self) -> None:
        self._said.seek(0)
        self._said.truncate()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            # Cells side by side would have threads wait for one another.
            env={"OMP_NUM_THREADS": "1"} | os.environ,
            start_new_session=True,  # Ctrl-C is for this process, which tells it
        )

    def _crashed(self, cell: Cell) -> Ended:
        code = self._process.wait()
        self._process.stdin.close()
        self._process = None
        if code < 0:
            how = f"its process was ended by {signal.Signals(-code).name}"
            how += "; was memory short?" if code == -signal.SIGKILL else ""
        else:
            how = f"its process ended with code {code}"
        self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, self._said.tell() - _TAIL))
        return Ended(cell, None, how, self._said.read().decode(errors="replace"))
