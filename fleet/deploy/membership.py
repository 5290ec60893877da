"""Keeps Flower's list of nodes as the registry of devices says."""

import logging
from collections.abc import Mapping
from typing import Protocol

from fleet.deploy.certificates import public_pem
from fleet.deploy.control import UNREGISTERED, Node
from fleet.deploy.registry import Device

_log = logging.getLogger(__name__)


class Nodes(Protocol):
    """What of `Control` is needed for it."""

    def nodes(self) -> list[Node]: ...

    def register(self, public_key: bytes, name: str) -> None: ...

    def unregister(self, node_id: int) -> None: ...


def reconcile(devices: Mapping[str, Device], control: Nodes) -> None:
    """Register the keys of all devices that take part, and unregister every other key.

    Flower has no update: a database that was lost, or that somebody changed by
    hand, is put right in the same way as a device that was added or revoked.

    Raises:
        ControlError: if the SuperLink cannot be reached; what was done by then stays.
    """
    wanted = {
        public_pem(device.public_key): device.name
        for device in devices.values()
        if device.revoked is None
    }
    names = {public_pem(device.public_key): device.name for device in devices.values()}
    known = {node.public_key: node for node in control.nodes()}
    for key, node in known.items():
        if node.status != UNREGISTERED and key not in wanted:
            control.unregister(node.id)
            _log.warning("%s may no longer take part", names.get(key, f"node {node.id}"))
    for key, name in wanted.items():
        node = known.get(key)
        if node is None:
            control.register(key, name)
            _log.info("%s may take part", name)
        elif node.status == UNREGISTERED:
            # Flower never takes back a key that was unregistered; the registry never asks
            # for it by itself, but an older copy of it would.
            _log.error(
                "%s cannot take part again with its old key; give it a new one: "
                "fleet provision --revoke %s, then --add %s",
                name,
                name,
                name,
            )
