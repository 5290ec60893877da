"""Worker processes that run a simulated fleet's clients: started once, kept for the whole run."""

import gc
import pickle
import random
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import numpy as np
import torch
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from fleet.cores import available_cores
from fleet.errors import ConfigError
from fleet.signals import ENDING
from simulations.local_clients import SERVER_NODE_ID, LocalClients, identify, number_of, pack

# How far workers may run ahead of the reply that is waited for, in replies a worker: so
# many wait in memory where one client takes longer than all others.
_AHEAD = 8
_GOODBYE_SECONDS = 2.0


def read_workers(value: int | str) -> int:
    """How many worker processes a setting means; `auto` is a worker for each core.

    Raises:
        ConfigError: for what is neither a whole number from 1 on nor `auto`.
    """
    if value == "auto":
        return available_cores()
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    if type(value) is not int or value < 1:
        raise ConfigError(f"workers must be a whole number from 1 on, or auto; got {value!r}")
    return value


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    message: Message | None = None  # that it works on


class WorkerPool:
    """Answers messages in worker processes, whichever is free; one message a client at a time.

    On Linux a worker is a fork of this process, as it is when the first message
    is sent: it starts in milliseconds, any ClientApp will do, and what was read
    and imported by then is shared, data sets among it. Forks of a process that
    uses CUDA, or on other systems, do not work; there a worker starts afresh,
    which takes seconds, and the ClientApp must be one that can be imported.

    A worker uses one thread of PyTorch. Should it die, another takes its place, and what it
    ran is run again: the result is as if nothing had happened. A client whose worker dies
    twice has an error as its reply.

    Args:
        clients: what workers run.
        workers: how many, at most one a client.
        start_method: of `multiprocessing`; empty: as above.
    """

    def __init__(self, clients: LocalClients, workers: int, start_method: str = "") -> None:
        self._clients = clients
        self._most = max(1, min(workers, clients.num_clients))
        self._context = get_context(start_method or _start_method())
        self._workers: list[_Worker] = []
        self._waiting: dict[str, Message] = {}  # id → message that no worker has
        self._done: dict[str, Message] = {}  # id → reply that nobody has asked for
        self._lost: set[str] = set()  # ids of messages whose worker has died, once

    def ask(self, message: Message) -> None:
        """Take a message, and begin on it as soon as a worker is free."""
        while len(self._workers) < self._most:
            self._workers.append(self._start())
        self._waiting[message.metadata.message_id] = message
        self._dispatch()

    def answer(self, message: Message) -> Message:
        """The reply to a message that was taken, once it is there."""
        message_id = message.metadata.message_id
        while message_id not in self._done:
            self._dispatch(message)
            self._collect()
        reply = self._done.pop(message_id)
        self._dispatch()
        return reply

    def close(self) -> None:
        """End all workers, whatever they are at."""
        workers, self._workers = self._workers, []
        self._waiting.clear()
        for worker in workers:
            worker.process.terminate()
            worker.connection.close()
        for worker in workers:
            _end(worker.process)

    def _dispatch(self, wanted: Message | None = None) -> None:
        """Give free workers the next messages, the one that is waited for in any case."""
        free = [worker for worker in self._workers if worker.message is None]
        room = _AHEAD * self._most - len(self._done) - (len(self._workers) - len(free))
        if wanted is not None and free:
            busy = {number_of(w.message) for w in self._workers if w.message is not None}
            client = number_of(wanted)
            # An earlier message to the same client comes first.
            first = next((m for m in self._waiting.values() if number_of(m) == client), None)
            if first is not None and client not in busy:
                self._send(free.pop(), first)
                room -= 1
        while free and room > 0:
            busy = {number_of(w.message) for w in self._workers if w.message is not None}
            found = next((m for m in self._waiting.values() if number_of(m) not in busy), None)
            if found is None:
                return
            self._send(free.pop(), found)
            room -= 1

    def _send(self, worker: _Worker, message: Message) -> None:
        if not worker.process.is_alive():  # it died between two messages, of which neither knows
            worker = self._replace(worker)
        del self._waiting[message.metadata.message_id]
        worker.message = message
        try:
            worker.connection.send_bytes(pack(message))
        except OSError:
            self._bury(worker)

    def _collect(self) -> None:
        """Wait until a worker has answered or died, and take what there is."""
        busy = [worker for worker in self._workers if worker.message is not None]
        # A process that a client started may hold a dead worker's end of the pipe open.
        handles = {worker.connection: worker for worker in busy}
        handles |= {worker.process.sentinel: worker for worker in busy}
        ready = wait(list(handles)) if handles else []
        for worker in {id(handles[handle]): handles[handle] for handle in ready}.values():
            self._take(worker)

    def _take(self, worker: _Worker) -> None:
        try:
            if not worker.connection.poll():
                raise EOFError
            reply = pickle.loads(worker.connection.recv_bytes())
        except (EOFError, OSError):
            self._bury(worker)
            return
        message_id = worker.message.metadata.message_id
        self._done[message_id] = reply
        self._lost.discard(message_id)
        worker.message = None

    def _bury(self, worker: _Worker) -> None:
        """A worker in a dead one's place; its message waits again, or has an error as reply."""
        message, worker.message = worker.message, None
        _end(worker.process)
        message_id = message.metadata.message_id
        if message_id not in self._lost:
            self._lost.add(message_id)
            self._waiting = {message_id: message} | self._waiting
        else:
            self._lost.discard(message_id)
            reason = (
                f"two worker processes that ran client {number_of(message)} ended, one after the "
                f"other; the last {_ending(worker.process.exitcode)}"
            )
            self._done[message_id] = Message(
                Error(ErrorCode.CLIENT_APP_CRASHED, reason), reply_to=message
            )
        self._replace(worker)

    def _replace(self, worker: _Worker) -> _Worker:
        """Another worker in the place of a dead one."""
        self._workers.remove(worker)
        worker.connection.close()
        _end(worker.process)
        self._workers.append(self._start())
        return self._workers[-1]

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        forks = self._context.get_start_method() == "fork"
        # A fork has this process's ends too: held open, no worker would see this process die.
        not_theirs = [ours, *(w.connection for w in self._workers)] if forks else []
        process = self._context.Process(
            target=_serve, args=(self._clients, theirs, not_theirs), name="fleet-worker"
        )
        try:
            with warnings.catch_warnings():
                # Of threads at a fork: those that there are draw progress, or sleep.
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            ours.close()
            raise ConfigError(
                f"this ClientApp cannot be sent to worker processes ({error}); define it in a "
                f"module of its own, or set workers to 1"
            ) from error
        finally:
            theirs.close()
        return _Worker(process, ours)


