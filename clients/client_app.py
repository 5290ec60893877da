"""The ClientApp: each handler reads a message, calls one function and writes the reply."""

from collections.abc import Callable
from functools import wraps

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.client import Client
from clients.deadline import ended_at_deadline
from clients.head_start import moments_task
from clients.local_update import enrol, evaluate_task, train_task
from fleet.config import read_config
from fleet.errors import FleetError
from fleet.message import (
    read_exponent,
    read_state,
    read_task,
    refusal,
    write_bytes,
    write_enrolment,
    write_metrics,
    write_update,
)

app = ClientApp()

Handler = Callable[[Client, RecordDict], RecordDict]


def _answering(handler: Handler) -> Callable[[Message, Context], Message]:
    """A Flower handler that answers what goes wrong on purpose with its reason."""

    @wraps(handler)
    def answer(message: Message, context: Context) -> Message:
        try:
            config = read_config(context.run_config)
            client = Client.of(context.node_id, context.node_config, config)
            with ended_at_deadline(client):
                return Message(handler(client, message.content), reply_to=message)
        except FleetError as error:
            return refusal(error, message)

    return answer


@app.query()
@_answering
def query(client: Client, content: RecordDict) -> RecordDict:
    """Introduce this client."""
    return write_enrolment(enrol(client))


@app.query("moments")
@_answering
def moments(client: Client, content: RecordDict) -> RecordDict:
    """Send the moments of this client's features, from which a first head is solved."""
    task = read_task(content)
    return write_bytes(moments_task(client, task, read_exponent(content)), task.token)


@app.train()
@_answering
def train(client: Client, content: RecordDict) -> RecordDict:
    """Train the server's state on this client's images."""
    task = read_task(content)
    payload, metrics = train_task(client, task, read_state(content, task.plan.get("digest")))
    return write_update(payload, metrics, task.token)


@app.evaluate()
@_answering
def evaluate(client: Client, content: RecordDict) -> RecordDict:
    """Evaluate the server's state on this client's validation images."""
    task = read_task(content)
    result = evaluate_task(client, task, read_state(content, task.plan.get("digest")))
    metrics = {
        "num-examples": result.num_examples,
        "loss": result.loss,
        "accuracy": result.accuracy,
    }
    return write_metrics(metrics, task.token)
