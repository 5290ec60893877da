"""Messages to clients: the task, and what brings each client's state up to date."""

from collections.abc import Mapping, Sequence
from typing import Any

from flwr.app import Message, Metadata, RecordDict

from fleet.codec import Download, Versions, parse_codec
from fleet.message import Task, content_bytes, write_state, write_task
from fleet.plan import UpdatePlan
from fleet.state import TrainableState
from strategies.ledger import Ledger, download_roles
from strategies.tokens import Tokens


class Outbox:
    """Writes messages, and keeps which version of the state each client holds.

    A client that was never heard of holds version 0, the pretrained model that
    it brought. Should it turn out not to, it says so, and is sent the state.

    Args:
        initial: version 0.
        classes: names of the head's outputs.
        run: hexadecimal id of the run.
        codec: of the steps between versions; float32 sends the state each time.
        tokens: where messages get theirs.
    """

    def __init__(
        self,
        initial: TrainableState,
        classes: tuple[str, ...],
        run: str,
        codec: str,
        tokens: Tokens,
    ) -> None:
        self.versions = Versions(initial, codec)
        self._by_steps = parse_codec(codec) != parse_codec("float32")
        self._classes = classes
        self._run = run
        self._tokens = tokens
        self._version_0 = self.versions.newest
        self._held: dict[str, str | None] = {}  # client → version
        self._acknowledged: dict[str, int] = {}  # client → round
        # Client → its newest message, which has no id before it is sent, and where that leads.
        self._under_way: dict[str, tuple[Metadata, str]] = {}

    def write(
        self, server_round: int, nodes: Mapping[str, int], kind: str, ledger: Ledger
    ) -> dict[str, Message]:
        """A message to each client, booked in the round's ledger.

        Args:
            nodes: client → node id.
            kind: Flower's message type.
        """
        states: dict[str | None, _State] = {}  # by the version that they start from
        messages = {}
        for name, node in nodes.items():
            held = self._held.get(name, self._version_0) if self._by_steps else None
            if held not in states:
                states[held] = _State(self.versions.download(held), self.versions.state.plan)
            task = write_task(self._task(name, server_round))
            ledger.down.add(name, states[held].nbytes_with(task), states[held].roles)
            if states[held].download.is_full_state:
                ledger.full_state.add(name)
            content = RecordDict({**task, **states[held].content})
            messages[name] = Message(content, node, kind)
            self._under_way[name] = messages[name].metadata, self.versions.newest
        return messages

    def ask(
        self, nodes: Mapping[str, int], kind: str, more: RecordDict, ledger: Ledger
    ) -> dict[str, Message]:
        """A message of round 0 to each client, without a state.

        Args:
            more: what it says beside the task.
        """
        messages = {}
        for name, node in nodes.items():
            content = RecordDict({**write_task(self._task(name, 0)), **more})
            ledger.down.add(name, content_bytes(content))
            messages[name] = Message(content, node, kind)
        return messages

    def arrived(self, client: str, message_id: str) -> None:
        """A client answered a message: it holds that message's version.

        An answer to an older message than its newest says nothing: that
        version may be one that the client has left behind.
        """
        metadata, version = self._under_way.get(client, (None, ""))
        if metadata is not None and metadata.message_id == message_id:
            del self._under_way[client]
            self._held[client] = version

    def lost(self, client: str) -> None:
        """A client says that it holds no version: it is sent the state next time."""
        self._held[client] = None

    def acknowledge(self, clients: Sequence[str], server_round: int) -> None:
        """These clients' updates of a round are in the model."""
        self._acknowledged |= dict.fromkeys(clients, server_round)

    def snapshot(self) -> dict[str, Any]:
        """What has to be known of the clients as a run goes on in another process.

        Messages under way are not in it: their answers would come to this process.
        """
        return {
            "versions": self.versions.snapshot(),
            "version-0": self._version_0,
            "held": dict(self._held),
            "acknowledged": dict(self._acknowledged),
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Know what was known when the snapshot was taken."""
        self.versions.restore(snapshot["versions"])
        self._version_0 = snapshot["version-0"]
        self._held = dict(snapshot["held"])
        self._acknowledged = dict(snapshot["acknowledged"])
        self._under_way = {}

    def _task(self, client: str, server_round: int) -> Task:
        return Task(
            plan=self.versions.state.plan.summary(),
            classes=self._classes,
            server_round=server_round,
            run=self._run,
            token=self._tokens.issue(client, server_round),
            acknowledged=self._acknowledged.get(client, 0),
        )


class _State:
    """What many messages share: encoded once, and measured once."""

    def __init__(self, download: Download, plan: UpdatePlan) -> None:
        self.download = download
        self.content = write_state(download)
        self.roles = download_roles(download, plan)
        self._measured: tuple[int, int] | None = None  # bytes of a content, and of its task

    def nbytes_with(self, task: RecordDict) -> int:
        """Bytes of a content of this state and a task.

        The tensors are written out for the first alone; another task makes the
        difference that it makes without them.
        """
        alone = content_bytes(task)
        if self._measured is None:
            self._measured = content_bytes(RecordDict({**task, **self.content})), alone
        whole, first = self._measured
        return whole - first + alone