def _start_method() -> str:
    forks = sys.platform == "linux" and not torch.cuda.is_initialized()
    return "fork" if forks else "spawn"


def _end(process: BaseProcess) -> None:
    """See to it that a process which is to end, or has lost its pipe, does."""
    process.join(_GOODBYE_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()


def _ending(exit_code: int | None) -> str:
    """How a process ended, in words."""
    if exit_code is None:
        return "ended, and something else in this process took its exit code"
    if exit_code >= 0:
        return f"ended with exit code {exit_code}; it called exit, or a library did"
    name = signal.Signals(-exit_code).name
    if name == "SIGKILL":
        return f"was killed ({name}), as the system does where memory runs out; use fewer workers"
    return f"crashed ({name}); run it with workers 1 to see where"


def _serve(clients: LocalClients, connection: Connection, not_ours: Sequence[Connection]) -> None:
    """A worker's life: answer messages until the run's process closes the pipe."""
    # A terminal tells its whole job of Ctrl-C and of its end; it is the run that ends its workers.
    for number in set(ENDING) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in not_ours:
        other.close()
    gc.freeze()  # as the run's own process did: what was forked is never collected
    torch.set_num_threads(1)
    identify(SERVER_NODE_ID)
    _reseed()
    with suppress(EOFError, OSError):
        while True:
            message = pickle.loads(connection.recv_bytes())
            connection.send_bytes(_packed(clients.answer(message), message))


def _packed(reply: Message, message: Message) -> bytes:
    try:
        return pack(reply)
    except Exception as error:  # whatever a client put into its reply
        reason = f"the reply cannot be sent to the server's process: {error!r}"
        return pack(Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message))


def _reseed() -> None:
    """Forks have one generator in common: clients that draw from it would draw alike."""
    random.seed()
    np.random.seed(random.getrandbits(32))
    torch.manual_seed(random.getrandbits(63))
