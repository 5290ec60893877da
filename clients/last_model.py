"""The last good model that a device received: it predicts with it while no server is there."""

import contextlib
import logging
import os
from pathlib import Path

from clients.client import Client
from clients.memory import file_name, state_directory
from fleet.backbones import Backbone
from fleet.errors import ConfigError
from fleet.formats import export
from fleet.paths import expanded
from fleet.trained import TrainedModel, read_facts, read_trained

_FOLDER = "models"  # in the state directory: one file a client, whatever the run


def keep_model(client: Client, backbone: Backbone, classes: tuple[str, ...]) -> None:
    """Keep the model that a client has received, with its own norms in it.

    A simulated client keeps none: its run has the model. What cannot be written
    costs a warning and not the round.

    Args:
        backbone: with the received state in it, which is finite.
        classes: the server's.
    """
    if client.simulated:
        return
    trained = TrainedModel(
        backbone=backbone.name,
        model=backbone.model,
        classes=classes,
        preprocessing=backbone.preprocessing,
    )
    folder = state_directory(client.config.state_dir) / _FOLDER
    path = folder / f"{file_name(client.name)}.safetensors"
    try:
        with contextlib.suppress(ConfigError):  # there is none yet, or it is damaged
            if read_facts(path) == trained.facts():
                os.utime(path)
                return
        folder.mkdir(parents=True, exist_ok=True)
        export(trained, path)
    except (OSError, ConfigError) as error:
        logging.getLogger(__name__).warning("kept no model for predictions: %s", error)


def newest_model(directory: Path) -> tuple[Path, TrainedModel]:
    """The model that any client of this device received last, and its file.

    A damaged one is passed over, with a warning.

    Args:
        directory: the clients' state-dir.

    Raises:
        ConfigError: if none was received yet, or all are damaged.
    """
    folder = expanded(directory, "state folder") / _FOLDER
    files = sorted(folder.glob("*.safetensors"), key=lambda path: -path.stat().st_mtime)
    fault = ""
    for path in files:
        try:
            return path, read_trained(path)
        except ConfigError as error:
            logging.getLogger(__name__).warning("passed over: %s", error)
            fault = fault or str(error)
    if fault:
        raise ConfigError(f"this device has no good model: {fault}")
    raise ConfigError(
        f"this device has received no model yet: there is none in {folder}; a client keeps one as "
        f"soon as its server has sent a state, in the folder that its setting state-dir names"
    )
