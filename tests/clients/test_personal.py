"""What is a client's own over several rounds: its norms, and its part of FedDyn."""

import dataclasses

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from clients.client import Client
from clients.local_update import evaluate_task, train_task
from clients.personal import _gradients
from clients.round_memory import RoundMemory
from fleet.backbones import load_backbone
from fleet.codec import Versions, decode
from fleet.config import default_settings, read_config
from fleet.errors import ConfigError, UpdateError
from fleet.message import Task
from fleet.plan import make_plan
from fleet.state import TrainableState, capture

pytestmark = pytest.mark.usefixtures("quick_runs")

SMALL = {
    "backbone": "mobilenet_v3_small",
    "weights": "none",
    "image-size": 32,
    "train-examples": 60,
    "validation-fraction": 0.3,
    "partition": "iid",
    "local-epochs": 1,
    "blocks": "2",
    "batch-size": 4,
    "cache": "off",
}
CLASSES = tuple("0123456789")
LOCAL = {"local-norms": True, "evaluation": "clients"}
DYNAMIC = {"objective": "feddyn", "strategy": "feddyn", "rule": "mean", "objective-strength": 0.5}


@pytest.fixture(autouse=True)
def state(monkeypatch, tmp_path):
    monkeypatch.setenv("FLEET_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def client(number=0, blocks=2, **settings):
    node = {"partition-id": number, "num-partitions": 3, "blocks": blocks}
    return Client.of(7, node, read_config(default_settings() | SMALL | settings))


def memory_of(own):
    """What a client remembers by now."""
    return RoundMemory(own.memory("0f"), 1000)


def server(local_norms=False):
    """Backbone, plan, and function (round, run) → task and initial state."""
    backbone = load_backbone(
        "mobilenet_v3_small", num_classes=10, image_size=32, weights="none", classes=CLASSES
    )
    plan = make_plan(backbone, method="mobiletl", blocks=2, local_norms=local_norms)
    rng = np.random.default_rng(0)  # at a head of zeros nothing below it would learn
    with torch.no_grad():
        backbone.head.weight.copy_(torch.tensor(0.1 * rng.normal(size=backbone.head.weight.shape)))
    initial = capture(backbone.model, plan).tensors

    def ask(server_round=1, run="0f"):
        task = Task(plan.summary(), CLASSES, server_round, run, acknowledged=server_round - 1)
        return task, whole(initial, plan)

    return backbone, plan, ask


def whole(tensors, plan):
    """A download that is a state itself."""
    return Versions(TrainableState(plan, tensors), "float32").download(None)


# Local norms


def test_no_norm_travels_and_all_that_trained_is_kept():
    _, plan, ask = server(local_norms=True)
    own = client(blocks=1, **LOCAL)
    payload, _ = train_task(own, *ask())
    narrow = plan.narrow(1)
    assert decode(payload, narrow).keys() == narrow.by_name.keys()
    assert all(spec.role in ("weight", "bias") for spec in narrow.specs)
    kept = memory_of(own).read("norms").tensors
    assert kept.keys() == {spec.name for spec in narrow.local_specs} and kept
    assert {s.role for s in narrow.local_specs} == {"shift", "scale", "mean", "var"}


def test_training_and_evaluation_go_on_with_the_clients_own_norms():
    """The second round equals one step by step with the norms of the first put in by hand."""
    backbone, plan, ask = server(local_norms=True)
    own, plain = client(**LOCAL), client()
    train_task(own, *ask(1))
    norms = memory_of(own).read("norms").tensors
    pretrained = {n: backbone.model.state_dict()[n].numpy().copy() for n in norms}
    assert any(not np.array_equal(norms[n], pretrained[n]) for n in norms)

    # The same model, whose norms travel: it is sent this client's.
    full = make_plan(backbone, method="mobiletl", blocks=2)
    tensors = {**capture(backbone.model, full).tensors, **norms}
    task = Task(full.summary(), CLASSES, 2, "aa")
    evaluated = evaluate_task(plain, task, whole(tensors, full))
    assert evaluate_task(own, *ask(1)) == evaluated
    with_pretrained = evaluate_task(plain, task, whole(tensors | pretrained, full))
    assert evaluated.loss != with_pretrained.loss

    deltas = decode(train_task(own, *ask(2))[0], plan)
    theirs = decode(train_task(plain, task, whole(tensors, full))[0], full)
    for name, delta in deltas.items():
        assert_array_equal(delta, theirs[name])
    after = memory_of(own).read("norms").tensors
    for name, array in after.items():
        wanted = theirs[name] if full.by_name[name].is_statistic else norms[name] + theirs[name]
        assert_allclose(array, wanted, rtol=1e-5, atol=1e-6)


def test_clients_of_one_process_do_not_see_each_others_norms():
    _, plan, ask = server(local_norms=True)
    alone = [decode(train_task(client(1, **LOCAL), *ask(r, "aa"))[0], plan) for r in (1, 2)]
    mixed = []
    for r in (1, 2):
        train_task(client(0, **LOCAL), *ask(r, "bb"))
        mixed.append(decode(train_task(client(1, **LOCAL), *ask(r, "bb"))[0], plan))
        evaluate_task(client(2, **LOCAL), *ask(r, "bb"))
    for one, other in zip(alone, mixed, strict=True):
        for name in one:
            assert_array_equal(one[name], other[name])


def test_a_run_begins_with_pretrained_norms():
    _, _, ask = server(local_norms=True)
    first = train_task(client(**LOCAL), *ask(1, "aa"))[0].data
    train_task(client(**LOCAL), *ask(2, "aa"))
    assert train_task(client(**LOCAL), *ask(1, "bb"))[0].data == first


def test_norms_of_a_wider_round_stay():
    _, plan, ask = server(local_norms=True)
    train_task(client(blocks=2, **LOCAL), *ask(1))
    wide = memory_of(client(**LOCAL)).read("norms").tensors
    train_task(client(blocks=1, **LOCAL), *ask(2))
    after = memory_of(client(**LOCAL)).read("norms").tensors
    assert after.keys() == wide.keys()
    narrow = {spec.name for spec in plan.narrow(1).local_specs}
    same = {name for name in wide if np.array_equal(wide[name], after[name])}
    assert wide.keys() - narrow <= same and not narrow <= same


def test_damaged_or_foreign_norms_are_the_pretrained_ones(state):
    _, _, ask = server(local_norms=True)
    anew = train_task(client(**LOCAL), *ask(2, run="aa"))[0].data
    train_task(client(**LOCAL), *ask(1))
    (path,) = state.rglob("0f/*/norms-*.safetensors")
    whole_file = path.read_bytes()
    path.write_bytes(whole_file[:-1])
    assert train_task(client(**LOCAL), *ask(2))[0].data == anew
    path.write_bytes(whole_file)
    assert train_task(client(**LOCAL), *ask(2))[0].data != anew
    memory = RoundMemory(client(**LOCAL).memory("0f"), 1)
    kept = memory_of(client(**LOCAL)).read("norms").tensors
    memory.write("norms", {name: np.zeros(3, np.float32) for name in kept})  # of another shape
    assert train_task(client(**LOCAL), *ask(2))[0].data == anew


# Objectives


def test_fedprox_stays_nearer_and_remembers_nothing(state):
    _, plan, ask = server()
    sizes = {}
    for strength in (None, 1.0, 20.0):
        settings = {"objective": "fedprox", "objective-strength": strength} if strength else {}
        payload, _ = train_task(client(**settings), *ask())
        delta = decode(payload, plan)
        sizes[strength] = sum(
            np.square(delta[s.name]).sum() for s in plan.specs if not s.is_statistic
        )
    assert sizes[None] > sizes[1.0] > sizes[20.0]
    assert not state.exists()


def test_the_first_round_of_feddyn_is_fedprox_and_the_next_is_not():
    _, _, ask = server()
    prox = {"objective": "fedprox", "objective-strength": 0.5}
    for server_round, same in ((1, True), (2, False)):
        dynamic, near = (
            train_task(client(**settings), *ask(server_round))[0].data
            for settings in (DYNAMIC, prox)
        )
        assert (dynamic == near) is same


@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_feddyn_remembers_the_gradients_that_its_sent_deltas_make(codec):
    """h = −μ·Σ delta as the server reads them, so that both sides' sums agree."""
    _, plan, ask = server()
    sums = {}
    for server_round, blocks in ((1, 2), (2, 1), (3, 2)):
        own = client(blocks=blocks, **DYNAMIC, **{"codec-up": codec})
        narrow = plan.narrow(blocks)
        delta = decode(train_task(own, *ask(server_round))[0], narrow)
        for spec in narrow.specs:
            if not spec.is_statistic:
                sums[spec.name] = sums.get(spec.name, 0) + delta[spec.name].astype(float)
    kept = _gradients(memory_of(own), plan, 0.5, acknowledged=3)
    assert kept.keys() == sums.keys()
    for name, total in sums.items():
        assert_allclose(kept[name], -0.5 * total, rtol=1e-4, atol=1e-7)


def test_an_update_that_was_lost_moves_feddyns_gradients_on_neither_side():
    _, plan, ask = server()
    own = client(**DYNAMIC)
    first = decode(train_task(own, *ask(1))[0], plan)
    train_task(own, *ask(2))  # acknowledges round 1
    task, download = ask(3)
    train_task(own, dataclasses.replace(task, acknowledged=1), download)  # round 2 was lost
    kept = _gradients(memory_of(own), plan, 0.5, acknowledged=1)  # and so was this
    for spec in plan.specs:
        if not spec.is_statistic:
            assert_allclose(kept[spec.name], -0.5 * first[spec.name], rtol=1e-5, atol=1e-8)


def test_feddyn_with_local_norms_leaves_them_alone():
    _, plan, ask = server(local_norms=True)
    own = client(**DYNAMIC, **LOCAL)
    train_task(own, *ask())
    kept = _gradients(memory_of(own), plan, 0.5, acknowledged=1)
    assert kept.keys() == plan.by_name.keys()
    assert memory_of(own).read("norms").tensors.keys().isdisjoint(plan.by_name)


def test_what_cannot_be_remembered_is_a_refusal(state):
    state.write_text("a file")
    _, _, ask = server()
    with pytest.raises(
        ConfigError, match=r"cannot read .*state.*; make it readable .*set state-dir to"
    ):
        train_task(client(**DYNAMIC), *ask())


def test_a_run_without_an_id_is_refused():
    _, _, ask = server()
    with pytest.raises(
        UpdateError, match=r"a run's id is 1 to 64 digits from 0 to f, got '\.\./x'"
    ):
        train_task(client(), *ask(run="../x"))


def test_a_budget_counts_the_targets_of_the_objective():
    _, _, ask = server()
    peaks = {}
    for objective in ("plain", "fedprox"):
        own = client(objective=objective, **{"budget-mib": "40"})
        _, metrics = train_task(own, *ask())
        planned, peaks[objective] = metrics["planned-peak-bytes"], metrics["peak-bytes"]
        assert peaks[objective] <= 1.02 * planned
    assert peaks["fedprox"] > peaks["plain"]


# Where it lies


def test_simulated_clients_remember_in_their_run_and_devices_in_theirs(state, tmp_path):
    def folder(node, **settings):
        config = read_config(default_settings() | settings)
        return Client.of(1, node, config).memory("0f")._folder

    run, own = {"run-dir": str(tmp_path / "run")}, {"state-dir": str(tmp_path / "own")}
    simulated, device = {"partition-id": 0, "num-partitions": 2}, {"data": "images"}
    assert folder(simulated, **run).is_relative_to(tmp_path / "run" / "clients" / "0f")
    assert folder(simulated).is_relative_to(state)
    assert folder(simulated, **run, **own).is_relative_to(tmp_path / "own")
    assert folder(device, **run).is_relative_to(state)
    assert folder(device, **run, **own).is_relative_to(tmp_path / "own")
