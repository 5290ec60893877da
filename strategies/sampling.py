"""Who is in the fleet, and who trains in a round."""

import time
from collections import Counter
from collections.abc import Callable, Sequence, Set
from logging import INFO, WARNING

import numpy as np
from flwr.app import Message, MessageType, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from fleet.errors import TOO_FEW, ConfigError, UpdateError
from fleet.message import Enrolment, content_bytes, read_enrolment
from fleet.report.history import last_line
from strategies.ledger import printable
from strategies.streaming import StreamingGrid

_POLL_SECONDS = 1.0
# A node that was turned away, or said nothing, is asked again no sooner than this;
# nor do rounds wait longer for a newcomer once there are clients enough.
# Each time that it does so again, it is asked half as often: it must not keep rounds waiting.
_PATIENCE_SECONDS = 60.0
_MAX_DOUBLINGS = 6  # so about once an hour

# What an introduction may say. It goes into logs and records, and classes into the head.
_MAX_ENROLMENT_BYTES = 2**20
_MAX_NAME = 256  # characters, of a client or a class
_MAX_CLASSES = 10_000  # of one client
_MAX_REASONS = 100  # that are remembered of clients turned away
_MAX_REASON = 1000  # characters
_MAX_LINES = 20  # that are told at once
_REMEMBERED = 10_000  # introductions that were asked for, and may still come


class Roster:
    """The clients by name. Flower's node ids are random; names are not.

    Args:
        grid: to ask nodes through.
        timeout: seconds that a node has to introduce itself.
        tell: is given what there is to say of who is missing and who was refused, in lines,
            whenever it may have changed.
    """

    def __init__(
        self,
        grid: Grid,
        timeout: float,
        tell: Callable[[Sequence[str]], None] = lambda lines: None,
    ) -> None:
        self._tell = tell
        self._wanted = 0  # clients that are waited for
        self._grid = StreamingGrid(grid, on_late=self._admit)
        self._timeout = timeout
        self._enrolled: dict[int, Enrolment] = {}  # node id → who it is
        self._ask_again: dict[int, float] = {}  # node id → when, at the earliest
        self._turned_away: Counter[int] = Counter()  # node id → how often
        self._reasons: set[str] = set()  # why clients were turned away
        self._absent: dict[int, str] = {}  # node id → why it takes no part, though it is there
        self._questions: dict[str, int] = {}  # id of a message → node id, until it is answered
        self._online: Set[int] = frozenset()  # node ids

    def online(self, min_clients: int) -> dict[str, int]:
        """Clients that can be reached now: name → node id, in order of names.

        Waits for `min_clients` for as long as an introduction may take.

        Raises:
            ConfigError: if fewer came, with the reasons of those who were turned away.
        """
        deadline = time.monotonic() + self._timeout
        self._wanted = min_clients
        while True:
            self._online = nodes = set(self._grid.get_node_ids())
            for node in self._ask_again.keys() - nodes:  # somebody may have put it right meanwhile
                del self._ask_again[node], self._turned_away[node]
            self._grid.take_late()  # who took longer to answer than was waited for
            known = nodes & self._enrolled.keys()
            timeout = self._timeout if len(known) < min_clients else _PATIENCE_SECONDS
            self._tell_who_is_missing()
            self._enrol(sorted(nodes - known), min(timeout, self._timeout))
            self._absent = {
                n: why for n, why in self._absent.items() if n in nodes and n not in self._enrolled
            }
            names = {e.name: n for n, e in sorted(self._enrolled.items()) if n in nodes}
            self._tell_who_is_missing()
            if len(names) >= min_clients:
                return dict(sorted(names.items()))
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{TOO_FEW}{len(names)} online after {self._timeout:.0f} s, min-clients is "
                    f"{min_clients}; start more, or lower it"
                    + "".join(f"\n  refused: {reason}" for reason in sorted(self._reasons))
                )
            log(INFO, "waiting for clients: %d of %d", len(names), min_clients)
            time.sleep(_POLL_SECONDS)

    def wait_for(self, names: Set[str], min_clients: int) -> dict[str, int]:
        """Clients that can be reached, once those named are among them.

        After a minute, or the time that an introduction may take, it goes on
        without those that are not; as `online` else.
        """
        deadline = time.monotonic() + min(self._timeout, _PATIENCE_SECONDS)
        while (absent := names - (there := self.online(min_clients)).keys()) and (
            time.monotonic() < deadline
        ):
            log(INFO, "waiting for clients of the last round: %s", ", ".join(sorted(absent)))
            time.sleep(_POLL_SECONDS)
        return there

    @property
    def absent(self) -> dict[str, str]:
        """Nodes that can be reached and take no part, and why. Their names are not known."""
        return {f"node {node}": reason for node, reason in sorted(self._absent.items())}

    def classes(self) -> tuple[str, ...]:
        """Every class that any client enrolled so far has images of, sorted by name."""
        return tuple(sorted({name for e in self._enrolled.values() for name in e.classes}))

    def _checked(self, enrolment: Enrolment, taken: Set[str]) -> Enrolment:
        """Two clients of one name would take each other's place unnoticed."""
        check_enrolment(enrolment)
        if enrolment.name in taken:
            raise UpdateError(
                f"a second client calls itself {enrolment.name}; "
                f"give every device a name of its own in its node configuration"
            )
        return enrolment

    def _enrol(self, nodes: Sequence[int], timeout: float) -> None:
        """Ask new nodes who they are."""
        now = time.monotonic()
        nodes = [n for n in nodes if now >= self._ask_again.get(n, -np.inf)]
        if not nodes:
            return
        for node in nodes:  # one that enrols is not asked again
            self._ask_again[node] = now + _PATIENCE_SECONDS * 2 ** min(
                self._turned_away[node], _MAX_DOUBLINGS
            )
            self._turned_away[node] += 1
        questions = [Message(RecordDict(), node, MessageType.QUERY) for node in nodes]
        replies = self._grid.send_and_receive(questions, timeout=timeout)
        self._questions |= {q.metadata.message_id: q.metadata.dst_node_id for q in questions}
        for reply in replies:
            self._admit(reply)
            if self._grid.waits:  # some may take long, and this one's reason is known
                self._tell_who_is_missing()
        while len(self._questions) > _REMEMBERED:  # the oldest will not be answered any more
            del self._questions[next(iter(self._questions))]

    def _admit(self, reply: Message) -> None:
        """Enrol whoever has introduced itself, or remember why it takes no part."""
        # A reply may name any sender; which question it answers, it cannot choose.
        node = self._questions.pop(reply.metadata.reply_to_message_id, None)
        if node in self._enrolled:
            return  # it was asked twice
        taken = {e.name for n, e in self._enrolled.items() if n in self._online}
        try:
            if reply.has_error():
                raise UpdateError(str(reply.error.reason))
            if node is not None:
                self._enrolled[node] = self._checked(_introduction(reply), taken)
        except UpdateError as error:
            self._turn_away(node, printable(str(error))[-_MAX_REASON:])

    def _tell_who_is_missing(self) -> None:
        there = sum(node in self._online for node in self._enrolled)
        reasons = sorted({last_line(reason) for reason in self._absent.values()})
        lines = [f"refused: {reason}" for reason in reasons]
        if there < self._wanted:
            lines.insert(0, f"waiting for clients: {there} of {self._wanted}")
        self._tell(lines[:_MAX_LINES])

    def _turn_away(self, node: int | None, reason: str) -> None:
        if node is not None:
            self._absent[node] = reason
        if reason not in self._reasons and len(self._reasons) < _MAX_REASONS:
            log(WARNING, "a client was refused: %s", reason)
            self._reasons.add(reason)


