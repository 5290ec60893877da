"""Keeps Flower's list of nodes as the registry of devices says."""

import logging
from collections.abc import Mapping
from typing import Protocol

from fleet.deploy.certificates import public_pem
from fleet.deploy.control import UNREGISTERED, ControlError, Node
from fleet.deploy.registry import Device

_log = logging.getLogger(__name__)


class Nodes(Protocol):
    """What of `Control` is needed for it."""

    def nodes(self) -> list[Node]: ...

    def register(self, public_key: bytes, name: str) -> None: ...

    def unregister(self, node_id: int) -> None: ...


class Membership:
    """Makes Flower's list of nodes that of the registry.

    Flower has no update: a database that was lost, or that somebody changed by
    hand, is put right in the same way as a device that was added or revoked.
    """

    def __init__(self) -> None:
        self._told: set[bytes] = set()

    def reconcile(self, devices: Mapping[str, Device], control: Nodes) -> None:
        """Register the keys of all devices that take part, and unregister every other key.

        Raises:
            ControlError: if the SuperLink cannot be reached; what was done by then stays.
        """
        keys = {public_pem(device.public_key): device for device in devices.values()}
        wanted = {key: device.name for key, device in keys.items() if device.revoked is None}
        known = {node.public_key: node for node in control.nodes()}
        for key, node in known.items():
            if node.status != UNREGISTERED and key not in wanted:
                control.unregister(node.id)
                name = keys[key].name if key in keys else f"node {node.id}"
                _log.warning("%s may no longer take part", name)
        for key, name in wanted.items():
            if key not in known:
                self._register(key, name, control)
            elif known[key].status == UNREGISTERED:
                # The registry alone never comes to this; an older copy of it does.
                self._tell_once(
                    key,
                    f"{name} cannot take part again with a key that was revoked; give it a new "
                    f"one: fleet provision --revoke {name}, then --add {name}",
                )

    def _register(self, key: bytes, name: str, control: Nodes) -> None:
        try:
            control.register(key, name)
            _log.info("%s may take part", name)
        except ControlError as error:
            if not error.refused:
                raise
            self._tell_once(key, str(error))

    def _tell_once(self, key: bytes, what: str) -> None:
        if key not in self._told:
            _log.error(what)
        self._told.add(key)
