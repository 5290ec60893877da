import dataclasses
import datetime
import logging

import pytest

from fleet.deploy.certificates import make_device_key, public_pem
from fleet.deploy.control import ControlError, Node
from fleet.deploy.membership import Membership
from fleet.deploy.registry import Device

NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


class FakeNodes:
    """Flower's list of nodes: a key that was unregistered never comes back."""

    def __init__(self):
        self.listed = {}
        self.calls = []
        self.refused = set()

    def nodes(self):
        return list(self.listed.values())

    def register(self, public_key, name):
        if name in self.refused or public_key in self.listed:
            raise ControlError(f"the SuperLink did not register {name}", refused=True)
        self.calls.append(("register", name))
        self.listed[public_key] = Node(len(self.listed) + 1, public_key, "registered")

    def unregister(self, node_id):
        (key,) = (key for key, node in self.listed.items() if node.id == node_id)
        self.calls.append(("unregister", node_id))
        self.listed[key] = dataclasses.replace(self.listed[key], status="unregistered")

    def taking_part(self):
        return {key for key, node in self.listed.items() if node.status != "unregistered"}


def devices(*names):
    return {name: Device(name, make_device_key()[1], NOW) for name in names}


def keys(registry):
    return {public_pem(d.public_key) for d in registry.values() if d.revoked is None}


@pytest.fixture
def nodes():
    return FakeNodes()


@pytest.fixture
def membership():
    return Membership()


def test_devices_are_registered_once(nodes, membership):
    registry = devices("a", "b")
    for _ in range(3):
        membership.reconcile(registry, nodes)
    assert nodes.taking_part() == keys(registry)
    assert nodes.calls == [("register", "a"), ("register", "b")]


def test_a_device_that_is_added_or_revoked_later_is_followed(nodes, membership, caplog):
    caplog.set_level(logging.INFO)
    registry = devices("a", "b")
    membership.reconcile(registry, nodes)
    registry |= devices("c")
    registry["a"] = dataclasses.replace(registry["a"], revoked=NOW)
    membership.reconcile(registry, nodes)
    assert nodes.taking_part() == keys(registry)
    assert "a may no longer take part" in caplog.text and "c may take part" in caplog.text


def test_a_lost_database_heals(nodes, membership):
    registry = devices("a", "b")
    membership.reconcile(registry, nodes)
    nodes.listed.clear()
    membership.reconcile(registry, nodes)
    assert nodes.taking_part() == keys(registry)


def test_a_key_that_somebody_registered_by_hand_goes(nodes, membership):
    stranger = public_pem(make_device_key()[1])
    nodes.register(stranger, "stranger")
    registry = devices("a")
    membership.reconcile(registry, nodes)
    assert nodes.taking_part() == keys(registry)


def test_a_device_with_a_new_key_takes_part_with_that_alone(nodes, membership):
    registry = devices("a")
    membership.reconcile(registry, nodes)
    registry = devices("a")
    membership.reconcile(registry, nodes)
    assert nodes.taking_part() == keys(registry)


def test_a_revoked_key_that_comes_back_is_told_once_with_the_way_out(nodes, membership, caplog):
    registry = devices("a")
    membership.reconcile(registry, nodes)
    revoked = {"a": dataclasses.replace(registry["a"], revoked=NOW)}
    membership.reconcile(revoked, nodes)
    for _ in range(3):
        membership.reconcile(registry, nodes)
    told = "a cannot take part again with a key that was revoked; give it a new one"
    assert caplog.text.count(told) == 1
    assert nodes.taking_part() == set()


def test_one_that_flower_refuses_holds_up_nobody(nodes, membership, caplog):
    registry = devices("a", "b")
    nodes.refused = {"a"}
    for _ in range(2):
        membership.reconcile(registry, nodes)
    assert nodes.calls == [("register", "b")]
    assert caplog.text.count("did not register a") == 1


def test_a_superlink_that_is_away_is_the_callers_to_handle(nodes, membership, monkeypatch):
    def away(*_):
        raise ControlError("the SuperLink did not answer", refused=False)

    monkeypatch.setattr(nodes, "register", away)
    with pytest.raises(ControlError, match="did not answer"):
        membership.reconcile(devices("a"), nodes)
