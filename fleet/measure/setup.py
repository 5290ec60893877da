"""One method on one backbone with one batch, ready to train: what is measured."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fleet.backbones import Backbone, load_backbone
from fleet.baselines import contender
from fleet.errors import ConfigError
from fleet.features import run_in_parts
from fleet.measure.dry_run import weightless
from fleet.mobiletl import TransferModel
from fleet.mobiletl.prefix import MICRO_BATCH
from fleet.mobiletl.stash import check_stash
from fleet.optim import SGD
from fleet.train import take_step


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is measured, in words: another process can be told.

    Attributes:
        backbone, num_classes, image_size, weights: as `load_backbone` takes them.
        method: one of `fleet.baselines.CONTENDERS`.
        blocks: top blocks; those methods that have no choice take no notice.
        stash: of `mobiletl`.
        batch_size: images.
        cached: a batch is read from a cache of the frozen half's output.
        threads: of PyTorch.
    """

    backbone: str
    method: str
    blocks: int
    stash: str = "recompute"
    batch_size: int
    image_size: int
    num_classes: int = 10
    weights: str = "none"
    cached: bool = False
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "threads"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ConfigError(f"{flag} must be at least 1, got {getattr(self, name)}")
        check_stash(self.stash)

    def load(self) -> Backbone:
        """The backbone that the words stand for."""
        return load_backbone(
            self.backbone,
            num_classes=self.num_classes,
            image_size=self.image_size,
            weights=self.weights,
        )

    def model(self, backbone: Backbone) -> TransferModel:
        """The backbone as the method trains it."""
        return contender(backbone, self.method, self.blocks, self.stash)


class Subject:
    """Takes training steps as a device does, on images or features that cost no time to make.

    A batch is put together inside the step. From images: two at a time, as they
    are decoded, through the frozen half. Cached: in one, in float32. The images
    are always the same two; what a step costs does not depend on them.

    Args:
        setup: what to measure.
        backbone: what `setup.load` returned; trains in place. Several subjects
            may share it, each of which must be made `ready` before its turn.
        shapes: step at which features are cut → (C, H, W) or (C,) of one image's, of this
            backbone at this image size; those that are found now are added.

    Raises:
        ConfigError: for an unknown method or stash, or if there is nothing to cache.
        PlanError: for more blocks than there are.
    """

    def __init__(
        self,
        setup: Setup,
        backbone: Backbone,
        shapes: dict[int, tuple[int, ...]] | None = None,
    ) -> None:
        self.setup = setup
        self.model = setup.model(backbone)
        if setup.cached and not self.model.freezes_blocks:
            raise ConfigError(
                f"{setup.method} on {self.model.plan.blocks} blocks of {setup.backbone} leaves no "
                f"block frozen whose output could be cached; measure it without --cached"
            )
        self.optimizer = SGD(self.model.trainable_parameters(), 1e-3, momentum=0.9)
        generator = torch.Generator().manual_seed(0)
        size = setup.image_size
        self._images = torch.randn(MICRO_BATCH, 3, size, size, generator=generator)
        self._features = None
        if setup.cached:
            shapes, cut = {} if shapes is None else shapes, self.model.cut
            if cut not in shapes:
                shapes[cut] = _features_shape(self.model, backbone, size)
            features = torch.rand(setup.batch_size, *shapes[cut], generator=generator)
            channels_last = features.ndim == 4
            self._features = features.contiguous(
                memory_format=torch.channels_last if channels_last else torch.contiguous_format
            )
        self.labels = torch.arange(setup.batch_size) % setup.num_classes

    def ready(self) -> None:
        """Let what trains here require grad, and nothing else."""
        self.model.train()

    def batch(self) -> Tensor:
        """(N, …) what `from_features` takes, in memory of its own."""
        if self._features is not None:
            return self._features.clone()
        return run_in_parts(self.model.features, self.setup.batch_size, self._decoded)

    def _decoded(self, part: slice) -> Tensor:
        images = self._images[: part.stop - part.start]
        return images.clone(memory_format=torch.channels_last)

    def step(self) -> None:
        """Batch, forward, backward, update."""
        take_step(self.model, self.optimizer, self.batch(), self.labels)


def _features_shape(model: TransferModel, backbone: Backbone, image_size: int) -> tuple[int, ...]:
    """Of one image.

    Found without running the frozen half: that would leave memory behind, which
    the steps whose growth is measured would find and use.
    """
    return TransferModel(weightless(backbone), model.plan).features_shape(image_size)
