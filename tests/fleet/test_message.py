import io
import json
import re

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, push_objects
from flwr.supercore.task_identity import TaskIdentity

from fleet.backbones import load_backbone
from fleet.codec import Payload, decode, encode
from fleet.errors import ConfigError, UpdateError
from fleet.message import (
    REFUSED,
    Enrolment,
    Task,
    content_bytes,
    read_enrolment,
    read_metrics,
    read_task,
    read_update,
    refusal,
    write_enrolment,
    write_metrics,
    write_task,
    write_update,
)
from fleet.plan import make_plan

PAYLOAD = Payload("float32", "d" * 64, ("a", "b"), ((2, 1), (1,)), bytes(range(12)))
METRICS = {"num-examples": 7, "loss": 0.1, "peak-bytes": 2**40}
TASK = Task({"method": "mobiletl", "blocks": 3, "digest": "d"}, ("cat", "dog"), 4, "0f")


def over_the_wire(content):
    """What the receiver inflates from the bytes that Flower pushes."""
    pushed = pushed_objects(content)
    return inflate_object_from_contents(content.object_id, dict(pushed))


def pushed_objects(content):
    pushed = {}
    push_objects(get_all_nested_objects(content), pushed.__setitem__, max_concurrent_pushes=1)
    return pushed


def with_parts(**parts):
    """A good update with other parts in place of its own; None leaves one out."""
    content = dict(write_update(PAYLOAD, METRICS)) | parts
    return RecordDict({name: part for name, part in content.items() if part is not None})


def layout(**changes):
    good = dict(write_update(PAYLOAD, METRICS)["layout"])
    return ConfigRecord(good | {key.replace("_", "-"): value for key, value in changes.items()})


def npy(data, dtype="uint8", shape=(12,)):
    return ArrayRecord({"packed": Array(dtype, shape, "numpy.ndarray", data)})


def npy_header(text, version=b"\x01\x00"):
    text = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text


def saved(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def zipped(array):
    buffer = io.BytesIO()
    np.savez(buffer, array)
    return buffer.getvalue()


@pytest.fixture
def question(monkeypatch):
    for field in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, field, 1)
    return Message(RecordDict(), 2, "train")


def test_a_task_arrives_as_it_was_sent():
    task, payload = read_task(over_the_wire(write_task(TASK, PAYLOAD)))
    assert (task, payload) == (TASK, PAYLOAD)


def test_an_update_arrives_as_it_was_sent():
    payload, metrics = read_update(over_the_wire(write_update(PAYLOAD, METRICS)))
    assert (payload, metrics) == (PAYLOAD, METRICS)
    assert {key: type(value) for key, value in metrics.items()} == {
        key: type(value) for key, value in METRICS.items()
    }


def test_metrics_and_enrolment_arrive_as_they_were_sent():
    assert read_metrics(over_the_wire(write_metrics(METRICS))) == METRICS
    enrolment = Enrolment("pi-1", 120, ("cat", "dög", "owl"))
    assert read_enrolment(over_the_wire(write_enrolment(enrolment))) == enrolment


@pytest.fixture(scope="module")
def real_update():
    backbone = load_backbone("mobilenet_v3_small", num_classes=10, image_size=32, weights="none")
    plan = make_plan(backbone, method="mobiletl", blocks=3)
    rng = np.random.default_rng(0)
    arrays = {s.name: rng.normal(size=s.shape).astype(np.float32) for s in plan.specs}
    return plan, arrays, write_update(encode(arrays, plan), METRICS)


def test_a_real_update_keeps_every_bit(real_update):
    plan, arrays, content = real_update
    payload, _ = read_update(over_the_wire(content))
    decoded = decode(payload, plan)
    assert all(decoded[name].tobytes() == arrays[name].tobytes() for name in plan.by_name)


def test_content_bytes_are_what_flower_pushes(real_update):
    plan, _, content = real_update
    size = content_bytes(content)
    assert size == sum(map(len, pushed_objects(content).values()))
    assert plan.nbytes < size < 1.03 * plan.nbytes


def test_content_bytes_count_metrics_too():
    content = write_metrics(METRICS)
    assert content_bytes(content) == sum(map(len, pushed_objects(content).values())) > 0


