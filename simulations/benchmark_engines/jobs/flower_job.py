"""A job as a Flower app: the task that is named, on the engine, `local` with so many workers or
`flower`."""

import logging
from importlib import import_module
from importlib.metadata import version

from marks import Marks


def run(marks: Marks, task_name: str, engine: str, workers: str) -> float:
    """Train, and return the loss of the last network."""
    import torch
    from app import client_app, server_app

    task = import_module(task_name)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    nets: list[torch.nn.Module] = []
    server = server_app(task, marks.last, marks.note, nets.append)
    if engine == "local":
        from simulations.local_engine import run_local

        run_local(server, client_app, {}, task.CLIENTS, workers=int(workers))
    else:
        from flwr.simulation import run_simulation

        # A core a client, as many at a time as there are cores.
        run_simulation(
            server, client_app, task.CLIENTS, backend_config={"client_resources": {"num_cpus": 1}}
        )
    (net,) = nets
    torch.set_num_threads(1)
    return task.loss_over_all(net)


def _load_flower() -> None:
    import flwr.app
    import flwr.clientapp
    import flwr.serverapp  # noqa: F401


if __name__ == "__main__":
    marks = Marks()
    marks.imported("torch", lambda: __import__("torch"))
    marks.imported("flwr", _load_flower)
    loss = run(marks, *marks.rest)
    marks.report(loss, {name: version(name) for name in ("torch", "flwr", "ray")})
