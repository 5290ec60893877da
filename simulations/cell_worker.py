"""A process that runs cells of a comparison one after the other: a crash ends it, not the sweep.

It reads a JSON object a line from standard input (`key`, `folder`, `settings`,
`engine`, `workers`, `adversity`, `keep_models`) and answers in lines of JSON on standard
output: `round` with the accuracy, then `done` with what was measured, or
`failed` with the reason. At the end of its input, be it that its parent was
killed, it ends.
"""

import contextlib
import gc
import json
import os
import queue
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

from fleet.config import read_config
from fleet.durable import is_full, without_waiting
from fleet.errors import FleetError
from fleet.records import RoundReport
from fleet.report import without_pages
from fleet.signals import signals_held
from simulations.cells import CellFolders
from simulations.device_flops import device_flops
from simulations.launch import simulate

_GOODBYE_SECONDS = 10.0  # for Flower's own processes to be ended


def main() -> None:
    """Run what is asked for until nothing more will come."""
    # Ignored, as a shell's background job inherits it, it would not end what is under way.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    asked = os.fdopen(os.dup(0))
    # A run's workers are forks, which close their standard input: not while a thread reads it.
    sys.stdin = open(os.devnull)  # noqa: SIM115 - as long as the process
    tasks: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(asked, tasks), daemon=True).start()
    try:
        while (task := tasks.get()) is not None:
            _answer(task, answers)
            if not gc.get_freeze_count():
                # What the first has imported stays: to look through that takes as long as a small
                # run, and each further one would, before its first client. Python drops what a
                # signal raises in a finalizer, and the run that follows would not be ended.
                with signals_held():
                    gc.collect()
                    gc.freeze()
    except KeyboardInterrupt:
        os._exit(130)  # what was under way is cleared; nobody waits for an answer


def _listen(asked: TextIO, tasks: "queue.SimpleQueue[dict[str, Any] | None]") -> None:
    for line in asked:
        tasks.put(json.loads(line))
    tasks.put(None)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(_GOODBYE_SECONDS)
    os._exit(1)


def _answer(task: dict[str, Any], answers: TextIO) -> None:
    folders, key = CellFolders(Path(task["folder"])), task["key"]

    def say(event: str, **facts: Any) -> None:
        answers.write(json.dumps({"event": event} | facts) + "\n")

    def on_round(report: RoundReport) -> None:
        say("round", round=report.server_round, accuracy=report.accuracy)

    try:
        with (
            # Whoever compares frees space and runs the command again: no run is repeated.
            without_waiting(),
            contextlib.nullcontext() if task["keep_models"] else without_pages(),
        ):
            record = simulate(
                task["settings"] | {"run-dir": str(folders.part(key))},
                task["engine"],
                on_round,
                workers=task["workers"],
                **task["adversity"],
            )
        measured = {"device_flops": _flops(task["settings"], list(record.rounds()))}
        if not task["keep_models"]:
            record.model_path.unlink(missing_ok=True)
        shutil.rmtree(record.checkpoints_path, ignore_errors=True)  # it has ended well
        folders.finish(key, measured)
        event, facts = "done", {"measured": measured}
    except Exception as error:
        event, facts = "failed", {"reason": _reason(error), "details": traceback.format_exc()}
    finally:
        with signals_held():
            shutil.rmtree(folders.part(key), ignore_errors=True)
    say(event, **facts)  # then this process may be told to end


def _reason(error: Exception) -> str:
    """Why a cell failed, in a line, with the way out of a comparison."""
    reason = str(error) if isinstance(error, FleetError) else f"{type(error).__name__}: {error}"
    if is_full(error):  # a run's own way out is to go on with it, and no cell goes on
        what, _, _ = reason.partition("; ")
        reason = f"{what}; free space there, then run the same command again"
    return reason


def _flops(settings: dict[str, Any], rounds: list[RoundReport]) -> float:
    # Of all seeds the same: one count does for them.
    return device_flops(read_config(settings | {"seed": 0, "run-dir": "", "state-dir": ""}), rounds)
