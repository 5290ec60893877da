"""Updates with error feedback over restarts, lost replies, other plans and damaged memories."""

import numpy as np
import pytest

from clients.feedback import encode_update
from clients.memory import ClientMemory
from clients.round_memory import RoundMemory
from fleet.codec import decode, encode
from fleet.errors import UpdateError
from tests.plans import random_arrays, toy_plan

pytestmark = pytest.mark.usefixtures("quick_runs")

WIDEST = toy_plan()
NARROW = WIDEST.narrow(1)
CODECS = ("float16+feedback", "int4+feedback", "topk:0.1", "topk:0.1+int4")
WEIGHTS = [spec.name for spec in WIDEST.specs if not spec.is_statistic]


class Device:
    """A client whose process starts anew for every message, and whose replies may be lost."""

    def __init__(self, directory, codec, run="ab"):
        self.directory, self.codec, self.run = directory, codec, run
        self.due = {spec.name: np.zeros(spec.shape) for spec in WIDEST.specs}
        self.applied = {name: array.copy() for name, array in self.due.items()}
        self.lost = {name: array.copy() for name, array in self.due.items()}

    def memory(self, server_round=1000):
        return RoundMemory(ClientMemory(self.directory, self.run, "pi-1"), server_round)

    def train(self, server_round, *, arrives, plan=WIDEST, update=None):
        update = random_arrays(plan, server_round) if update is None else update
        payload = encode_update(
            update,
            plan,
            WIDEST,
            self.codec,
            (1, server_round),
            self.memory(server_round),
        )
        for name, array in update.items():
            self.due[name] += array
        for name, array in decode(payload, plan).items():
            (self.applied if arrives else self.lost)[name] += array
        return payload


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("seed", range(4))
def test_what_was_sent_and_what_is_remembered_is_all_that_was_due(tmp_path, seed, codec):
    rng = np.random.default_rng(seed)
    device = Device(tmp_path, codec)
    for server_round in range(1, 15):
        plan = WIDEST.narrow(int(rng.integers(3)))
        device.train(server_round, arrives=rng.random() < 0.6, plan=plan)
    device.train(15, arrives=True)
    remembered = device.memory().read("feedback").tensors
    for name in WEIGHTS:
        left = device.due[name] - device.applied[name] - device.lost[name]
        scale = np.abs(device.due[name]).max()
        np.testing.assert_allclose(remembered[name], left, atol=1e-5 * scale)


@pytest.mark.parametrize("codec", CODECS)
def test_a_device_that_is_never_heard_sends_no_more_each_time(tmp_path, codec):
    """What it leaves out stays bounded, and a lost update is not sent again."""
    device = Device(tmp_path, codec)
    update = random_arrays(WIDEST, 3)
    sizes = []
    for server_round in range(1, 41):
        sent = decode(device.train(server_round, arrives=False, update=update), WIDEST)
        sizes.append(np.sqrt(sum(np.square(sent[name]).sum() for name in WEIGHTS)))
    own = np.sqrt(sum(np.square(update[name]).sum() for name in WEIGHTS))
    assert max(sizes[-10:]) < 3 * own


@pytest.mark.parametrize("codec", CODECS)
def test_the_next_update_carries_what_was_left_out(tmp_path, codec):
    device = Device(tmp_path, codec)
    update = random_arrays(WIDEST, 3)
    first = device.train(1, arrives=True, update=update)
    left = {name: update[name] - decode(first, WIDEST)[name] for name in WEIGHTS}
    second = device.train(4, arrives=True, update=update)
    due = {name: update[name] + left.get(name, 0) for name in update}
    assert second == encode(due, WIDEST, codec, (1, 4))


@pytest.mark.parametrize("codec", ["float32", "float16", "int8", "int4"])
def test_without_feedback_nothing_is_remembered(tmp_path, codec):
    device = Device(tmp_path, codec)
    for server_round in (1, 2):
        update = random_arrays(WIDEST, server_round)
        payload = device.train(server_round, arrives=False, update=update)
        assert payload == encode(update, WIDEST, codec, (1, server_round))
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_plan_changed_starts_anew(tmp_path):
    device = Device(tmp_path, "topk:0.1+int4")
    device.train(1, arrives=False)
    other = toy_plan(width=7)
    update = random_arrays(other, 2)
    payload = encode_update(update, other, other, device.codec, (1, 2), device.memory(2))
    assert payload == encode(update, other, device.codec, (1, 2))
    assert device.memory().read("feedback").facts["plan"] == other.digest


def test_another_run_has_a_memory_of_its_own(tmp_path):
    Device(tmp_path, "topk:0.1+int4", run="ab").train(1, arrives=False)
    update = random_arrays(WIDEST, 2)
    payload = Device(tmp_path, "topk:0.1+int4", run="cd").train(2, arrives=True, update=update)
    assert payload == encode(update, WIDEST, "topk:0.1+int4", (1, 2))


def test_a_damaged_memory_starts_anew(tmp_path):
    device = Device(tmp_path / "damaged", "topk:0.1+int4")
    device.train(1, arrives=False)
    (file,) = tmp_path.rglob("feedback-*.safetensors")
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    update = random_arrays(WIDEST, 2)
    payload = device.train(2, arrives=True, update=update)
    assert payload == encode(update, WIDEST, device.codec, (1, 2))


def test_an_update_that_is_not_finite_is_refused_and_changes_no_memory(tmp_path):
    device = Device(tmp_path, "topk:0.1+int4")
    device.train(1, arrives=False)
    (file,) = tmp_path.rglob("feedback-*.safetensors")
    before = file.read_bytes()
    broken = random_arrays(WIDEST, 2) | {"head.bias": np.array([1, np.inf, 1], np.float32)}
    with pytest.raises(UpdateError, match=r"head\.bias holds NaN or infinity; lower the learning"):
        device.train(2, arrives=False, update=broken)
    assert file.read_bytes() == before
