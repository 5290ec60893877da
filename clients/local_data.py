"""A client's own images: a folder on a device, or one partition in a simulation."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import numpy as np

from fleet.config import DataConfig, Value
from fleet.data import ImageData, load_data, load_device_data, partition, split_validation
from fleet.errors import ConfigError


def local_data(
    node_config: Mapping[str, Value], config: DataConfig, seed: int
) -> tuple[ImageData, ImageData]:
    """Training and validation images of one client.

    A node configuration with `data` names this device's own, as it is now, whose
    held-out part validates; one with `partition-id` and `num-partitions` takes its share
    of the run's, a fraction of which validates.

    Raises:
        ConfigError: if it has neither, or the data cannot be read.
    """
    if "data" in node_config:
        return load_device_data(str(node_config["data"]))
    if "partition-id" in node_config and "num-partitions" in node_config:
        images = _fleet_data(config, seed)
        shares = _shares(config, seed, int(node_config["num-partitions"]))
        number = int(node_config["partition-id"])
        if not 0 <= number < len(shares):
            raise ConfigError(
                f"partition-id is {number}, num-partitions is {len(shares)}; count from 0"
            )
        images = images.subset(shares[number])
        return split_validation(images, config.validation_fraction, seed)
    raise ConfigError(
        'this client knows no data: give its node configuration data="/path/to/images", '
        "or partition-id and num-partitions"
    )


def relabel(images: ImageData, classes: tuple[str, ...]) -> ImageData:
    """The same images with labels that count in the server's classes.

    Raises:
        ConfigError: naming the classes that the server does not know.
    """
    if images.classes == classes:
        return images
    if unknown := sorted(set(images.classes) - set(classes)):
        raise ConfigError(
            f"{images.name} has classes {', '.join(unknown[:5])}, which the server does not know; "
            f"it knows {', '.join(classes[:12])}; move these folders away, or begin a run that "
            f"knows them"
        )
    to_server = np.array([classes.index(name) for name in images.classes], np.int64)
    return replace(images, classes=classes, labels=to_server[images.labels])


# Simulated clients share one process: what they have in common is read once.
@lru_cache(maxsize=2)
def _fleet_data(config: DataConfig, seed: int) -> ImageData:
    return load_data(
        config.source,
        "train",
        limit=config.train_examples,
        skip_unreadable=config.skip_unreadable,
        seed=seed,
    )


@lru_cache(maxsize=2)
def _shares(config: DataConfig, seed: int, num_partitions: int) -> list[np.ndarray]:
    return partition(_fleet_data(config, seed).labels, config.partition, num_partitions, seed)
