"""What a run leaves behind: configuration, rounds, summary and model, in one folder."""

import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w

from fleet.errors import ConfigError

_PACKAGES = ("fleet-mobiletl", "flwr", "torch", "torchvision", "timm", "numpy")


@dataclass(frozen=True, kw_only=True)
class ClientReport:
    """One client's part in one round.

    Attributes:
        name: the client's.
        blocks: k, how many blocks it trained.
        num_examples: its training images.
        loss: its mean training loss, in nats.
        peak_bytes: allocator peak of a training step beyond model and batch.
        seconds: of its local update.
        metrics: what else it measured (temperature, resident memory).
    """

    name: str
    blocks: int
    num_examples: int
    loss: float
    peak_bytes: int
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """One round. Round 0 is the model before any training.

    Attributes:
        server_round: from 0 on.
        accuracy, loss: of the global model after the round, 0…1 and in nats;
            None if it was not evaluated.
        train_loss: mean of the clients' training losses, by examples.
        bytes_up, bytes_down: of all messages to and from the server, records
            and headers included.
        peak_client_bytes: the largest client's allocator peak.
        seconds: wall time from the first message to the end of evaluation.
        clients: who took part.
        refused: client → why its reply, or its absence, did not count.
        coverage: tensor → how many clients trained it.
    """

    server_round: int
    accuracy: float | None
    loss: float | None
    train_loss: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    peak_client_bytes: int = 0
    seconds: float = 0.0
    clients: tuple[ClientReport, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    coverage: Mapping[str, int] = field(default_factory=dict)


class RunRecord:
    """The folder of one run: `config.toml`, `rounds.jsonl`, `summary.json`, `model.safetensors`."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    @classmethod
    def reserve(cls, run_dir: str) -> "RunRecord":
        """Where a new run will go; nothing is written yet.

        Args:
            run_dir: a path; empty names a folder in `runs/` by the clock.

        Raises:
            ConfigError: if the folder holds a run.
        """
        record = cls(Path(run_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"))
        if record.config_path.exists():
            raise ConfigError(
                f"run directory {record.path} holds a run already; "
                f"name another with run-dir, or remove it"
            )
        return record

    @classmethod
    def create(cls, run_dir: str, settings: Mapping[str, Any]) -> "RunRecord":
        """Make the folder and write everything that is in force.

        Args:
            run_dir: as in `reserve`.
            settings: the run configuration.

        Raises:
            ConfigError: if the folder holds a run, or cannot be made.
        """
        record = cls.reserve(run_dir)
        facts = {
            "settings": dict(settings) | {"run-dir": str(record.path)},
            "versions": {name: version(name) for name in _PACKAGES},
            "machine": {"python": platform.python_version(), "platform": platform.platform()},
        }
        try:
            record.path.mkdir(parents=True, exist_ok=True)
            record.config_path.write_text(tomli_w.dumps(facts))
        except OSError as error:
            raise ConfigError(f"cannot write run directory {record.path}: {error}") from error
        return record

    @property
    def config_path(self) -> Path:
        """Settings, versions and machine, as TOML."""
        return self.path / "config.toml"

    @property
    def rounds_path(self) -> Path:
        """One JSON object a line, a line a round."""
        return self.path / "rounds.jsonl"

    @property
    def summary_path(self) -> Path:
        """The run in one JSON object."""
        return self.path / "summary.json"

    @property
    def model_path(self) -> Path:
        """The trained model under the original names."""
        return self.path / "model.safetensors"

    @property
    def page_path(self) -> Path:
        """The run as one HTML page."""
        return self.path / "report.html"

    def add_round(self, report: RoundReport) -> None:
        """Append a round and see it to the disk."""
        with self.rounds_path.open("a") as file:
            file.write(json.dumps(asdict(report)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def rounds(self) -> Iterator[RoundReport]:
        """The rounds so far; a line that is still being written is left out.

        Raises:
            ConfigError: if there is no run here.
        """
        if not self.rounds_path.is_file():
            if not self.config_path.is_file():
                raise ConfigError(f"{self.path} holds no run: there is no config.toml in it")
            return
        for line in self.rounds_path.read_text().splitlines(keepends=True):
            if not line.endswith("\n"):
                return
            values = json.loads(line)
            values["clients"] = tuple(ClientReport(**client) for client in values["clients"])
            yield RoundReport(**values)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`; its being there says that the run ended well."""
        self.summary_path.write_text(json.dumps(summary, indent=2) + "\n")

    def summary(self) -> dict[str, Any]:
        """The summary of a run that has ended.

        Raises:
            ConfigError: if it has not.
        """
        if not self.summary_path.is_file():
            rounds = sum(1 for _ in self.rounds())
            raise ConfigError(f"run {self.path} has no summary yet: it wrote {rounds} rounds")
        return json.loads(self.summary_path.read_text())


def summarise(rounds: list[RoundReport]) -> dict[str, Any]:
    """Totals over the rounds and the last round's accuracy and loss."""
    last = rounds[-1]
    return {
        "accuracy": last.accuracy,
        "loss": last.loss,
        "rounds": last.server_round,
        "bytes_up": sum(r.bytes_up for r in rounds),
        "bytes_down": sum(r.bytes_down for r in rounds),
        "peak_client_bytes": max(r.peak_client_bytes for r in rounds),
        "seconds": round(sum(r.seconds for r in rounds), 3),
        "refused": sum(len(r.refused) for r in rounds),
    }
