import numpy as np
import pytest

from fleet.codec import Versions
from fleet.state import TrainableState
from strategies.ledger import Ledger, Traffic, download_roles


def test_a_reason_is_kept_and_another_is_put_behind_it():
    ledger = Ledger()
    ledger.refuse("pi-1", "NaN in head.weight")
    ledger.refuse("pi-1", "evaluation: no reply within 5 s")
    ledger.refuse("pi-2", "node is offline")
    assert ledger.refused == {
        "pi-1": "NaN in head.weight; evaluation: no reply within 5 s",
        "pi-2": "node is offline",
    }


def test_what_keeps_a_client_from_training_and_from_evaluating_is_booked_once():
    ledger = Ledger()
    ledger.refuse("pi-1", "it is too hot")
    ledger.refuse("pi-1", "it is too hot", "evaluation: ")
    ledger.refuse("pi-1", "its disk is full", "evaluation: ")
    ledger.refuse("pi-2", "its disk is full", "evaluation: ")
    assert ledger.refused == {
        "pi-1": "it is too hot; evaluation: its disk is full",
        "pi-2": "evaluation: its disk is full",
    }


def test_a_reason_said_over_and_over_is_booked_once():
    ledger = Ledger()
    for _ in range(1000):
        ledger.refuse("pi-1 (again)", "reply to no message")
    assert ledger.refused == {"pi-1 (again)": "reply to no message"}


def test_of_a_long_reason_the_end_is_booked():
    ledger = Ledger()
    ledger.refuse("pi-1", "x" * 10_000_000 + " RuntimeError: out of memory")
    ledger.refuse("pi-1", "y" * 10_000)
    ledger.refuse("pi-2", "x" * 1_000_000 + " RuntimeError: out of memory")
    assert len(ledger.refused["pi-1"]) == len(ledger.refused["pi-2"]) == 2000
    assert ledger.refused["pi-2"].endswith("x RuntimeError: out of memory")


@pytest.mark.parametrize("reason", [None, "", " \n ", "\x00\x07"])
def test_no_reason_is_one_too(reason):
    ledger = Ledger()
    ledger.refuse("pi-1", reason)
    assert ledger.refused == {"pi-1": "no reason given"}


def test_a_reason_cannot_move_a_terminals_cursor():
    ledger = Ledger()
    ledger.refuse("pi-1", "line one\n\x1b[2Jline two\r")
    assert ledger.refused == {"pi-1": "line one\n[2Jline two"}


def test_tensors_of_an_update_move_out_of_the_headers():
    traffic = Traffic()
    traffic.add("pi-1", 100)
    traffic.add("pi-2", 50, {"weight": 30})
    assert dict(traffic.by_role) == {"headers": 120, "weight": 30}
    traffic.find_roles({"weight": 60, "shift": 10})
    assert dict(traffic.by_role) == {"headers": 50, "weight": 90, "shift": 10}
    assert traffic.total == 150 == sum(traffic.by_role.values())


def test_updates_are_reported_by_name_with_means_by_examples(toy_plan, random_update):
    ledger = Ledger(asked=("a", "b", "c"))
    rng = np.random.default_rng(0)
    for name, count in (("c", 10), ("a", 30)):
        update = random_update(name, toy_plan, rng, num_examples=count)
        ledger.updates.append(update)
    report = ledger.report(3)
    assert [client.name for client in report.clients] == ["a", "c"]
    assert (report.server_round, report.train_loss, report.asked) == (3, 1.0, ("a", "b", "c"))
    assert not report.stepped


def test_an_empty_round_has_a_report(toy_plan):
    report = Ledger().report(1)
    assert (report.train_loss, report.peak_client_bytes, report.bytes_up) == (None, 0, 0)


@pytest.mark.parametrize("held", ["newest", None])
def test_roles_of_a_download_are_its_tensors_bytes(toy_plan, held):
    arrays = {s.name: np.ones(s.shape, np.float32) for s in toy_plan.specs}
    versions = Versions(TrainableState(toy_plan, arrays), "int8")
    download = versions.download(versions.newest if held else None)
    roles = {}
    for spec in toy_plan.specs if held is None else ():
        roles[spec.role] = roles.get(spec.role, 0) + spec.nbytes
    assert download_roles(download, toy_plan) == roles
