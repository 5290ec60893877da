"""Who a client is, and what of the run's settings its device decides itself."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from clients.memory import ClientMemory, state_directory
from clients.round_memory import RoundMemory
from fleet.config import DeviceConfig, RunConfig, Value, budget
from fleet.message import Task
from fleet.node_settings import whole_number
from fleet.planner import MIB, available_bytes

SIMULATED_STATE = "clients"  # in the folder of the run


@dataclass(frozen=True)
class Client:
    """Who trains, on what, and how much of the plan.

    Attributes:
        name: stable over rounds and restarts.
        node_config: what this device was started with. `NODE_SETTINGS` of
            `fleet.node_settings` are its own; `partition-id` and `num-partitions` come from a
            simulation.
        config: the run's.
        began: when its message had come, in seconds of `time.monotonic`.
    """

    name: str
    node_config: Mapping[str, Value]
    config: RunConfig
    began: float = field(default_factory=time.monotonic, compare=False)

    @classmethod
    def of(cls, node_id: int, node_config: Mapping[str, Value], config: RunConfig) -> "Client":
        """A client named by its configuration, its partition or, failing both, its node."""
        fallback = f"node-{node_id}"
        if "partition-id" in node_config:
            fallback = f"client-{int(node_config['partition-id']):04d}"
        return cls(str(node_config.get("name", fallback)), node_config, config)

    @property
    def simulated(self) -> bool:
        """Whether it is one of the partitions of a run's data, not a device with its own."""
        return "partition-id" in self.node_config

    def holds_back(self) -> DeviceConfig:
        """At which temperature and charge this client's device holds back.

        Raises:
            ConfigError: if the device misstates one.
        """
        if self.simulated:
            return DeviceConfig(soft_temperature=0.0, least_battery=0.0)
        ours = self.config.device
        return replace(
            ours,
            soft_temperature=self.node_config.get("soft-temperature", ours.soft_temperature),
            least_battery=self.node_config.get("least-battery", ours.least_battery),
        )

    def blocks(self, widest: int) -> int:
        """How many of the plan's blocks this client trains."""
        if "blocks" in self.node_config:
            return min(whole_number("blocks", self.node_config["blocks"]), widest)
        if self.simulated:
            partition_id = int(self.node_config["partition-id"])
            return min(self.config.plan.blocks_of(partition_id), widest)
        return widest

    def budget_bytes(self) -> int | None:
        """Memory that this client's training may take; None: as much as it likes."""
        config = self.config.budget
        mib = config.of(int(self.node_config.get("partition-id", 0)))
        if "budget-mib" in self.node_config:
            mib = budget(self.node_config["budget-mib"])
        if mib == "auto":
            return available_bytes(round(config.reserve_mib * MIB))
        return None if mib == "off" else round(mib * MIB)

    def round_memory(self, task: Task, evaluates: bool = False) -> RoundMemory:
        """What this client remembers of a task's run, as it was before the task's round.

        Args:
            evaluates: whether the round's training is over.

        Raises:
            UpdateError: if the run's id is none.
        """
        return RoundMemory(self.memory(task.run), task.server_round, evaluates)

    def memory(self, run: str) -> ClientMemory:
        """What this client remembers of a run; a simulated one does so in the run's folder.

        Raises:
            UpdateError: if the run's id is none.
        """
        setting = self.config.state_dir
        if not setting and self.config.run_dir and self.simulated:
            setting = str(Path(self.config.run_dir) / SIMULATED_STATE)
        return ClientMemory(state_directory(setting), run, self.name)
