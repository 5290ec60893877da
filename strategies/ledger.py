"""The books of one round, kept while it goes on."""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from fleet.codec import Download, EncodedArrays
from fleet.evaluation import Evaluation
from fleet.plan import UpdatePlan
from fleet.records import ClientReport, RoundReport
from fleet.state import ClientUpdate

_MAX_REASON = 2000  # characters of why a client does not count


def printable(reason: str | None) -> str:
    """A reason as it may be shown, for clients write some: printable characters, and lines.

    Of a long one the end is kept: a traceback says most there.
    """
    shown = "".join(c for c in (reason or "")[-_MAX_REASON:] if c.isprintable() or c == "\n")
    return shown.strip() or "no reason given"


class Traffic:
    """Bytes one way: by client, and by what they are."""

    def __init__(self) -> None:
        self.by_client: Counter[str] = Counter()
        self.by_role: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Of all clients."""
        return self.by_client.total()

    def add(self, client: str, nbytes: int, roles: Mapping[str, int] | None = None) -> None:
        """Book a message.

        Args:
            nbytes: of its whole content.
            roles: role of its tensors → their encoded bytes; the rest is headers.
        """
        self.by_client[client] += nbytes
        self.by_role.update(roles or {})
        self.by_role["headers"] += nbytes - sum((roles or {}).values())

    def find_roles(self, roles: Mapping[str, int]) -> None:
        """What is booked as headers turns out to be an update's tensors."""
        self.by_role.update(roles)
        self.by_role["headers"] -= sum(roles.values())


@dataclass
class Ledger:
    """What a round came to so far.

    Attributes:
        asked: clients that were to train.
        updates: those admitted.
        refused: client → why its reply, or its absence, did not count.
        late: clients without whom the round went on, as its goal was reached.
        late_replies: replies to earlier rounds' messages, dropped in this one.
        full_state: clients that were sent the state itself, not steps to it.
        stepped: whether the model moved.
        coverage: tensor → how many clients trained it.
        evaluation: of the model after the round.
        evaluations: client → its own, where clients evaluate.
    """

    asked: tuple[str, ...] = ()
    updates: list[ClientUpdate] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    late: list[str] = field(default_factory=list)
    late_replies: int = 0
    full_state: set[str] = field(default_factory=set)
    stepped: bool = False
    coverage: Mapping[str, int] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    up: Traffic = field(default_factory=Traffic)
    down: Traffic = field(default_factory=Traffic)
    started: float = field(default_factory=time.perf_counter)

    def admit(self, update: ClientUpdate) -> None:
        """Book an update that counts."""
        self.updates.append(update)
        for arrays in (update.delta, update.statistics):
            self.up.find_roles(_roles(arrays, update.plan))

    def refuse(self, client: str, reason: str | None, phase: str = "") -> None:
        """Book why something that a client sent, or did not send, does not count, as `printable`.

        What was booked for it before stays.

        Args:
            phase: stands before the reason, unless the client was refused for the same before.
        """
        reason, before = printable(reason), self.refused.get(client, "")
        if not before.endswith(reason):
            both = f"{before}; {phase}{reason}" if before else f"{phase}{reason}"
            self.refused[client] = both[-_MAX_REASON:]

    def leave_out(self, reasons: Mapping[str, str]) -> None:
        """Book why the algorithm made nothing of updates that were admitted."""
        self.updates = [update for update in self.updates if update.client not in reasons]
        for client, reason in reasons.items():
            self.refuse(client, reason)

    def report(self, server_round: int) -> RoundReport:
        """The round as it goes on record."""
        updates = sorted(self.updates, key=lambda update: update.client)
        examples = sum(update.num_examples for update in updates)
        weighted = sum(update.loss * update.num_examples for update in updates)
        return RoundReport(
            server_round=server_round,
            accuracy=self.evaluation and self.evaluation.accuracy,
            loss=self.evaluation and self.evaluation.loss,
            train_loss=weighted / examples if examples else None,
            bytes_up=self.up.total,
            bytes_down=self.down.total,
            peak_client_bytes=max((update.peak_bytes for update in updates), default=0),
            seconds=round(time.perf_counter() - self.started, 3),
            clients=tuple(map(_client_report, updates)),
            asked=self.asked,
            refused=self.refused,
            late=tuple(self.late),
            late_replies=self.late_replies,
            full_state=tuple(sorted(self.full_state)),
            stepped=self.stepped,
            coverage=self.coverage,
            bytes_by_client={
                name: (self.up.by_client[name], self.down.by_client[name])
                for name in sorted({*self.up.by_client, *self.down.by_client})
            },
            bytes_by_role={
                "up": dict(sorted(self.up.by_role.items())),
                "down": dict(sorted(self.down.by_role.items())),
            },
            accuracy_by_client={
                name: (own.num_examples, own.accuracy)
                for name, own in sorted(self.evaluations.items())
            },
        )


def download_roles(download: Download, plan: UpdatePlan) -> dict[str, int]:
    """Role of tensors → bytes that they take in a download."""
    roles: Counter[str] = Counter()
    for payload in download.payloads:
        roles.update(_roles(EncodedArrays(payload, plan), plan))
    return dict(roles)


def _roles(arrays: EncodedArrays, plan: UpdatePlan) -> Counter[str]:
    roles: Counter[str] = Counter()
    for name in arrays:
        roles[plan.by_name[name].role] += arrays.nbytes(name)
    return roles


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
