from functools import cache

import numpy as np
import pytest
import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity
from numpy.testing import assert_allclose, assert_array_equal

from clients import head_start, local_update
from clients.client_app import app as real_app
from clients.local_data import local_data
from fleet.backbones import load_backbone
from fleet.codec import Versions, encode
from fleet.codec.names import BASES
from fleet.config import default_settings, read_config
from fleet.errors import PlanError, UpdateError
from fleet.message import Task, content_bytes, write_exponent, write_state, write_task, write_update
from fleet.plan import make_plan
from fleet.state import capture
from simulations.attacks import read_attack
from simulations.hostile import flipping_labels, forging
from simulations.local_engine import LocalGrid
from strategies.gate import Gate

SETTINGS = default_settings() | {
    "backbone": "mobilenet_v3_small",
    "weights": "none",
    "image-size": 32,
    "train-examples": 60,
    "partition": "iid",
    "local-epochs": 1,
    "blocks": "2",
}
CONFIG = read_config(SETTINGS)
CLASSES = tuple("0123456789")
METRICS = {"num-examples": 10, "loss": 1.0, "peak-bytes": 0, "seconds": 0.0}
HOSTILE = frozenset({1, 3})
CODECS = [*BASES, "topk:0.1+int4"]


def admit(content, plan, codec="float32"):
    gate = Gate(plan, codec, spend=lambda client, token: None)
    return gate.admit(content, "x", content_bytes(content))


@pytest.fixture(autouse=True)
def task_identity(monkeypatch):
    for field in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, field, 1)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


@cache
def server():
    """Plan and content of a train message."""
    backbone = load_backbone("mobilenet_v3_small", num_classes=10, image_size=32, weights="none")
    plan = make_plan(backbone, method="mobiletl", blocks=2)
    state = capture(backbone.model, plan)
    task = write_task(Task(plan.summary(), CLASSES, 1, "ab12"))
    return plan, RecordDict({**task, **write_state(Versions(state, "float32").download(None))})


@cache
def trained(client):
    """Client 4 trains one block, the others two."""
    plan = server()[0].narrow(1 if client == 4 else 2)
    rng = np.random.default_rng(client)
    return plan, {
        spec.name: np.square(rng.normal(size=spec.shape)).astype(np.float32) for spec in plan.specs
    }


