"""The strategy: rounds over clients that train unequal plans."""

import contextlib
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from logging import INFO, WARNING
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fleet.config import FederationConfig
from fleet.errors import ConfigError, FleetError, UpdateError
from fleet.evaluation import Evaluation
from fleet.message import LOST_VERSION, content_bytes, write_exponent
from fleet.plan import UpdatePlan
from fleet.records import RoundReport
from fleet.report import round_line
from fleet.state import ClientUpdate, TrainableState
from strategies.algorithm import Algorithm, Step
from strategies.flower_errors import reason_of
from strategies.gate import Gate
from strategies.head_start import HeadStarter
from strategies.ledger import Ledger, printable
from strategies.outbox import Outbox
from strategies.sampling import Roster, sample
from strategies.spool import Spool
from strategies.streaming import StreamingGrid, close
from strategies.tokens import Tokens

# Where a device that hung, or was lost, has told its own log why.
_LOOK_THERE = "; logs/supernode.log in the device's state may say why"
_DROPPED = "no reply: it was dropped on its way"
_MOMENTS = f"{MessageType.QUERY}.moments"  # `query("moments")` of the ClientApp


class FleetStrategy(Strategy):
    """Bring clients up to date, admit what fits, step the model by it.

    Args:
        initial: state of the widest plan.
        classes: names of the head's outputs.
        roster: the clients.
        config: sizes, codecs and deadlines of rounds.
        seed: of the sampling, and of rounding.
        algorithm: turns a round's updates into the next model.
        evaluate: evaluates a state on the server; None leaves it to the clients.
        on_round: is given each round's report as the round ends.
        run: hexadecimal id under which clients remember this run.
        head_start: solves for the first head as round 0; None: it is what it is.
    """

    def __init__(
        self,
        initial: TrainableState,
        classes: tuple[str, ...],
        roster: Roster,
        config: FederationConfig,
        seed: int,
        algorithm: Algorithm,
        evaluate: Callable[[TrainableState], Evaluation] | None = None,
        on_round: Callable[[RoundReport], None] = lambda report: None,
        run: str | None = None,
        head_start: HeadStarter | None = None,
    ) -> None:
        self.state = initial
        self._roster = roster
        self._config = config
        self._seed = seed
        self._algorithm = algorithm
        self._evaluate = evaluate
        self._on_round = on_round
        self._head_start = head_start
        self._memory = algorithm.init(initial)
        self._initial = initial
        self._done: int | None = None  # the last round of an earlier process; None: there was none
        self._tokens = Tokens()
        self._outbox = Outbox(
            initial, classes, run or secrets.token_hex(8), config.codec_down, self._tokens
        )
        self._asked: dict[str, Message] = {}  # client → the message under way
        self._silent: set[str] = set()  # clients that have not answered this round's message
        self._ledger = Ledger()

    @property
    def plan(self) -> UpdatePlan:
        """The widest plan: what the server holds and sends."""
        return self.state.plan

    def run(self, grid: Grid) -> TrainableState:
        """All rounds that are left; returns the last state."""
        self._grid = StreamingGrid(grid, on_late=self._log_late_error)
        if self._head_start is not None and self._done is None:
            self._solve_head(self._head_start)
        if self._done:
            log(INFO, "rounds up to %d are done; Flower counts the others from 1", self._done)
        self.start(
            self._grid,
            ArrayRecord(),
            num_rounds=self._config.rounds - (self._done or 0),
            timeout=self._config.round_timeout,
            evaluate_fn=self._end_round,
        )
        return self.state

    def snapshot(self) -> dict[str, Any]:
        """All that decides the rounds to come, as plain values and arrays (`fleet.tree`).

        Of use between two rounds, as in `on_round`.
        """
        return {
            "state": dict(self.state.tensors),
            "algorithm": self._algorithm.save(self._memory),
            "outbox": self._outbox.snapshot(),
        }

    def restore(self, snapshot: Mapping[str, Any], server_round: int) -> None:
        """Go on where a snapshot was taken; before `run`.

        Args:
            snapshot: of a strategy of the same arguments.
            server_round: the round that had just ended.
        """
        self.state = TrainableState(self.plan, snapshot["state"])
        self._memory = self._algorithm.restore(snapshot["algorithm"], self._initial)
        self._outbox.restore(snapshot["outbox"])
        self._done = server_round

    def summary(self) -> None:
        """Nothing beyond the run's own records."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Sample the cohort and bring it up to date."""
        server_round = self._round(server_round)
        self._ledger, self._silent = Ledger(), set()
        asked = {message.metadata.message_id: name for name, message in self._asked.items()}
        for message_id, nbytes in self._grid.take_late():
            self._ledger.late_replies += 1
            self._ledger.up.add(asked.get(message_id, "unknown sender"), nbytes)
        online = self._roster.online(self._config.min_clients)
        for node, reason in self._roster.absent.items():
            self._ledger.refuse(node, f"introduction: {reason}")
        names = sample(list(online), self._config.sampled, self._seed, server_round)
        self._ledger.asked = tuple(sorted(names))
        return self._send(server_round, {name: online[name] for name in names}, MessageType.TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Admit replies until there are enough, and step the model; with too few it stays."""
        server_round = self._round(server_round)
        spool = Spool()
        try:
            gate = Gate(
                self.plan,
                self._config.codec_up,
                self._tokens.spend,
                spool.keep,
                self._algorithm.equal_plans,
            )
            for name, content, nbytes in self._answers(replies, goal=self._config.goal):
                with self._refusing(name):
                    self._ledger.admit(gate.admit(content, name, nbytes))
            if len(self._ledger.updates) >= self._config.min_updates:
                self._step(server_round)
        finally:
            spool.close()
            close(replies)
        return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Ask the clients to evaluate, unless the server does."""
        server_round = self._round(server_round)
        if self._evaluate is not None:
            return []
        online = self._roster.online(self._config.min_clients)
        # A device takes one message after the other: who still trains would not answer in time.
        able = {name: node for name, node in online.items() if name not in self._silent}
        return self._send(server_round, able, MessageType.EVALUATE)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Mean of the clients' losses and accuracies, weighted by their images."""
        if self._evaluate is not None:
            return None
        gate = Gate(self.plan, self._config.codec_up, self._tokens.spend)
        evaluations = self._ledger.evaluations
        for name, content, nbytes in self._answers(replies, "evaluation: "):
            with self._refusing(name, "evaluation: "):
                evaluations[name] = gate.admit_evaluation(content, name, nbytes)
        close(replies)
        results = evaluations.values()
        total = sum(result.num_examples for result in results)
        if total:
            self._ledger.evaluation = Evaluation(
                total,
                sum(r.loss * r.num_examples for r in results) / total,
                sum(r.accuracy * r.num_examples for r in results) / total,
            )
        return None

    def _round(self, flowers: int) -> int:
        """The run's round; Flower counts those of this process."""
        return flowers + (self._done or 0)

    def _solve_head(self, head_start: HeadStarter) -> None:
        """Round 0: every client sends the moments of its features."""
        online = self._roster.online(self._config.min_clients)
        more = write_exponent(head_start.exponent)
        self._asked = self._outbox.ask(online, _MOMENTS, more, self._ledger)
        self._ledger.asked = tuple(sorted(online))
        replies = self._grid.send_and_receive(
            list(self._asked.values()), timeout=self._config.round_timeout
        )
        gate = Gate(self.plan, self._config.codec_up, self._tokens.spend)
        sent = {}
        for name, content, nbytes in self._answers(replies):
            with self._refusing(name):
                sent[name] = gate.admit_bytes(content, name, nbytes, head_start.most_bytes)
        close(replies)
        try:
            start = head_start.solve(sent)
        except UpdateError as error:
            log(WARNING, "no head start: %s", error)
            for name in sent:
                self._ledger.refuse(name, str(error))
            return
        for name, reason in start.refused.items():
            self._ledger.refuse(name, reason)
        self._ledger.stepped = True
        self.state = start.into(self.state, head_start.head)
        self._memory = self._algorithm.init(self.state)
        self._outbox.versions.advance(self.state, [self._seed, 0])

    def _log_late_error(self, reply: Message) -> None:
        """Why a client failed that is not waited for any more, as one that hung, is in the log."""
        if reply.has_error():
            asked = {message.metadata.message_id: name for name, message in self._asked.items()}
            name = asked.get(reply.metadata.reply_to_message_id, "a client")
            log(WARNING, "%s answered too late: %s", name, printable(reason_of(reply.error)))

    def _send(self, server_round: int, nodes: Mapping[str, int], kind: str) -> list[Message]:
        self._asked = self._outbox.write(server_round, nodes, kind, self._ledger)
        return list(self._asked.values())

    def _answers(
        self, replies: Iterable[Message], phase: str = "", goal: int = 0
    ) -> Iterable[tuple[str, RecordDict, int]]:
        """Client, content and bytes of each reply; errors and silence are refused by name.

        Args:
            phase: stands before the reasons.
            goal: admitted updates after which nobody is waited for any more; 0: none.
        """
        # By what a reply answers, not by who it says it is from: an error that Flower
        # itself replies with is from no client. Messages get their ids as they are sent.
        silent = {message.metadata.message_id: name for name, message in self._asked.items()}
        answered: dict[str, str] = {}
        for reply in replies:
            question = reply.metadata.reply_to_message_id
            expected = question in silent
            if expected:
                name = answered[question] = silent.pop(question)
            else:
                name = f"{answered[question]} (again)" if question in answered else "unknown sender"
            nbytes = None
            with self._refusing(name, phase):
                nbytes = content_bytes(reply.content) if reply.has_content() else 0
                self._ledger.up.add(name, nbytes)
            if not expected:
                self._ledger.refuse(name, "reply to no message that waits for one; dropped")
            elif reply.has_error():
                if reply.error.code == LOST_VERSION:
                    self._outbox.lost(name)
                self._ledger.refuse(name, reason_of(reply.error), phase)
            elif nbytes is not None:
                self._outbox.arrived(name, question)
                yield name, reply.content, nbytes
            if goal and len(self._ledger.updates) >= goal:
                self._ledger.late += sorted(silent.values())
                return
        self._silent = {*silent.values()} if self._grid.waits else set()
        reason = _DROPPED  # where everyone answers at once, nothing else makes a client silent
        if self._grid.waits:
            reason = f"no reply within {self._config.round_timeout:g} s{_LOOK_THERE}"
        for name in silent.values():
            self._ledger.refuse(name, reason, phase)

    @contextlib.contextmanager
    def _refusing(self, name: str, phase: str = "") -> Iterator[None]:
        """Whatever reading a reply raises becomes the reason why it does not count."""
        try:
            yield
        except UpdateError as error:
            self._ledger.refuse(name, str(error), phase)
        except Exception as error:  # a run must outlive also what no check foresaw
            log(WARNING, "reply of %s cannot be read", name, exc_info=True)
            self._ledger.refuse(name, f"reply cannot be read ({error!r:.200})", phase)

    def _step(self, server_round: int) -> None:
        """Step the model, or leave it where the algorithm cannot, with the reason for everyone."""
        ledger = self._ledger
        updates = sorted(ledger.updates, key=lambda update: update.client)
        try:
            step = self._checked_step(updates, server_round)
        except UpdateError as error:
            log(WARNING, "round %d is abandoned: %s", server_round, error)
            for update in updates:
                ledger.refuse(update.client, f"round abandoned: {error}")
            return
        before, self.state, self._memory = self.state, step.state, step.memory
        ledger.coverage = step.coverage
        ledger.stepped = any(
            (step.state.tensors[name] != array).any() for name, array in before.tensors.items()
        )
        ledger.leave_out(step.left_out)
        self._outbox.acknowledge([update.client for update in ledger.updates], server_round)
        self._outbox.versions.advance(self.state, [self._seed, server_round])

    def _checked_step(self, updates: Sequence[ClientUpdate], server_round: int) -> Step:
        """What the algorithm makes of the updates.

        Raises:
            UpdateError: if they come to no model.
            ConfigError: if the algorithm itself is at fault.
        """
        try:
            step = self._algorithm.step(updates, self.state, self._memory)
        except FleetError:
            raise
        except Exception as error:  # whatever a strategy of the user's own does
            raise ConfigError(
                f"the strategy failed in round {server_round} on {len(updates)} updates "
                f"({type(error).__name__}: {error}); mend its step or its rule"
            ) from error
        if not isinstance(step, Step) or not isinstance(step.state, TrainableState):
            raise ConfigError(
                f"the strategy's step returned {type(step).__name__}, not a "
                f"strategies.algorithm.Step with the next state in it"
            )
        if (name := step.state.first_not_finite()) is not None:
            raise UpdateError(
                f"with this round's updates {name} would hold NaN or infinity; the model "
                f"stays. Lower server-learning-rate, or set rule to clipped_mean"
            )
        return step

    def _end_round(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Flower calls this last in a round, and once before the first."""
        if server_round == 0 and self._done is not None:
            return None  # that round has ended in an earlier process
        server_round = self._round(server_round)
        if self._evaluate is not None:
            self._ledger.evaluation = self._evaluate(self.state)
        report = self._ledger.report(server_round)
        self._on_round(report)
        log(INFO, "%s", round_line(report, self._config.rounds))
        if report.accuracy is None:
            return None
        return MetricRecord({"accuracy": report.accuracy, "loss": report.loss})