def test_a_refusal_carries_its_reason(question):
    reply = refusal(ConfigError("no images here"), question)
    assert not reply.has_content()
    assert (reply.error.code, reply.error.reason) == (REFUSED, "no images here")
    assert reply.metadata.reply_to_message_id == question.metadata.message_id


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        with_parts(layout=None),
        with_parts(tensors=None),
        with_parts(layout=MetricRecord({"codec": 1})),
        with_parts(layout=ConfigRecord({"codec": "float32"})),
        with_parts(layout=layout(shapes=["[2, 1"])),
        with_parts(layout=layout(shapes=["2"])),
        with_parts(layout=layout(shapes=['["x"]'])),
        with_parts(layout=layout(shapes=["[1e999]"])),
        with_parts(layout=layout(shapes=["[" * 100_000])),
        with_parts(layout=layout(shapes=[2, 1])),
        with_parts(layout=layout(names=3)),
        with_parts(tensors=MetricRecord({"packed": 1})),
        with_parts(tensors=ConfigRecord({"packed": b"123"})),
        with_parts(tensors=ArrayRecord({"other": Array(np.zeros(12, np.uint8))})),
        with_parts(tensors=ArrayRecord({"packed": Array(np.zeros(3, np.float32))})),
        with_parts(tensors=ArrayRecord({"packed": Array(np.zeros((3, 4), np.uint8))})),
        with_parts(tensors=npy(b"")),
        with_parts(tensors=npy(b"garbage")),
        with_parts(tensors=npy(zipped(np.zeros(12, np.uint8)))),
        with_parts(tensors=npy(saved(np.array([{}], object), allow_pickle=True))),
        with_parts(tensors=npy(saved(np.zeros(3, np.float32)))),
        with_parts(tensors=npy(saved(np.zeros(12, np.uint8))[:-1])),
        with_parts(tensors=npy(saved(np.zeros(12, np.uint8)) + b"x")),
        with_parts(tensors=npy(npy_header("(((((((") + bytes(12))),
        with_parts(tensors=npy(npy_header("'''") + bytes(12))),
        with_parts(tensors=npy(npy_header("{}", version=b"\x09\x09") + bytes(12))),
    ],
)
def test_what_is_no_payload_is_refused(content):
    with pytest.raises(UpdateError, match=r"message holds no readable payload .*; run the same"):
        read_update(content)


def test_pickled_data_is_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    bomb = saved(np.array([Bomb()], object), allow_pickle=True)
    with pytest.raises(UpdateError, match="packed claims object"):
        read_update(with_parts(tensors=npy(bomb)))
    assert not tmp_path.joinpath("ran").exists()


def test_a_header_that_claims_terabytes_allocates_nothing():
    header = str({"descr": "|u1", "fortran_order": False, "shape": (2**50,)})
    text = f"packed claims uint8 of shape ({2**50},) and holds 12 bytes"
    with pytest.raises(UpdateError, match=re.escape(text)):
        read_update(with_parts(tensors=npy(npy_header(header) + bytes(12))))


@pytest.mark.parametrize("metrics", [None, ConfigRecord({"loss": 1.0}), ArrayRecord()])
def test_an_update_without_metrics_is_refused(metrics):
    with pytest.raises(UpdateError, match="reply holds no metrics; run the same version"):
        read_update(with_parts(metrics=metrics))


def test_a_metric_that_is_a_list_is_refused():
    with pytest.raises(UpdateError, match="metric loss is a list; a single number is expected"):
        read_update(with_parts(metrics=MetricRecord({"loss": [1.0, 2.0]})))


GOOD_TASK = {"plan": json.dumps(TASK.plan), "classes": ["cat"], "server-round": 1}


@pytest.mark.parametrize(
    "record",
    [
        None,
        MetricRecord({"server-round": 1}),
        ConfigRecord({"plan": "{}"}),
        ConfigRecord(GOOD_TASK | {"plan": "{"}),
        ConfigRecord(GOOD_TASK | {"plan": "[1]"}),
        ConfigRecord(GOOD_TASK | {"plan": "[" * 100_000}),
        ConfigRecord(GOOD_TASK | {"plan": 3}),
        ConfigRecord(GOOD_TASK | {"classes": 3}),
        ConfigRecord(GOOD_TASK | {"server-round": "one"}),
        ConfigRecord(GOOD_TASK | {"server-round": float("inf")}),
    ],
)
def test_what_is_no_task_is_refused(record):
    parts = dict(write_task(TASK, PAYLOAD))
    del parts["task"]
    content = RecordDict(parts if record is None else parts | {"task": record})
    with pytest.raises(UpdateError, match=r"message holds no readable task .*; run the same"):
        read_task(content)


@pytest.mark.parametrize(
    "record",
    [
        None,
        MetricRecord({"num-examples": 1}),
        ConfigRecord({"name": "pi-1", "num-examples": 1}),
        ConfigRecord({"name": "pi-1", "num-examples": "many", "classes": ["cat"]}),
        ConfigRecord({"name": "pi-1", "num-examples": float("inf"), "classes": ["cat"]}),
        ConfigRecord({"name": "pi-1", "num-examples": 1, "classes": 2}),
    ],
)
def test_what_is_no_enrolment_is_refused(record):
    content = RecordDict({} if record is None else {"enrolment": record})
    with pytest.raises(UpdateError, match=r"reply holds no readable enrolment .*; run the same"):
        read_enrolment(content)
