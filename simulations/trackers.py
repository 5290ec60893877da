"""Rounds where users already look: TensorBoard, MLflow, Weights & Biases.

Each is a callback and an optional extra of the package:

    simulate(settings, callbacks=[TensorBoard("runs/tb"), MLflow("fleets"), WandB("fleets")])
"""

import contextlib
import importlib
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from fleet.config import Value
from fleet.errors import ConfigError
from fleet.records import RoundReport, RunRecord
from fleet.report.frame import round_numbers
from simulations.callbacks import Callback


def read_tracker(text: str) -> Callback:
    """The tracker that a text such as `wandb:PROJECT` means.

    Raises:
        ConfigError: if it is unknown, or its package is not installed.
    """
    name, _, where = text.partition(":")
    if name not in _TRACKERS:
        raise ConfigError(
            f"unknown tracker {name!r}; known: tensorboard[:FOLDER], mlflow[:EXPERIMENT], "
            f"wandb[:PROJECT]"
        )
    return _TRACKERS[name](where)


class TensorBoard(Callback):
    """Writes TensorBoard's event files.

    Args:
        folder: in which each run has a folder of its name; empty: `tensorboard`
            in the run's own folder.
    """

    def __init__(self, folder: str = "") -> None:
        _needed("tensorboard", extra="tensorboard")
        self._folder = folder
        self._writer: Any = None

    def on_run_start(self, record: RunRecord, settings: Mapping[str, Value]) -> None:
        """Open the event file and write the settings, as text, into it."""
        # Here, not above: it takes a second, and TensorBoard, to import.
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(self._folder) / record.path.name
        self._writer = SummaryWriter(str(folder if self._folder else record.path / "tensorboard"))
        lines = [f"| {key} | {value} |" for key, value in settings.items()]
        self._writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *lines]))

    def on_round_end(self, report: RoundReport) -> None:
        """A scalar each, seen to the disk."""
        for name, value in _measured(round_numbers(report)).items():
            self._writer.add_scalar(name, value, report.server_round)
        self._writer.flush()

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        """Close the file."""
        self._close()

    def on_run_error(self, error: BaseException) -> None:
        """Close the file."""
        self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class MLflow(Callback):
    """Logs to the MLflow server or folder that `MLFLOW_TRACKING_URI` names.

    Beside an `mlflow.start_run()` of the user's own it makes a run apart.

    Args:
        experiment: made if there is none of the name; empty: what
            `MLFLOW_EXPERIMENT_NAME` says, else MLflow's `Default`.
    """

    def __init__(self, experiment: str = "") -> None:
        self._mlflow = _needed("mlflow", extra="mlflow")
        self._experiment = experiment
        self._client: Any = None
        self._run_id = ""

    def on_run_start(self, record: RunRecord, settings: Mapping[str, Value]) -> None:
        """Start a run with the settings as its parameters."""
        self._run_id = ""
        client = self._mlflow.MlflowClient()
        name = self._experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "Default"
        found = client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else client.create_experiment(name)
        tags = {"run_dir": str(record.path)}
        run = client.create_run(experiment, run_name=record.path.name, tags=tags)
        self._client, self._run_id = client, run.info.run_id
        param = self._mlflow.entities.Param
        params = [param(key, str(value)) for key, value in settings.items()]
        client.log_batch(self._run_id, params=params)

    def on_round_end(self, report: RoundReport) -> None:
        """Metrics, whose step is the round."""
        self._log(round_numbers(report), report.server_round)

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        """End the run as finished, with the totals beside the last round's numbers."""
        totals = {f"total_{k}": v for k, v in summary.items() if k not in ("accuracy", "loss")}
        self._log(totals, summary["rounds"])
        self._client.set_terminated(self._run_id, "FINISHED")

    def on_run_error(self, error: BaseException) -> None:
        """End the run as failed, or as killed if it was interrupted."""
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        if self._run_id:
            self._client.set_terminated(self._run_id, status)

    def _log(self, numbers: Mapping[str, Any], step: int) -> None:
        now = int(time.time() * 1000)
        metric = self._mlflow.entities.Metric
        metrics = [metric(k, v, now, step) for k, v in _measured(numbers).items()]
        self._client.log_batch(self._run_id, metrics=metrics)


class WandB(Callback):
    """Logs to Weights & Biases; `WANDB_MODE=offline` keeps it on this machine.

    Args:
        project: empty: what `WANDB_PROJECT` says, else wandb's own default.
    """

    def __init__(self, project: str = "") -> None:
        self._wandb = _needed("wandb", extra="wandb")
        self._project = project
        self._run: Any = None

    def on_run_start(self, record: RunRecord, settings: Mapping[str, Value]) -> None:
        """Start a run, beside any other that there may be, with the settings as its config."""
        self._run = self._wandb.init(
            project=self._project or None,
            name=record.path.name,
            config=dict(settings),
            reinit="create_new",
            # It would put itself between the terminal and the progress that is shown there.
            settings=self._wandb.Settings(console="off"),
        )

    def on_round_end(self, report: RoundReport) -> None:
        """Numbers, whose step is the round."""
        self._run.log(_measured(round_numbers(report)), step=report.server_round)

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        """Finish, with the run's own summary."""
        self._run.summary.update(dict(summary))
        self._run.finish()

    def on_run_error(self, error: BaseException) -> None:
        """Finish as failed."""
        if self._run is not None:
            self._run.finish(exit_code=1)


_TRACKERS = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}


def _needed(package: str, extra: str) -> ModuleType:
    """Import a tracker's package now, before a run is started for it."""
    # A mere folder of the name is none: wandb and MLflow make theirs where they are used.
    with contextlib.suppress(ImportError):
        module = importlib.import_module(package)
        if module.__file__:
            return module
    raise ConfigError(f"{package} is not installed: pip install 'fleet-mobiletl[{extra}]'")


def _measured(numbers: Mapping[str, Any]) -> dict[str, float]:
    """Those that are numbers: what was not measured is left out, as is NaN."""
    return {
        name: float(value)
        for name, value in numbers.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
