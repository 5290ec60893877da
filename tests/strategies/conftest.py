"""A toy plan of five blocks, its updates, and rounds of Flower's own strategies."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fleet.plan import TensorSpec, UpdatePlan
from fleet.state import ClientUpdate


@pytest.fixture
def task_identity(monkeypatch):
    """The identity without which Flower builds no message outside a run."""
    # The public properties raise while unset, so monkeypatch could not read the old values.
    for field, value in (("_run_id", 1), ("_node_id", 1), ("_task_id", 1)):
        monkeypatch.setattr(TaskIdentity, field, value)


@pytest.fixture
def toy_plan():
    """As `five_blocks`."""
    return five_blocks()


def five_blocks():
    """A plan of five blocks, each of a weight, a shift and a norm's statistics, and a head."""
    specs = []
    for depth in range(5, 0, -1):
        block = f"blocks.{5 - depth}"
        specs += [
            TensorSpec(name=f"{block}.conv.weight", shape=(4, 3), role="weight", depth=depth),
            TensorSpec(name=f"{block}.bn.bias", shape=(4,), role="shift", depth=depth),
            TensorSpec(name=f"{block}.bn.running_mean", shape=(4,), role="mean", depth=depth),
            TensorSpec(name=f"{block}.bn.running_var", shape=(4,), role="var", depth=depth),
        ]
    specs.append(TensorSpec(name="head.weight", shape=(2, 4), role="weight", depth=0))
    return UpdatePlan(
        backbone="toy",
        preprocessing={},
        step_digests={},
        weights_digest="0" * 64,
        method="mobiletl",
        blocks=5,
        train_tail=False,
        specs=tuple(specs),
    )


@pytest.fixture
def random_update():
    """Function (client, plan, rng) → a client's update with random float32 tensors."""

    def build(client, plan, rng, num_examples=None):
        tensors = {s.name: rng.normal(size=s.shape).astype(np.float32) for s in plan.specs}
        for spec in plan.specs:
            if spec.role == "var":
                tensors[spec.name] = np.square(tensors[spec.name])
        return ClientUpdate(
            client=client,
            plan=plan,
            delta={s.name: tensors[s.name] for s in plan.specs if not s.is_statistic},
            statistics={s.name: tensors[s.name] for s in plan.specs if s.is_statistic},
            num_examples=num_examples or int(rng.integers(1, 500)),
            loss=1.0,
            peak_bytes=0,
            seconds=0.0,
        )

    return build


@pytest.fixture
def unequal(toy_plan, random_update):
    """Function of an rng → updates of unequal plans; by default of six clients."""

    def build(rng, blocks=(1, 3, 5, 1, 0, 3)):  # one fits the head alone
        return [random_update(f"pi-{i}", toy_plan.narrow(k), rng) for i, k in enumerate(blocks)]

    return build


@dataclass
class _Grid:
    """All that `configure_train` asks of a grid: who is there."""

    nodes: int

    def get_node_ids(self):
        return range(1, self.nodes + 1)


@pytest.fixture
def flower_round(task_identity):
    """Function that runs one training round of a Flower strategy, without a network.

    (strategy, server_round, arrays, trained, counts) → the strategy's new arrays, where
    `trained` holds what each client's reply carries and `counts` its num-examples. With
    `losses`, replies carry them too.
    """

    def record(arrays):
        return ArrayRecord({name: Array(array) for name, array in arrays.items()})

    def reply(instruction, arrays, count, loss):
        metrics = MetricRecord({"num-examples": count})
        if loss is not None:
            metrics["train_loss"] = loss
        return Message(
            RecordDict({"arrays": record(arrays), "metrics": metrics}), reply_to=instruction
        )

    def run(strategy, server_round, arrays, trained, counts, losses=None):
        instructions = strategy.configure_train(
            server_round, record(arrays), ConfigRecord(), _Grid(len(trained))
        )
        columns = (instructions, trained, counts, losses or [None] * len(counts))
        replies = [reply(*parts) for parts in zip(*columns, strict=True)]
        aggregated, _ = strategy.aggregate_train(server_round, replies)
        return {name: array.numpy() for name, array in aggregated.items()}

    return run


class ScriptedGrid:
    """Nodes whose answers a test writes: node id → function of a message to its replies.

    A reply is a RecordDict, a whole Message, a list of them, or None for silence. `later`
    holds replies that a test brings in when it likes.
    """

    def __init__(self, nodes):
        self.nodes = dict(nodes)
        self.sent = []
        self.later = []
        self._waiting = {}
        self._ids = itertools.count(1)

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(next(self._ids))
            self.sent.append(message)
            self._waiting[message.metadata.message_id] = message
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids):
        arrived, self.later = self.later, []
        for message_id in sorted(message_ids, key=int):
            if message_id in self._waiting:
                message = self._waiting.pop(message_id)
                replies = self.nodes[message.metadata.dst_node_id](message)
                for reply in replies if isinstance(replies, list) else [replies]:
                    if isinstance(reply, RecordDict):
                        reply = Message(reply, reply_to=message)
                    if reply is not None:
                        arrived.append(reply)
        return arrived

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(self.push_messages(messages))


@pytest.fixture
def scripted_grid(task_identity):
    return ScriptedGrid
