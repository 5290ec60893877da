import io
import re

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, push_objects
from flwr.supercore.task_identity import TaskIdentity

from fleet.backbones import load_backbone
from fleet.codec import Download, Payload, UnknownVersion, Versions, decode, encode
from fleet.errors import ConfigError, UpdateError
from fleet.message import (
    LOST_VERSION,
    REFUSED,
    Enrolment,
    Task,
    content_bytes,
    read_bytes,
    read_enrolment,
    read_metrics,
    read_state,
    read_task,
    read_token,
    read_update,
    refusal,
    write_bytes,
    write_enrolment,
    write_metrics,
    write_state,
    write_task,
    write_update,
)
from fleet.plan import make_plan
from tests.plans import random_arrays, random_state, toy_plan

PAYLOAD = Payload("int8", "d" * 64, bytes(range(12)))
METRICS = {"num-examples": 7, "loss": 0.1, "peak-bytes": 2**40}
TASK = Task(
    plan={"method": "mobiletl", "blocks": 3, "digest": "d"},
    classes=("cat", "dög"),
    server_round=4,
    run="00ff",
    token="t" * 32,
    acknowledged=3,
)
STEPS = Download(
    ("v1", "v2", "v3"), (Payload("int4", "d" * 64, b"first"), Payload("int4", "d" * 64, b"next"))
)
FULL = Download(("v3",), (Payload("float32", "d" * 64, b"state"),))
NOTHING = Download(("v3",), ())


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


def header(**changes):
    good = dict(write_update(PAYLOAD, METRICS)["header"])
    changed = good | {key.replace("_", "-"): value for key, value in changes.items()}
    return ConfigRecord({key: value for key, value in changed.items() if value is not None})


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
    assert read_task(over_the_wire(write_task(TASK))) == TASK
    assert read_task(write_task(Task({}, (), 1))) == Task({}, (), 1)


@pytest.mark.parametrize("download", [STEPS, FULL, NOTHING], ids=["steps", "full", "nothing"])
def test_a_state_arrives_as_it_was_sent(download):
    content = RecordDict({**write_task(TASK), **write_state(download)})
    arrived = over_the_wire(content)
    assert read_state(arrived, "d" * 64) == download
    assert read_state(arrived, "d" * 64).is_full_state == download.is_full_state
    assert read_task(arrived) == TASK


def test_a_state_is_read_where_it_lies_in_its_message():
    payload = Payload("float32", "d" * 64, bytes(range(200)))
    arrived = over_the_wire(write_state(Download(("v1",), (payload,))))
    read = np.frombuffer(read_state(arrived, "d" * 64).payloads[0].data, np.uint8)
    assert np.shares_memory(read, np.frombuffer(arrived["tensors"]["packed"].data, np.uint8))


def test_one_step_is_not_taken_for_a_full_state():
    step = Download(("v2", "v3"), STEPS.payloads[:1])
    arrived = read_state(over_the_wire(write_state(step)), "d" * 64)
    assert arrived == step
    assert not arrived.is_full_state


def test_versions_of_a_real_state_survive_the_wire():
    plan = toy_plan()
    initial = random_state(plan, 0)
    versions = Versions(initial, "topk:0.1+int4")
    start = versions.newest
    for seed in (1, 2):
        versions.advance(random_state(plan, seed), [seed])
    for held in (start, versions.newest, None):
        download = versions.download(held)
        assert read_state(over_the_wire(write_state(download)), plan.digest) == download


def test_an_update_arrives_as_it_was_sent():
    payload, metrics = read_update(over_the_wire(write_update(PAYLOAD, METRICS)))
    assert (payload, metrics) == (PAYLOAD, METRICS)
    assert {key: type(value) for key, value in metrics.items()} == {
        key: type(value) for key, value in METRICS.items()
    }


