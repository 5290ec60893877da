"""The small job on pfl-research: its FedAvg in its simulated backend, data as tensors in memory.

One process: its workers are Horovod's, which do not run on one machine's cores without MPI.
"""

from importlib.metadata import version

from marks import Marks


def run(marks: Marks) -> float:
    """Train, and return the loss of the last network."""
    import torch
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel
    from small_task import (
        BATCH,
        CLIENTS,
        LEARNING_RATE,
        SAMPLED,
        cohort,
        everybodys_images,
        initial_net,
        loss_over_all,
    )

    torch.set_num_threads(1)
    net = initial_net()
    # pfl asks the module for both; it evaluates before the first round, here nothing.
    net.loss = lambda images, labels: torch.nn.functional.cross_entropy(net(images), labels)
    net.metrics = lambda images, labels: {}
    images, labels = everybodys_images()
    users = {
        client: PyTorchTensorDataset((images[client], labels[client])) for client in range(CLIENTS)
    }
    order = (client for r in range(1, marks.last + 1) for client in cohort(r))
    data = FederatedDataset(users.__getitem__, lambda: next(order))

    class Noting(TrainingProcessCallback):
        def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
            marks.note(central_iteration + 1)
            return False, Metrics()

    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=marks.last,
            evaluation_frequency=marks.last + 1,
            train_cohort_size=SAMPLED,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=data, val_data=data),
        model=PyTorchModel(
            model=net,
            local_optimizer_create=torch.optim.SGD,
            central_optimizer=torch.optim.SGD(net.parameters(), lr=1.0),
        ),
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=LEARNING_RATE, local_batch_size=BATCH
        ),
        callbacks=[Noting()],
        send_metrics_to_platform=False,
    )
    return loss_over_all(net)


if __name__ == "__main__":
    marks = Marks()
    marks.imported("torch", lambda: __import__("torch"))
    marks.report(run(marks), {name: version(name) for name in ("torch", "pfl")})
