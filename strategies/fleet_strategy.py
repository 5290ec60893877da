"""The strategy: rounds over clients that train unequal plans."""

import time
from collections.abc import Callable, Iterable, Mapping
from logging import INFO

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fleet.codec import encode
from fleet.config import FederationConfig
from fleet.errors import UpdateError
from fleet.evaluation import Evaluation
from fleet.message import Task, content_bytes, write_task
from fleet.plan import UpdatePlan
from fleet.records import ClientReport, RoundReport
from fleet.report import round_line
from fleet.state import ClientUpdate, TrainableState
from strategies.aggregation import Aggregate, Rule, weighted_mean
from strategies.gate import admit, admit_evaluation
from strategies.sampling import Roster, sample
from strategies.server_opt import ServerOptimizer


class FleetStrategy(Strategy):
    """Send the widest plan's state, admit what fits, aggregate per tensor, step the server.

    Every part is a function or a value that can be another: the rule says how
    updates become one, the optimiser how that moves the model.

    Args:
        initial: state of the widest plan.
        classes: names of the head's outputs.
        roster: the clients.
        config: sizes and deadlines of rounds.
        seed: of the sampling.
        run: hexadecimal id of this run, under which clients remember.
        optimizer: steps the parameters; statistics never go through it.
        rule: combines admitted updates.
        evaluate: evaluates a state on the server; None leaves it to the clients.
        on_round: is given each round's report as the round ends.
    """

    def __init__(
        self,
        initial: TrainableState,
        classes: tuple[str, ...],
        roster: Roster,
        config: FederationConfig,
        seed: int,
        run: str,
        optimizer: ServerOptimizer,
        rule: Rule = weighted_mean,
        evaluate: Callable[[TrainableState], Evaluation] | None = None,
        on_round: Callable[[RoundReport], None] = lambda report: None,
    ) -> None:
        self.state = initial
        self.reports: list[RoundReport] = []
        self._classes = classes
        self._roster = roster
        self._config = config
        self._seed = seed
        self._run = run
        self._optimizer = optimizer
        self._rule = rule
        self._evaluate = evaluate
        self._on_round = on_round
        self._optimizer_state = optimizer.init(_parameters(initial))
        self._begin_round()

    @property
    def plan(self) -> UpdatePlan:
        """The widest plan: what the server holds and sends."""
        return self.state.plan

    def run(self, grid: Grid) -> TrainableState:
        """All rounds; returns the last state."""
        self.start(
            grid,
            ArrayRecord(),
            num_rounds=self._config.rounds,
            timeout=self._config.round_timeout,
            evaluate_fn=self._end_round,
        )
        return self.state

    def summary(self) -> None:
        """Nothing beyond the run's own records."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Sample the cohort and send it the state."""
        self._begin_round()
        online = self._roster.online(self._config.min_clients)
        names = sample(list(online), self._config.sampled, self._seed, server_round)
        return self._send(server_round, {name: online[name] for name in names}, MessageType.TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Admit replies, aggregate them and step the model; without any it stays."""
        updates = list(self._admit_all(replies))
        if updates:
            self._clients = tuple(map(_client_report, sorted(updates, key=lambda u: u.client)))
            aggregate = self._rule(updates)
            self._coverage = dict(aggregate.coverage)
            self._step(aggregate)
        return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Ask the clients to evaluate, unless the server does."""
        if self._evaluate is not None:
            return []
        online = self._roster.online(self._config.min_clients)
        return self._send(server_round, online, MessageType.EVALUATE)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Mean of the clients' losses and accuracies, weighted by their images."""
        results = list(self._evaluations(replies)) if self._evaluate is None else []
        total = sum(result.num_examples for result in results)
        if total:
            self._evaluation = Evaluation(
                total,
                sum(r.loss * r.num_examples for r in results) / total,
                sum(r.accuracy * r.num_examples for r in results) / total,
            )
        return None

    def _begin_round(self) -> None:
        self._started = time.perf_counter()
        self._asked: dict[str, Message] = {}  # client → the message under way
        self._bytes_up = self._bytes_down = 0
        self._clients: tuple[ClientReport, ...] = ()
        self._refused: dict[str, str] = {}
        self._coverage: Mapping[str, int] = {}
        self._evaluation: Evaluation | None = None

    def _send(self, server_round: int, nodes: Mapping[str, int], kind: str) -> list[Message]:
        """One content for all, so it is encoded and measured once."""
        task = Task(self.plan.summary(), self._classes, server_round, self._run)
        content = write_task(task, encode(self.state.tensors, self.plan))
        self._asked = {name: Message(content, node, kind) for name, node in nodes.items()}
        self._bytes_down += len(nodes) * content_bytes(content)
        return list(self._asked.values())

    def _answers(self, replies: Iterable[Message]) -> Iterable[tuple[str, RecordDict]]:
        """Client and content of each reply; errors and silence are refused by name."""
        # By what a reply answers, not by who it says it is from: an error that Flower
        # itself replies with is from no client. Messages get their ids as they are sent.
        silent = {message.metadata.message_id: name for name, message in self._asked.items()}
        for reply in replies:
            if reply.has_content():
                self._bytes_up += content_bytes(reply.content)
            name = silent.pop(reply.metadata.reply_to_message_id, None)
            if name is None:
                continue
            if reply.has_error():
                self._refused[name] = str(reply.error.reason)
            else:
                yield name, reply.content
        for name in silent.values():
            self._refused[name] = f"no reply within {self._config.round_timeout:.0f} s"

    def _admit_all(self, replies: Iterable[Message]) -> Iterable[ClientUpdate]:
        for name, content in self._answers(replies):
            try:
                yield admit(content, name, self.plan)
            except UpdateError as error:
                self._refused[name] = str(error)

    def _evaluations(self, replies: Iterable[Message]) -> Iterable[Evaluation]:
        for name, content in self._answers(replies):
            try:
                yield admit_evaluation(content)
            except UpdateError as error:
                self._refused[name] = f"evaluation: {error}"

    def _step(self, aggregate: Aggregate) -> None:
        parameters, self._optimizer_state = self._optimizer.update(
            aggregate.delta, self._optimizer_state, _parameters(self.state)
        )
        statistics = {n: a.astype(np.float32) for n, a in aggregate.statistics.items()}
        tensors = {**self.state.tensors, **parameters, **statistics}
        self.state = TrainableState(self.plan, tensors)

    def _end_round(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Flower calls this last in a round, and once before the first."""
        if self._evaluate is not None:
            self._evaluation = self._evaluate(self.state)
        examples = sum(client.num_examples for client in self._clients)
        weighted = sum(client.loss * client.num_examples for client in self._clients)
        report = RoundReport(
            server_round=server_round,
            accuracy=self._evaluation and self._evaluation.accuracy,
            loss=self._evaluation and self._evaluation.loss,
            train_loss=weighted / examples if examples else None,
            bytes_up=self._bytes_up,
            bytes_down=self._bytes_down,
            peak_client_bytes=max((c.peak_bytes for c in self._clients), default=0),
            seconds=round(time.perf_counter() - self._started, 3),
            clients=self._clients,
            refused=self._refused,
            coverage=self._coverage,
        )
        self.reports.append(report)
        self._on_round(report)
        log(INFO, "%s", round_line(report, self._config.rounds))
        if report.accuracy is None:
            return None
        return MetricRecord({"accuracy": report.accuracy, "loss": report.loss})


def _parameters(state: TrainableState) -> dict[str, np.ndarray]:
    """What the server optimiser steps: all but the statistics."""
    by_name = state.plan.by_name
    return {name: a for name, a in state.tensors.items() if not by_name[name].is_statistic}


def _client_report(update: ClientUpdate) -> ClientReport:
    return ClientReport(
        name=update.client,
        blocks=update.plan.blocks,
        num_examples=update.num_examples,
        loss=update.loss,
        peak_bytes=update.peak_bytes,
        seconds=update.seconds,
        metrics=update.metrics,
    )