def test_tokens_come_back_from_every_kind_of_reply():
    for content in (
        write_update(PAYLOAD, METRICS, "token"),
        write_metrics(METRICS, "token"),
        write_bytes(b"abc", "token"),
    ):
        assert read_token(over_the_wire(content)) == "token"


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"header": ConfigRecord()}),
        RecordDict({"header": MetricRecord({"token": 1})}),
        RecordDict({"header": ConfigRecord({"token": 1})}),
        RecordDict({"header": ConfigRecord({"token": ["token"]})}),
        RecordDict({"header": ConfigRecord({"token": b"token"})}),
        write_enrolment(Enrolment("pi-1", 1, ("cat",))),
    ],
)
def test_a_reply_without_a_token_has_an_empty_one(content):
    assert read_token(content) == ""


@pytest.mark.parametrize("data", [b"", b"\0", bytes(range(256)) * 40])
def test_bytes_arrive_as_they_were_sent(data):
    assert read_bytes(over_the_wire(write_bytes(data, "token"))) == data


def test_metrics_and_enrolment_arrive_as_they_were_sent():
    assert read_metrics(over_the_wire(write_metrics(METRICS))) == METRICS
    enrolment = Enrolment("pi-1", 120, ("cat", "dög", "owl"))
    assert read_enrolment(over_the_wire(write_enrolment(enrolment))) == enrolment


@pytest.fixture(scope="module")
def real_update():
    backbone = load_backbone("mobilenet_v3_small", num_classes=10, image_size=32, weights="none")
    plan = make_plan(backbone, method="mobiletl", blocks=3)
    arrays = random_arrays(plan, 0)
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


@pytest.mark.parametrize(
    "content",
    [
        write_metrics(METRICS, "token"),
        write_bytes(bytes(1000), "token"),
        write_task(TASK),
        RecordDict({**write_task(TASK), **write_state(STEPS)}),
        write_enrolment(Enrolment("pi-1", 120, ("cat", "dög", "owl"))),
        RecordDict(),
    ],
)
def test_content_bytes_are_what_flower_pushes_of_any_kind(content):
    assert content_bytes(content) == sum(map(len, pushed_objects(content).values())) > 0


def test_a_packed_update_is_a_few_objects_however_many_tensors_it_has(real_update):
    plan, _, content = real_update
    assert len(pushed_objects(content)) <= 6 < len(plan.specs)
    assert len(pushed_objects(write_update(PAYLOAD, METRICS))) == len(pushed_objects(content))


def test_a_refusal_carries_its_reason(question):
    reply = refusal(ConfigError("no images here"), question)
    assert not reply.has_content()
    assert (reply.error.code, reply.error.reason) == (REFUSED, "no images here")
    assert reply.metadata.reply_to_message_id == question.metadata.message_id


def test_a_client_without_a_version_refuses_with_a_code_of_its_own(question):
    reply = refusal(UnknownVersion("holds none"), question)
    assert (reply.error.code, reply.error.reason) == (LOST_VERSION, "holds none")
    assert LOST_VERSION != REFUSED


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        with_parts(header=None),
        with_parts(tensors=None),
        with_parts(header=MetricRecord({"codec": 1})),
        with_parts(header=ArrayRecord()),
        with_parts(header=header(codec=None)),
        with_parts(header=header(plan_digest=None)),
        with_parts(header=header(names=["a"])),
        with_parts(extra=ConfigRecord({"a": 1})),
        with_parts(extra=ArrayRecord()),
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