def check_enrolment(enrolment: Enrolment) -> None:
    """Hold what a client says of itself against what is taken.

    Raises:
        UpdateError: if its name or a class's is empty, too long or not
            printable, it has too many classes, or a number of images that is none.
    """
    for what, name in [("client", enrolment.name), *(("class", c) for c in enrolment.classes)]:
        if not name.strip() or len(name) > _MAX_NAME or not name.isprintable():
            raise UpdateError(
                f"a {what} is called {name[:40]!r}; a name has 1 to {_MAX_NAME} printable "
                f"characters, this one {len(name)}"
            )
    if len(enrolment.classes) > _MAX_CLASSES:
        raise UpdateError(
            f"client {enrolment.name} has {len(enrolment.classes)} classes, {_MAX_CLASSES} at "
            f"most are taken; check the labels of its data"
        )
    if enrolment.num_examples < 0:
        raise UpdateError(
            f"client {enrolment.name} has {enrolment.num_examples} images; expected 0 or more"
        )


def _introduction(reply: Message) -> Enrolment:
    try:
        nbytes = content_bytes(reply.content)
        if nbytes <= _MAX_ENROLMENT_BYTES:
            return read_enrolment(reply.content)
    except UpdateError:
        raise
    except Exception as error:  # of a reply that no check foresaw
        raise UpdateError(f"enrolment cannot be read ({error!r:.200})") from error
    raise UpdateError(
        f"an enrolment has {nbytes} bytes, {_MAX_ENROLMENT_BYTES} at most are read; refused"
    )


def sample(names: Sequence[str], count: int, seed: int, server_round: int) -> list[str]:
    """Draw the cohort of a round: the same for the same names, seed and round.

    Every client is as likely as any other, whatever it can train.

    Args:
        names: clients that can be reached.
        count: how many; 0 takes all.

    Returns:
        The cohort in an order drawn too: where a round ends at its goal, no
        name comes first more often than another.
    """
    names = sorted(names)
    if count == 0 or count >= len(names):
        count = len(names)
    rng = np.random.default_rng([seed, server_round])
    return rng.choice(names, size=count, replace=False).tolist()
