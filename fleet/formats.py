"""A trained model as a file that others run: safetensors, PyTorch, ONNX, ExecuTorch."""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from fleet.durable import write_durably
from fleet.errors import ConfigError
from fleet.model_file import model_bytes
from fleet.paths import expanded
from fleet.trained import Source, TrainedModel, trained_model

DESCRIPTION = "model.json"  # name of the description within a PyTorch archive


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: of the model.
        nbytes: its size.
        description: of the JSON file beside it, for a format that has no room for
            one; None: it lies in the model's own file.
    """

    path: Path
    nbytes: int
    description: Path | None = None


def export(source: Source, to: str | Path) -> Exported:
    """Write a trained model to a file, in the format that its suffix names.

    - `.safetensors`: the tensors under their original names. They fit the
      original torchvision or timm model, strictly.
    - `.pt2`, `.pt`: a whole program, which PyTorch runs without this project or
      the model's own library: `torch.export.load(file).module()`.
    - `.onnx`: needs the extra `onnx`.
    - `.pte`: for ExecuTorch, with XNNPACK's kernels; one image at a time. Needs
      the extra `executorch`.

    A program takes `images`, (N, 3, S, S) float32 that are scaled to 0…1 and
    normalised, and returns (N, classes) logits. Backbone, classes and
    preprocessing travel with it: as metadata; as `model.json` in PyTorch's
    archive; and as `FILE.json` beside a `.pte`, which has no room for them.

    Args:
        source: as `trained_model` takes it: a run's folder, a `.safetensors`
            file, or what `fit` returned.
        to: the file; one that is there is replaced once the new one is whole.

    Raises:
        ConfigError: if there is no model, or it is damaged, for an unknown
            suffix, an extra that is not installed, or a file that cannot be written.
    """
    to = expanded(to, "file")
    if to.suffix not in _WRITERS:
        raise ConfigError(
            f"cannot export to {to}: {to.suffix or 'no suffix'} names no format; known: "
            f"{', '.join(_WRITERS)}"
        )
    _check_extra(to.suffix)
    trained = trained_model(source)
    content = _WRITERS[to.suffix](trained)
    beside = None
    if to.suffix == ".pte":  # first, so that no model is without
        beside = to.with_name(f"{to.name}.json")
        _replace(beside, (json.dumps(describe(trained), indent=2) + "\n").encode())
    _replace(to, content)
    return Exported(to, len(content), beside)


def describe(trained: TrainedModel) -> dict[str, Any]:
    """Backbone, classes and preprocessing, as JSON has them."""
    return {
        "backbone": trained.backbone,
        "classes": list(trained.classes),
        "preprocessing": asdict(trained.preprocessing),
    }


def _safetensors(trained: TrainedModel) -> bytes:
    return model_bytes(trained.model.state_dict(), trained.facts())


def _pytorch(trained: TrainedModel) -> bytes:
    buffer = BytesIO()  # by a file's name it would warn of suffixes other than .pt2
    told = {DESCRIPTION: json.dumps(describe(trained))}
    torch.export.save(_program(trained, batch=None), buffer, extra_files=told)
    return buffer.getvalue()


def _onnx(trained: TrainedModel) -> bytes:
    program = torch.onnx.export(
        _program(trained, batch=None),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    for key, value in describe(trained).items():
        text = value if isinstance(value, str) else json.dumps(value)
        program.model.metadata_props[key] = text
    return program.model_proto.SerializeToString()


def _executorch(trained: TrainedModel) -> bytes:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = _program(trained, batch=1)  # XNNPACK plans its memory for one size
    return (
        to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        .to_executorch()
        .buffer
    )


_WRITERS: dict[str, Callable[[TrainedModel], bytes]] = {
    ".safetensors": _safetensors,
    ".pt2": _pytorch,
    ".pt": _pytorch,
    ".onnx": _onnx,
    ".pte": _executorch,
}
_EXTRAS = {".onnx": ("onnx", ("onnx", "onnxscript")), ".pte": ("executorch", ("executorch",))}


def _program(trained: TrainedModel, batch: int | None) -> torch.export.ExportedProgram:
    """The model's graph for batches of one size; None: of any."""
    size = trained.preprocessing.image_size
    images = torch.zeros(batch or 2, 3, size, size)
    open_ends = None if batch else ({0: torch.export.Dim("batch", min=1)},)
    with torch.no_grad():
        return torch.export.export(_plain(trained), (images,), dynamic_shapes=open_ends)


def _plain(trained: TrainedModel) -> nn.Module:
    """A copy on the CPU whose tensors lie as every runtime expects, channels before pixels."""
    copied = deepcopy(trained.model).cpu().eval().requires_grad_(False)
    return copied.to(memory_format=torch.contiguous_format)


def _check_extra(suffix: str) -> None:
    extra, modules = _EXTRAS.get(suffix, ("", ()))
    for module in modules:
        if find_spec(module) is None:
            raise ConfigError(
                f"{suffix} needs {module}, which is not installed: "
                f"pip install 'fleet-mobiletl[{extra}]'"
            )


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    try:
        write_durably(path, [content])
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror or error}; free space or give write permission "
            f"there, or name another file"
        ) from error
