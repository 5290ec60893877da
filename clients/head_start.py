"""Round 0 on one client: the moments from which the server solves for a first head."""

from clients.client import Client
from clients.local_data import local_data, relabel
from clients.model import agree
from fleet.closed_form import encode_moments, moments_of
from fleet.message import Task
from fleet.mobiletl import first_trained_step


def moments_task(client: Client, task: Task, exponent: int) -> bytes:
    """Moments of this client's training images under the pretrained weights.

    What a device reveals by them is said in `fleet.closed_form.wire`.

    Args:
        client: who has the images.
        task: the server's plan, at whose first trained step features are cut and
            cached, and its classes; no state is needed.
        exponent: of the features' step, the server's.

    Raises:
        FleetError: if plan or data do not fit this client.
    """
    own = agree(client, task)
    own.reset()
    backbone, plan = own.backbone, own.plan
    config = client.config
    training, _ = local_data(client.node_config, config.data, config.seed)
    moments = moments_of(
        own.transfer(plan, cut=first_trained_step(backbone.steps, plan)),
        relabel(training, task.classes),
        backbone.preprocessing,
        exponent,
        config.features,
    )
    return encode_moments(moments)
