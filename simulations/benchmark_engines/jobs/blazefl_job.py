"""The small job on BlazeFL: its FedAvg, clients `serial`, in two `threads` or two `processes`.

A client's loader is its list of batches: BlazeFL only iterates over it, and a DataLoader
would collate image by image.
"""

import os
import tempfile
from importlib.metadata import version
from pathlib import Path

from marks import Marks

os.environ["TQDM_DISABLE"] = "1"  # no progress bars
_PARALLEL = 2


class Nets:
    """BlazeFL's ModelSelector."""

    def select_model(self, model_name):
        from small_task import initial_net

        return initial_net()


class Images:
    """BlazeFL's PartitionedDataset: what its trainers ask of one."""

    def get_dataloader(self, type_, cid, batch_size, generator):
        from small_task import batches

        return _Batches(batches(cid))

    def set_dataset(self, type_, cid, dataset):
        """Clients' images never change."""


class _Batches(list):
    dataset = None  # a trainer in a process hands it back


def run(marks: Marks, mode: str) -> float:
    """Train, and return the loss of the last network."""
    import torch
    from blazefl.contrib.fedavg import (
        FedAvgBaseClientTrainer,
        FedAvgBaseServerHandler,
        FedAvgProcessPoolClientTrainer,
        FedAvgThreadPoolClientTrainer,
    )
    from blazefl.core import IPCMode
    from small_task import (
        BATCH,
        CLIENTS,
        LEARNING_RATE,
        SAMPLED,
        SEED,
        cohort,
        everybodys_images,
        loss_over_all,
    )

    torch.set_num_threads(1)
    everybodys_images()  # before processes are forked

    class Handler(FedAvgBaseServerHandler):
        def sample_clients(self):
            return cohort(self.round + 1)

    handler = Handler(
        model_selector=Nets(),
        model_name="small",
        dataset=Images(),
        global_round=marks.last,
        num_clients=CLIENTS,
        sample_ratio=SAMPLED / CLIENTS,
        device="cpu",
        batch_size=BATCH,
        seed=SEED,
    )
    common = dict(
        model_selector=Nets(),
        model_name="small",
        dataset=Images(),
        device="cpu",
        num_clients=CLIENTS,
        epochs=1,
        batch_size=BATCH,
        lr=LEARNING_RATE,
        seed=SEED,
    )
    with tempfile.TemporaryDirectory() as folder:
        if mode == "serial":
            trainer = FedAvgBaseClientTrainer(**common)
        elif mode == "threads":
            trainer = FedAvgThreadPoolClientTrainer(**common, num_parallels=_PARALLEL)
        else:
            trainer = FedAvgProcessPoolClientTrainer(
                **common,
                share_dir=Path(folder) / "share",
                state_dir=Path(folder) / "state",
                num_parallels=_PARALLEL,
                ipc_mode=IPCMode.SHARED_MEMORY,
            )
        while not handler.if_stop():
            trainer.local_process(handler.downlink_package(), handler.sample_clients())
            for package in trainer.uplink_package():
                handler.load(package)
            marks.note(handler.round)
    return loss_over_all(handler.model)


if __name__ == "__main__":
    marks = Marks()
    marks.imported("torch", lambda: __import__("torch"))
    marks.report(run(marks, marks.rest[0]), {name: version(name) for name in ("torch", "blazefl")})
