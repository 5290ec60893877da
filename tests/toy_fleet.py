"""A whole fleet of toys: our strategy, record and checkpoints, and clients that only reckon.

Clients remember as real ones do; what they train is a function of state, round and name.
A run takes hundredths of a second, so it can be ended at every step of its writing.
"""

import os
import secrets
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from clients.feedback import encode_update
from clients.memory import ClientMemory
from clients.model import Model, _held, _keep_version
from clients.personal import keep_gradients, objective
from clients.round_memory import RoundMemory
from fleet.codec import decode, follow
from fleet.config import default_settings, read_config
from fleet.evaluation import Evaluation
from fleet.message import Enrolment, read_state, read_task, write_enrolment, write_update
from fleet.records import RunRecord
from strategies.algorithm import algorithm
from strategies.fleet_strategy import FleetStrategy
from strategies.resume import Keeper, standing
from strategies.sampling import Roster
from tests.plans import random_arrays, random_state, toy_plan

PLAN = toy_plan()
CLASSES = ("cat", "dog", "eel")
BLOCKS = {"pi-0": 0, "pi-1": 1, "pi-2": 2}
ROUNDS = 3
LOG = "asked.log"  # a line for every train message: round and client


class Fleet:
    """A fleet whose server can be ended and begun again in one folder.

    Args:
        scripted_grid: the fixture.
        settings: what differs from the defaults.
        choose: settings → algorithm, in place of the one that they name.
    """

    def __init__(self, scripted_grid, choose=algorithm, **settings):
        self._grid = scripted_grid
        self._choose = choose
        self._settings = {"rounds": ROUNDS, "round-timeout": 60, "server-learning-rate": 0.0}
        self._settings |= settings

    def config(self, folder, **changes):
        settings = self._settings | {"run-dir": str(folder)} | changes
        return read_config(default_settings() | settings)

    def run(self, folder, patience=0.0, clients=BLOCKS, on_round=lambda report: None, **changes):
        """A run, or what is left of one, with the parts that the ServerApp has; its strategy."""
        config = self.config(folder, **changes)
        kept = standing(config)
        open_record = RunRecord.reopen if config.resume else RunRecord.create
        record = open_record(config.run_dir, config.as_settings())
        facts = {
            "run": kept.run if kept else secrets.token_hex(8),
            "clients": len(BLOCKS),
            "classes": CLASSES,
            "plan_digest": PLAN.digest,
            "settings": config.as_settings(),
        }

        def save_model(state):
            tensors = {name: torch.tensor(array) for name, array in state.tensors.items()}
            record.save_model(tensors, {})

        keeper = Keeper(record, save_model, facts, patience)

        def end_round(report):
            keeper.end_round(strategy, report)
            on_round(report)

        answers = [_client(name, k, Path(folder), config) for name, k in clients.items()]
        grid = self._grid(dict(enumerate(answers, start=10)))
        strategy = FleetStrategy(
            random_state(PLAN, 99),
            CLASSES,
            Roster(grid, timeout=1),
            config.federation,
            0,
            self._choose(config.federation, 0, len(BLOCKS)),
            evaluate=lambda state: Evaluation(1, 0.5, 0.25),
            on_round=end_round,
            run=facts["run"],
        )
        if kept:
            strategy.restore(kept.strategy, kept.server_round)
            keeper.mend(strategy, kept)
        strategy.run(grid)
        keeper.finish()
        return strategy


def _client(name, blocks, folder, config):
    """Function of a message to a client's reply."""
    initial = random_state(PLAN, 99)
    own = Model(backbone=None, plan=PLAN, initial=initial, norms={})
    narrow, federation = PLAN.narrow(blocks), config.federation

    def answer(message):
        if message.metadata.message_type == "query":
            return write_enrolment(Enrolment(name, 10, CLASSES))
        task = read_task(message.content)
        with (folder / LOG).open("a") as log:
            log.write(f"{task.server_round} {name}\n")
        memory = RoundMemory(ClientMemory(folder / "clients", task.run, name), task.server_round)
        download = read_state(message.content, PLAN.digest)
        state = follow(download, PLAN, _held(memory, own))
        _keep_version(state, download.versions[-1], memory)
        received = state.narrow(narrow).tensors
        parameters = {n: a for n, a in received.items() if not PLAN.by_name[n].is_statistic}
        pull = objective(federation, parameters, PLAN, memory, task.acknowledged)
        seed = [task.server_round, *name.encode()]
        update = random_arrays(narrow, seed, scale=0.1)
        for n, array in parameters.items():
            target = pull.targets[n] if pull else 0
            update[n] = np.float32(update[n] - 0.1 * np.tanh(array - target))
        payload = encode_update(update, narrow, PLAN, federation.codec_up, seed, memory)
        if federation.objective == "feddyn":
            sent = {n: a for n, a in decode(payload, narrow).items() if n in parameters}
            keep_gradients(federation, sent, PLAN, memory, task)
        metrics = {"num-examples": 10 + blocks, "blocks": blocks, "loss": 1.0}
        return write_update(payload, metrics | {"peak-bytes": 1, "seconds": 0.5}, task.token)

    return answer


@contextmanager
def at_every_step(monkeypatch, folder, look):
    """Call `look` before every step that writes below a folder, and in the middle of each write.

    What a process that is killed there leaves is what is in the folder then.
    """
    looking = False

    def watched(function):
        def step(*arguments, **options):
            nonlocal looking
            if not looking:
                looking = True
                try:
                    look(function.__name__)
                finally:
                    looking = False
            return function(*arguments, **options)

        return step

    def halves(handle, content):
        content = memoryview(content).cast("B")
        first = plain_write(handle, content[: len(content) // 2])
        return first + write(handle, content[first:])

    plain_write = os.write
    write = watched(os.write)
    with monkeypatch.context() as patch:
        for name in ("open", "replace", "unlink", "truncate", "mkdir"):
            patch.setattr(os, name, watched(getattr(os, name)))
        patch.setattr(os, "fsync", watched(_nothing))
        patch.setattr(os, "write", halves)
        patch.setattr("fleet.records._write_all", _in_halves(watched(_nothing)))
        yield


def _nothing(*arguments):
    """A step that changes nothing of what other processes see."""


def _in_halves(look):
    def write(file, content):
        look()
        file.write(content[: len(content) // 2])
        look()
        file.write(content[len(content) // 2 :])

    return write


class Snapshots:
    """Copies of a folder as it was at different steps, each once."""

    def __init__(self, folder, into):
        self._folder, self._into = folder, into
        self._seen = set()
        self.steps = 0

    def __call__(self, step):
        self.steps += 1
        content = content_of(self._folder)
        if content not in self._seen:
            self._seen.add(content)
            shutil.copytree(self._folder, self._into / f"{len(self._seen):04d}")

    def __len__(self):
        return len(self._seen)


def content_of(folder):
    """Every file of a folder and what is in it."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return tuple((str(path.relative_to(folder)), path.read_bytes()) for path in files)


def repeated_rounds(folder):
    """Rounds that clients were asked for twice."""
    lines = (Path(folder) / LOG).read_text().splitlines()
    twice = {line for line in lines if lines.count(line) > 1}
    return {int(line.split()[0]) for line in twice}
