"""Labelled images: where they come from, how they are split, how they reach a model."""

from fleet.data.augment import view_of
from fleet.data.batches import ImageBatches, batch_positions, to_tensor, visiting_order
from fleet.data.datasets import of_dataset
from fleet.data.images import ImageData
from fleet.data.partitions import check_partition, partition
from fleet.data.sources import BUILT_IN, check_source, load_data, load_device_data
from fleet.data.splits import split_validation

__all__ = [
    "BUILT_IN",
    "ImageBatches",
    "ImageData",
    "batch_positions",
    "check_partition",
    "check_source",
    "load_data",
    "load_device_data",
    "of_dataset",
    "partition",
    "split_validation",
    "to_tensor",
    "view_of",
    "visiting_order",
]
