"""Launch one simulated run and follow it through its records."""

import contextlib
import logging
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from clients.client import SIMULATED_STATE
from clients.local_data import local_data
from fleet.backbones import loaded_once, resolve
from fleet.codec import parse_codec
from fleet.config import WEIGHTS, RunConfig, Value, default_settings, read_config, read_toml
from fleet.data import BUILT_IN
from fleet.errors import ConfigError
from fleet.paths import expanded
from fleet.records import RoundReport, RunRecord, recorded_beside
from fleet.report import write_page
from simulations.adversity import Adversity
from simulations.attacks import hostile_clients, read_attack
from simulations.callbacks import Callback, Callbacks
from simulations.checks import check_fleet
from simulations.workers import read_workers

ENGINES = ("local", "flower")
_running = threading.Lock()


@contextlib.contextmanager
def _alone_in_this_process() -> Iterator[None]:
    """An engine changes modules of PyTorch's and Flower's for as long as its run goes on."""
    if not _running.acquire(blocking=False):
        raise ConfigError(
            "another run goes on in this process, which has room for one at a time; wait for it, "
            "or begin this one in a process of its own, as compare(recipe, out, jobs=2) does"
        )
    try:
        yield
    finally:
        _running.release()


@_alone_in_this_process()
def simulate(
    settings: Mapping[str, Value] | None = None,
    engine: str = "local",
    on_round: Callable[[RoundReport], None] = lambda report: None,
    on_reply: Callable[[int, int], None] = lambda answered, asked: None,
    *,
    attack: str = "",
    hostile: float = 0.0,
    drop: float = 0.0,
    workers: int | str = 1,
    callbacks: Sequence[Callback] = (),
) -> RunRecord:
    """Run a fleet on this machine.

    Args:
        settings: what differs from the defaults, by the names of the run
            configuration: `{"rounds": 5, "blocks": "1,3,5"}`.
        engine: `local` runs client after client in this process, or in workers;
            `flower` is Flower's simulation runtime (Ray).
        on_round: given each round's report once it is on the disk.
        on_reply: told, while a round goes on, how many of its clients have
            answered (`local` only).
        attack: what hostile clients do (`local` only): sign_flip:10, alie, ipm:0.5,
            gaussian:0.1, nan or label_flip.
        hostile: share of the clients that do it, drawn by the run's seed.
        drop: probability that a reply to a train message is lost (`local` only).
        workers: processes that clients run in (`local` only); 1: this one; `auto`:
            one for each core. The run's result is the same for any number.
        callbacks: follow the run; one that fails does not end it.

    With the setting `resume` the run in `run-dir` goes on from its checkpoint: `resumed`
    makes its settings. The result is that of a run that was never ended.

    Returns:
        The folder of the run, with its records, model and report.

    Raises:
        FleetError: for what the user can mend, before anything is trained
            wherever it can be known by then.
        KeyboardInterrupt: if the run is interrupted; rounds, model and report
            of what is done are then in its folder.
    """
    if engine not in ENGINES:
        raise ConfigError(f"unknown engine {engine}; known: {', '.join(ENGINES)}")
    if not isinstance(settings, Mapping | None):
        raise ConfigError(
            f"settings must be a mapping from names to values, such as {{'rounds': 5}}; got "
            f"{settings!r:.80}"
        )
    processes = check_workers(workers, engine)
    followers = Callbacks(callbacks)
    adversity = Adversity(attack=attack, hostile=hostile, drop=drop)
    config = read_config(default_settings() | dict(settings or {}))
    check_fleet(config)
    adversity.check_fleet(config.federation.clients, engine)
    if config.resume:
        record = RunRecord(Path(config.run_dir))
        _check_resumed(record, config, adversity)
    else:
        record = RunRecord.reserve(config.run_dir)
    final = config.as_settings() | {"run-dir": str(record.path)} | _absolute_paths(config)
    config = read_config(final)
    # Every client would find the same fault; here it is found once, and at once.
    local_data({"partition-id": 0, "num-partitions": final["clients"]}, config.data, config.seed)
    if processes > 1:  # workers are forks: what is imported by now, they need not import each
        resolve(config.model.backbone)

    def end_round(report: RoundReport) -> None:
        on_round(report)
        followers.on_round_end(report)

    watch = _RoundWatch(record, end_round)
    table = adversity.as_table()
    followers.on_run_start(record, final)
    with _told_of_errors(record, watch, followers), recorded_beside(_named(simulation=table)):
        if engine == "local":

            def follow(answered: int, asked: int) -> None:
                watch.poll()
                on_reply(answered, asked)
                followers.on_reply(answered, asked)

            _run_local(final, config, adversity, follow, processes)
        else:
            from simulations.flower_engine import run_flower

            run_flower(final, config.federation.clients, on_poll=watch.poll)
        watch.poll()
        if not config.state_dir:  # what clients remember is of use as long as the run goes on
            shutil.rmtree(record.path / SIMULATED_STATE, ignore_errors=True)
    record.write_summary(record.summary() | table | {"engine": engine})
    followers.on_run_end(record.summary())
    return record


def check_workers(workers: int | str, engine: str) -> int:
    """How many processes the clients run in.

    Raises:
        ConfigError: for what is no number of them, or more than one of an engine that has
            its own.
    """
    processes = read_workers(workers)
    if processes > 1 and engine != "local":
        raise ConfigError(
            f"workers is {workers}, and engine {engine} has processes of its own; "
            f"leave workers out, or use engine local"
        )
    return processes


