"""What a device settles itself, in its node's configuration, and what values that takes."""

from collections.abc import Mapping

from fleet.config import DeviceConfig, Value, budget
from fleet.errors import ConfigError

NODE_SETTINGS = (
    "name",
    "data",
    "blocks",
    "budget-mib",
    "weights",
    "soft-temperature",
    "least-battery",
)


def check_node_settings(node: Mapping[str, Value]) -> None:
    """Refuse what no round could begin with.

    Raises:
        ConfigError: for a setting that nothing reads, or a value that is of another type or out of
            range, naming what is allowed.
    """
    if unknown := sorted(set(node) - set(NODE_SETTINGS)):
        raise ConfigError(
            f"unknown setting {', '.join(unknown)} of a device's node; known: "
            f"{', '.join(NODE_SETTINGS)}"
        )
    for key in ("name", "data", "weights"):
        if key in node and (not isinstance(node[key], str) or not node[key].strip()):
            raise ConfigError(f"{key} must be text that is not empty, got {node[key]!r}")
    if "blocks" in node:
        whole_number("blocks", node["blocks"])
    if "budget-mib" in node:
        budget(node["budget-mib"])
    DeviceConfig(
        soft_temperature=node.get("soft-temperature", 0),
        least_battery=node.get("least-battery", 0),
    )


def whole_number(key: str, value: Value) -> int:
    """A setting that counts.

    Raises:
        ConfigError: if it is no whole number from 0 on.
    """
    if type(value) is not int or value < 0:
        raise ConfigError(
            f"{key} in this node's configuration must be a whole number from 0 on, got {value!r}"
        )
    return value
