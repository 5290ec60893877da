"""A trained model and all that it takes to use it, as one file keeps them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch.nn as nn

from fleet.backbones import Preprocessing, digest_of, load_backbone
from fleet.errors import ConfigError
from fleet.paths import expanded
from fleet.records import RunRecord

if TYPE_CHECKING:
    from fleet.finetune import Fitted


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A model that predicts.

    Attributes:
        backbone: name of the architecture, as `load_backbone` takes it.
        model: the torchvision or timm module, in eval mode, on the CPU or where
            it was trained; images (N, 3, S, S) → logits (N, classes).
        classes: names of its outputs, in order.
        preprocessing: what an image goes through before.
    """

    backbone: str
    model: nn.Module
    classes: tuple[str, ...]
    preprocessing: Preprocessing

    def facts(self) -> dict[str, str]:
        """What is needed to use its tensors again: the metadata of its safetensors file."""
        return facts_of(self.backbone, self.model, self.classes, self.preprocessing)


Source: TypeAlias = "str | Path | Fitted | TrainedModel"


def facts_of(
    backbone: str, model: nn.Module, classes: Sequence[str], preprocessing: Preprocessing
) -> dict[str, str]:
    """Architecture, classes, preprocessing and a digest of the tensors, each as text.

    safetensors checks its header alone: the digest tells a file whose tensors
    are damaged.
    """
    return {
        "backbone": backbone,
        "image_size": str(preprocessing.image_size),
        "classes": json.dumps(list(classes)),
        "preprocessing": json.dumps(asdict(preprocessing)),
        "digest": digest_of(model),
    }


def trained_model(source: Source) -> TrainedModel:
    """The trained model that a user names.

    Args:
        source: the folder of a run, a `.safetensors` file that a run or `export`
            wrote, what `fit` returned, or a trained model itself.

    Raises:
        ConfigError: if there is no model yet, or the file is not one of this
            project's, damaged, or of an architecture that is not known here.
    """
    if isinstance(source, TrainedModel):
        return source
    if isinstance(source, str | Path):
        return read_trained(_model_file(expanded(source, "model")))
    return TrainedModel(
        backbone=source.backbone,
        model=source.model,
        classes=source.classes,
        preprocessing=source.preprocessing,
    )


def read_trained(path: Path) -> TrainedModel:
    """Read a `.safetensors` file whose metadata are `facts_of` its model.

    One that is replaced meanwhile, as a device does after each round, is read again.

    Raises:
        ConfigError: as `trained_model`.
    """
    while True:
        began = _version(path)
        try:
            return _read(path)
        except ConfigError:
            if _version(path) == began:
                raise


def _version(path: Path) -> tuple[int, ...] | None:
    """Changes as a file is replaced; None if there is none."""
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_dev, about.st_ino, about.st_mtime_ns, about.st_size


def _read(path: Path) -> TrainedModel:
    facts = read_facts(path)
    backbone, classes = facts.get("backbone"), _classes(facts.get("classes"))
    if not backbone or classes is None or "image_size" not in facts:
        raise ConfigError(
            f"{path} does not tell its backbone, image size and classes; name a run's folder, its "
            f"model.safetensors, or a .safetensors file that fleet export wrote"
        )
    told = _preprocessing(path, facts)
    loaded = load_backbone(
        backbone,
        num_classes=len(classes),
        classes=classes,
        image_size=told["image_size"],
        weights=str(path),
    )
    _check_head(path, f"{loaded.steps[-1].name}.weight", len(classes))
    _check_digest(path, loaded.model, facts.get("digest"))
    preprocessing = loaded.preprocessing if len(told) == 1 else Preprocessing(**told)
    return TrainedModel(
        backbone=backbone,
        model=loaded.model.eval(),
        classes=classes,
        preprocessing=preprocessing,
    )


def _model_file(path: Path) -> Path:
    """The model of a run's folder; a file itself."""
    if not path.is_dir():
        if path.suffix != ".safetensors" or not path.is_file():
            raise ConfigError(
                f"there is no model {path}; name a run's folder, or a .safetensors file that a run "
                f"or fleet export wrote"
            )
        return path
    record = RunRecord(path)
    if not record.model_path.is_file():
        rounds = sum(1 for _ in record.rounds())  # tells a folder that holds no run
        raise ConfigError(
            f"run {path} has no model yet, and {rounds} rounds on record; the first is there once "
            f"round 0 has ended"
        )
    return record.model_path


def read_facts(path: Path) -> Mapping[str, str]:
    """The metadata of a `.safetensors` file, its tensors unread.

    Raises:
        ConfigError: if it is none.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{path} cannot be read as a model: {error}; copy it again, or export it anew"
        ) from error


def _classes(text: str | None) -> tuple[str, ...] | None:
    try:
        classes = json.loads(text or "null")
    except ValueError:
        return None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        return None
    return tuple(classes)


def _preprocessing(path: Path, facts: Mapping[str, str]) -> dict[str, Any]:
    """Fields of the preprocessing; files of earlier versions tell the image size alone."""
    try:
        if "preprocessing" not in facts:
            return {"image_size": int(facts["image_size"])}
        told = json.loads(facts["preprocessing"])
        mean, std = (tuple(map(float, told[key])) for key in ("mean", "std"))
        if len(mean) != 3 or len(std) != 3:
            raise ValueError(f"mean and std have {len(mean)} and {len(std)} values, expected 3")
        size, interpolation = int(told["image_size"]), str(told["interpolation"])
        return {"image_size": size, "mean": mean, "std": std, "interpolation": interpolation}
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} does not tell how images are prepared: {error!r}; export the model anew"
        ) from error


def _check_head(path: Path, name: str, classes: int) -> None:
    """`load_backbone` starts a head of another size afresh, which predicts nothing."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        outputs = file.get_slice(name).get_shape()[0] if name in file.keys() else 0  # noqa: SIM118
    if outputs != classes:
        raise ConfigError(
            f"{path} has a head of {outputs} outputs and names {classes} classes; export the model "
            f"anew"
        )


def _check_digest(path: Path, model: nn.Module, told: str | None) -> None:
    """Files of earlier versions tell none."""
    found = digest_of(model)
    if told is not None and told != found:
        raise ConfigError(
            f"{path} is damaged: its tensors have digest {found}, its header says {told}; copy it "
            f"again, or export it anew"
        )
