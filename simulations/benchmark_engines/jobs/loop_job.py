"""The small job as a plain loop: what no engine can do without."""

from importlib.metadata import version

from marks import Marks


def run(marks: Marks) -> float:
    """Train, and return the loss of the last network."""
    import torch
    from small_task import SAMPLED, SmallNet, cohort, initial_net, loss_over_all, train

    torch.set_num_threads(1)
    server, net = initial_net(), SmallNet()
    for server_round in range(1, marks.last + 1):
        mean: dict[str, torch.Tensor] = {}
        for client in cohort(server_round):
            net.load_state_dict(server.state_dict())
            train(net, client)
            for name, value in net.state_dict().items():
                share = value * (1 / SAMPLED)
                mean[name] = mean[name] + share if name in mean else share
        server.load_state_dict(mean)
        marks.note(server_round)
    return loss_over_all(server)


if __name__ == "__main__":
    marks = Marks()
    marks.imported("torch", lambda: __import__("torch"))
    marks.report(run(marks), {"torch": version("torch")})