def app_of(codec="float32", answer=lambda client, message, content: content):
    """A ClientApp that answers at once with what `trained` says, and a token."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        plan, arrays = trained(client)
        content = write_update(encode(arrays, plan, codec, (client,)), METRICS)
        content["header"]["token"] = f"{100 + client}"
        answered = answer(client, message, content)
        if isinstance(answered, RecordDict):
            return Message(answered, reply_to=message)
        return answered

    return app


def replies(app, *interferences, clients=5, kind="train", content=None):
    grid = LocalGrid(app, clients, SETTINGS, interferences=interferences)
    content = content or server()[1]
    return list(
        grid.send_and_receive([Message(content, node, kind) for node in grid.get_node_ids()])
    )


def attacked(spec, codec="float32", **options):
    return replies(app_of(codec, **options), forging(read_attack(spec), HOSTILE, CONFIG))


def test_hostile_clients_send_the_attack_s_deltas_and_the_others_their_own():
    for client, reply in enumerate(attacked("sign_flip:10")):
        plan, arrays = trained(client)
        update = admit(reply.content, server()[0])
        assert update.plan == plan
        for name, delta in update.delta.items():
            assert_array_equal(delta, arrays[name] * (-10 if client in HOSTILE else 1))


def test_an_attack_knows_the_whole_cohort_as_it_trained():
    plan = server()[0]
    sent = [admit(reply.content, plan).delta for reply in attacked("ipm:0.5")]
    honest = {0, 2, 4}
    for name in sent[1]:
        rows = [trained(c)[1][name].astype(float) for c in honest if name in trained(c)[1]]
        assert len(rows) == 3 - (plan.by_name[name].depth == 2)
        for client in HOSTILE:
            assert_allclose(sent[client][name], -0.5 * np.mean(rows, axis=0), rtol=1e-6)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("spec", ["sign_flip:10", "alie", "alie:1.5", "ipm:0.5", "gaussian:0.1"])
def test_the_gate_admits_what_is_forged_in_every_codec(spec, codec):
    for client, reply in enumerate(attacked(spec, codec)):
        update = admit(reply.content, server()[0], codec)
        assert update.plan == trained(client)[0]


@pytest.mark.parametrize("codec", CODECS)
def test_the_gate_refuses_nan_in_every_codec(codec):
    for client, reply in enumerate(attacked("nan", codec)):
        if client in HOSTILE:
            # Of codecs that round, bytes that no encoder writes.
            text = "holds NaN or infinity" if codec == "float32" else "NaN|bytes"
            with pytest.raises(UpdateError, match=text):
                admit(reply.content, server()[0], codec)
        else:
            admit(reply.content, server()[0], codec)


@pytest.mark.parametrize("spec", ["sign_flip:10", "nan"])
def test_all_but_the_tensors_is_as_the_client_wrote_it(spec):
    honest = replies(app_of("int8"))
    for client, (before, after) in enumerate(zip(honest, attacked(spec, "int8"), strict=True)):
        assert after.metadata.src_node_id == before.metadata.src_node_id
        changed = {key for key in before.content if before.content[key] != after.content[key]}
        assert after.content.keys() == before.content.keys()
        assert changed == ({"tensors"} if client in HOSTILE else set())


def test_an_attack_is_the_same_every_time_and_another_for_every_client():
    first, second = (attacked("gaussian:1", "int8") for _ in range(2))
    assert [r.content for r in first] == [r.content for r in second]
    name = server()[0].specs[-1].name
    one, other = (admit(first[c].content, server()[0], "int8").delta[name] for c in sorted(HOSTILE))
    assert (one != other).mean() > 0.5


def test_replies_that_hold_no_update_are_passed_on_and_not_counted():
    def answer(client, message, content):
        if client in (0, 1):
            return Message(Error(7, "no memory"), reply_to=message)
        if client == 2:
            arrays = {n: np.full_like(a, np.nan) for n, a in trained(2)[1].items()}
            return write_update(encode(arrays, trained(2)[0]), METRICS)
        return content

    sent = attacked("ipm:1", answer=answer)
    assert [reply.has_error() for reply in sent] == [True, True, False, False, False]
    plan = server()[0]
    for name, delta in admit(sent[3].content, plan).delta.items():
        only = trained(4)[1].get(name, trained(3)[1][name])  # the other honest one, or itself
        assert_allclose(delta, -only, rtol=1e-6)


def test_a_plan_that_is_not_the_server_s_is_said_and_not_attacked():
    config = read_config(SETTINGS | {"image-size": 64})
    with pytest.raises(PlanError, match="does not match the server's plan: image_size is 64 here"):
        replies(app_of(), forging(read_attack("alie"), HOSTILE, config))


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_labels_are_flipped_for_the_training_of_hostile_clients_alone(monkeypatch, kind):
    seen = []
    function = {"train": "train_locally", "evaluate": "evaluate"}[kind]
    honest = getattr(local_update, function)

    def watch(model, images, *arguments, **options):
        seen.append(images)
        return honest(model, images, *arguments, **options)

    monkeypatch.setattr(local_update, function, watch)
    for reply in replies(flipping_labels(real_app, HOSTILE), clients=4, kind=kind):
        assert reply.has_content(), reply.error
    for client, images in enumerate(seen):
        node = {"partition-id": client, "num-partitions": 4}
        own = local_data(node, CONFIG.data, CONFIG.seed)[kind == "evaluate"]
        flipped = client in HOSTILE and kind == "train"
        assert_array_equal(images.labels, 9 - own.labels if flipped else own.labels)
    assert len(seen) == 4
    assert local_update.relabel.__module__ == "clients.local_data"


def test_moments_of_hostile_clients_are_those_of_flipped_labels(monkeypatch):
    seen = []
    honest = head_start.moments_of

    def watch(model, images, *arguments):
        seen.append(images)
        return honest(model, images, *arguments)

    monkeypatch.setattr(head_start, "moments_of", watch)
    content = RecordDict({**server()[1], **write_exponent(-20)})
    app = flipping_labels(real_app, HOSTILE)
    for reply in replies(app, clients=4, kind="query.moments", content=content):
        assert reply.has_content(), reply.error
    for client, images in enumerate(seen):
        node = {"partition-id": client, "num-partitions": 4}
        own = local_data(node, CONFIG.data, CONFIG.seed)[0].labels
        assert_array_equal(images.labels, 9 - own if client in HOSTILE else own)
    assert len(seen) == 4
    assert head_start.relabel.__module__ == "clients.local_data"


def test_labels_are_right_again_after_a_client_that_failed():
    def fail(message, context):
        raise MemoryError

    app = flipping_labels(fail, HOSTILE)
    assert [reply.has_error() for reply in replies(app)] == [True] * 5
    assert local_update.relabel.__module__ == "clients.local_data"
