"""A job as a plain loop, the task that is named: what no engine can do without."""

from importlib import import_module
from importlib.metadata import version

from marks import Marks


def run(marks: Marks, task_name: str) -> float:
    """Train, and return the loss of the last network."""
    import torch

    task = import_module(task_name)
    torch.set_num_threads(1)
    server, net = task.initial_net(), task.initial_net()
    for server_round in range(1, marks.last + 1):
        mean: dict[str, torch.Tensor] = {}
        for client in task.cohort(server_round):
            net.load_state_dict(server.state_dict())
            task.train(net, client)
            for name, value in net.state_dict().items():
                share = value * (1 / task.SAMPLED)
                mean[name] = mean[name] + share if name in mean else share
        server.load_state_dict(mean)
        marks.note(server_round)
    return task.loss_over_all(server)


if __name__ == "__main__":
    marks = Marks()
    marks.imported("torch", lambda: __import__("torch"))
    marks.report(run(marks, *marks.rest), {"torch": version("torch")})