def resumed(run_dir: str | Path) -> tuple[dict[str, Value], dict[str, str | float]]:
    """What `simulate` needs to go on with a run: its settings, and attack, hostile and drop.

    Raises:
        ConfigError: if there is no run, or its config.toml is damaged.
    """
    record = RunRecord(Path(run_dir))
    if not os.path.isfile(record.config_path):  # Path's own raises for a name that is too long
        raise ConfigError(f"{record.path} holds no run: there is no config.toml in it")
    facts = read_toml(record.config_path)
    settings = {**facts.get("settings", {}), "run-dir": str(record.path), "resume": True}
    return settings, dict(facts.get("simulation", {}))


def _check_resumed(record: RunRecord, config: RunConfig, adversity: Adversity) -> None:
    """What is wrong with a run that is to go on, told before anything is loaded.

    Raises:
        CheckpointError, ConfigError: as `strategies.resume.standing`; ConfigError too
            if the fleet is another, or its clients remember nothing of the run.
    """
    # Here, not above: it brings Flower's apps.
    from strategies.resume import standing

    kept = standing(config)
    if kept is None:
        return
    settings, table = resumed(record.path)
    now = adversity.as_table() | {"clients": config.federation.clients}
    before = table | {"clients": settings.get("clients", config.federation.clients)}
    for key in sorted(now.keys() | before.keys()):
        if now.get(key) != before.get(key):
            raise ConfigError(
                f"{key} is {now.get(key, 'not set')}, and was {before.get(key, 'not set')} as the "
                f"run in {record.path} began; leave it so, or begin anew in another run-dir"
            )
    ended = record.summary_path.is_file()
    if ended and kept.server_round < config.federation.rounds and _clients_remember(config):
        raise ConfigError(
            f"run {record.path} has ended, and what its clients remembered of it is gone, "
            f"which its codecs, objective or local-norms need; begin it anew with more rounds in "
            f"another run-dir"
        )


def _clients_remember(config: RunConfig) -> bool:
    """Whether a client's round depends on its rounds before, and that is in the run's folder."""
    federation = config.federation
    return not config.state_dir and (
        parse_codec(federation.codec_up).feedback
        or parse_codec(federation.codec_down) != parse_codec("float32")
        or federation.objective == "feddyn"
        or config.plan.local_norms
    )


def _named(**tables: Mapping[str, str | float]) -> dict[str, Mapping[str, str | float]]:
    """Those tables that hold anything."""
    return {name: table for name, table in tables.items() if table}


@contextlib.contextmanager
def _told_of_errors(record: RunRecord, watch: "_RoundWatch", followers: Callback) -> Iterator[None]:
    """Followers hear why a run ended; an interrupted one has its page, as one that ended well."""
    try:
        yield
    except KeyboardInterrupt as error:
        watch.poll()
        if record.rounds_path.is_file():
            try:
                write_page(record)
            except ConfigError as unwritten:  # what the user asked for is the end, not the page
                warnings.warn(str(unwritten), RuntimeWarning, stacklevel=2)
        followers.on_run_error(error)
        raise
    except BaseException as error:
        followers.on_run_error(error)
        raise


def _run_local(
    settings: Mapping[str, Value],
    config: RunConfig,
    adversity: Adversity,
    on_reply: Callable[[int, int], None],
    workers: int,
) -> None:
    # Here, not above: Flower's apps take seconds to import, and the other engine
    # never runs them in this process.
    from clients.client_app import app as client_app
    from simulations.faults import dropping
    from simulations.hostile import flipping_labels, forging
    from simulations.local_engine import run_local
    from strategies.server_app import app as server_app

    clients, interferences = config.federation.clients, []
    if adversity.attack:
        attack = read_attack(adversity.attack)
        hostile = hostile_clients(clients, adversity.hostile, config.seed)
        if attack.flips_labels:
            client_app = flipping_labels(client_app, hostile)
        else:
            interferences.append(forging(attack, hostile, config))
    if adversity.drop:
        interferences.append(dropping(adversity.drop, config.seed))
    flower_log = logging.getLogger("flwr")
    level = flower_log.level
    flower_log.setLevel(logging.CRITICAL)  # the records say what it says, and more
    try:
        with loaded_once():
            run_local(server_app, client_app, settings, clients, on_reply, interferences, workers)
    finally:
        flower_log.setLevel(level)


def _absolute_paths(config: RunConfig) -> dict[str, str]:
    """Data and weights that are paths, made independent of the working directory.

    A folder that is named as a built-in is does not take its place.
    """
    paths = {}
    if config.data.source not in BUILT_IN:
        paths["data"] = expanded(config.data.source, "data")
    if config.model.weights not in WEIGHTS:
        paths["weights"] = expanded(config.model.weights, "weights")
    # os.path takes a name that is too long for one that does not exist; Path raises.
    return {key: str(path.resolve()) for key, path in paths.items() if os.path.exists(path)}


class _RoundWatch:
    """Reports rounds as they appear in the record: it works for any engine."""

    def __init__(self, record: RunRecord, on_round: Callable[[RoundReport], None]) -> None:
        self._record = record
        self._on_round = on_round
        self._position = 0
        self._last = -1
        if record.rounds_path.is_file():  # of a run that goes on: told of by who began it
            for report, behind in record.rounds_from(0):
                self._position, self._last = behind, report.server_round

    def poll(self) -> None:
        path = self._record.rounds_path
        size = path.stat().st_size if path.is_file() else 0
        if size == self._position:
            return
        if size < self._position:  # rounds that are repeated were cut off
            self._position = 0
        for report, behind in self._record.rounds_from(self._position):
            self._position = behind
            if report.server_round > self._last:
                self._last = report.server_round
                self._on_round(report)
