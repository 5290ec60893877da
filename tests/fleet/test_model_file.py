"""A model's file: read by safetensors itself, and the same in every process."""

import hashlib

import pytest
import torch
from safetensors import safe_open

from fleet.model_file import model_bytes
from tests.commands import printed_elsewhere

FACTS = {name: f"{name}: é \x7f \n \u2028" for name in ("digest", "backbone", "classes", "zoo")}


def some_tensors():
    rng = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(3, 2, generator=rng).t(),
        "a.half": torch.randn(5, generator=rng).bfloat16(),
        "c.count": torch.tensor(7),
        "empty": torch.zeros(0, 4),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_safetensors_reads_what_was_written(tmp_path, dtype):
    tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in some_tensors().items()}
    (tmp_path / "m.safetensors").write_bytes(model_bytes(tensors, FACTS))
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata() == FACTS
        assert set(file.keys()) == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)


def test_the_bytes_are_the_same_in_every_process():
    code = (
        "import hashlib\n"
        "from tests.fleet.test_model_file import FACTS, model_bytes, some_tensors\n"
        "print(hashlib.sha256(model_bytes(some_tensors(), FACTS)).hexdigest())"
    )
    assert (
        printed_elsewhere(code).strip()
        == hashlib.sha256(model_bytes(some_tensors(), FACTS)).hexdigest()
    )
