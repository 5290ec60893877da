"""A model as the bytes of one safetensors file, the same bytes for the same model."""

import contextlib
import json
from collections.abc import Mapping

import torch
from safetensors import numpy as of_arrays
from safetensors import torch as of_tensors

_LENGTH_BYTES = 8  # of the header's length, little-endian, at the start of the file
_ALIGNED = 8  # bytes, at which safetensors begins its data


def model_bytes(tensors: Mapping[str, torch.Tensor], facts: Mapping[str, str]) -> bytes:
    """Write tensors and facts about them as safetensors does.

    Args:
        tensors: name → tensor, on any device; no two may share memory.
        facts: what is needed to use them again; the file's metadata.

    Raises:
        SafetensorError: as `safetensors` does.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save = of_tensors.save
    with contextlib.suppress(TypeError):  # of a dtype that NumPy does not have
        # safetensors.torch leaves two objects a tensor to the collector of cycles, every round.
        whole, save = {name: tensor.numpy() for name, tensor in whole.items()}, of_arrays.save
    return _facts_in_order(save(whole, metadata=dict(facts)))


def _facts_in_order(content: bytes) -> bytes:
    """Its metadata sorted by name: safetensors writes it in an order that chance decides."""
    start = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
    header = json.loads(content[_LENGTH_BYTES:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNED)
    data = memoryview(content)[start:]
    return b"".join((len(text).to_bytes(_LENGTH_BYTES, "little"), text, data))
