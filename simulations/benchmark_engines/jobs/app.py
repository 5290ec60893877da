"""A job as a Flower app: Flower's FedAvg, the same on either engine.

The server names task and client in the message, and averages in that order: Flower's own engine
draws node ids at random and hands over replies as they come.
"""

from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module
from types import ModuleType

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.serverapp.strategy.strategy_utils import sample_nodes
from torch import nn

client_app = ClientApp()


@cache
def _net(task: ModuleType) -> nn.Module:
    """Built once a process."""
    return task.initial_net()


@client_app.train()
def _train(message: Message, context: Context) -> Message:
    config = message.content["config"]
    task, client = import_module(config["task"]), config["client"]
    net = _net(task)
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    task.train(net, client)
    metrics = MetricRecord({"num-examples": task.IMAGES, "client": client})
    content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)


class _SameCohorts(FedAvg):
    """FedAvg whose cohorts and order of summing depend on the round alone."""

    def __init__(self, task: ModuleType, on_round: Callable[[int], None]) -> None:
        super().__init__(fraction_evaluate=0.0, min_available_nodes=task.CLIENTS)
        self._task = task
        self._on_round = on_round

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        task = self._task
        _, nodes = sample_nodes(grid, task.CLIENTS, task.SAMPLED)
        nodes = sorted(nodes)
        return [
            Message(
                RecordDict(
                    {
                        "arrays": arrays,
                        "config": ConfigRecord({"task": task.__name__, "client": client}),
                    }
                ),
                nodes[client],
                "train",
            )
            for client in task.cohort(server_round)
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        for reply in replies:
            if reply.has_error():
                raise RuntimeError(reply.error.reason)
        replies.sort(key=lambda reply: reply.content["metrics"]["client"])
        return super().aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._on_round(server_round)  # what was trained is averaged
        return []


def server_app(
    task: ModuleType,
    rounds: int,
    on_round: Callable[[int], None],
    on_end: Callable[[nn.Module], None],
) -> ServerApp:
    """A ServerApp of so many rounds that tells of the end of each, and of the last network."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        net = task.initial_net()
        arrays = ArrayRecord(net.state_dict())
        result = _SameCohorts(task, on_round).start(grid, arrays, num_rounds=rounds)
        net.load_state_dict(result.arrays.to_torch_state_dict())
        on_end(net)

    return app