def test_what_is_unknown_in_an_update_is_named_and_cut():
    with pytest.raises(UpdateError, match=r"\(ValueError\('unknown names in the header'\)\)"):
        read_update(with_parts(header=header(names=["a"])))
    with pytest.raises(UpdateError, match=r"\(ValueError\('unknown record extra'\)\)"):
        read_update(with_parts(extra=ConfigRecord({"a": 1})))
    long = "x" * 50_000
    for content in (
        with_parts(header=header(**{long: 1})),
        with_parts(**{long: ConfigRecord()}),
        with_parts(tensors=ArrayRecord({long: Array(np.zeros(12, np.uint8))})),
        with_parts(tensors=npy(b"", dtype=long)),
        with_parts(metrics=MetricRecord({long: [1.0]})),
    ):
        with pytest.raises(UpdateError) as error:
            read_update(content)
        assert len(str(error.value)) < 320


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        write_metrics(METRICS),
        RecordDict({"tensors": ConfigRecord()}),
        RecordDict({"tensors": npy(b"garbage")}),
        RecordDict({"tensors": npy(saved(np.zeros(3, np.float32)))}),
    ],
)
def test_what_is_no_row_of_bytes_is_refused(content):
    with pytest.raises(UpdateError, match=r"message holds no readable payload .*; run the same"):
        read_bytes(content)


def state_header(**changes):
    good = write_state(STEPS)
    return RecordDict({**good, "header": ConfigRecord(dict(good["header"]) | changes)})


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (write_task(TASK), "KeyError"),
        (RecordDict({"header": write_state(STEPS)["header"]}), "KeyError"),
        (RecordDict({"tensors": write_state(STEPS)["tensors"]}), "KeyError"),
        (RecordDict({**write_state(STEPS), "header": MetricRecord()}), "KeyError"),
        (RecordDict({**write_state(STEPS), "header": ConfigRecord()}), "KeyError"),
        (RecordDict({**write_state(STEPS), "tensors": MetricRecord()}), "TypeError"),
        (RecordDict({**write_state(STEPS), "tensors": npy(b"garbage")}), "TypeError|ValueError"),
        (state_header(sizes=3), "TypeError"),
        (state_header(sizes=["five", "four"]), "ValueError"),
        (state_header(sizes=[float("inf"), 4.0]), "OverflowError"),
        (state_header(sizes=[5, 5]), "payloads take 10 bytes, there are 9"),
        (state_header(sizes=[5]), "payloads take 5 bytes, there are 9"),
        (state_header(sizes=[-1, 10]), "payloads take 9 bytes, there are 9"),
        (state_header(sizes=[2**62, -(2**62) + 9]), "payloads take 9 bytes, there are 9"),
        (state_header(versions=["v1", "v2"]), "2 versions for 2 payloads"),
        (state_header(versions=[]), "0 versions for 2 payloads"),
        (state_header(sizes=[9], versions=["v0", "v1", "v2"]), "3 versions for 1 payloads"),
        (state_header(sizes=[9], versions=[]), "0 versions for 1 payloads"),
        (state_header(versions=7), "TypeError"),
    ],
)
def test_what_is_no_state_is_refused(content, why):
    with pytest.raises(
        UpdateError, match=f"message holds no readable state .*({why}).*; run the same version"
    ):
        read_state(content, "d" * 64)


GOOD_TASK = dict(write_task(TASK)["task"])


def test_a_good_task_is_read():
    assert read_task(RecordDict({"task": ConfigRecord(GOOD_TASK)})) == TASK


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
        ConfigRecord(GOOD_TASK | {"classes": "cat"}),
        ConfigRecord(GOOD_TASK | {"acknowledged": "one"}),
        *(ConfigRecord({k: v for k, v in GOOD_TASK.items() if k != key}) for key in GOOD_TASK),
        ConfigRecord(GOOD_TASK | {"server-round": "one"}),
        ConfigRecord(GOOD_TASK | {"server-round": float("inf")}),
    ],
)
def test_what_is_no_task_is_refused(record):
    parts = dict(write_state(STEPS))
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
        ConfigRecord({"name": "pi-1", "num-examples": 1, "classes": "cat"}),
    ],
)
def test_what_is_no_enrolment_is_refused(record):
    content = RecordDict({} if record is None else {"enrolment": record})
    with pytest.raises(UpdateError, match=r"reply holds no readable enrolment .*; run the same"):
        read_enrolment(content)
