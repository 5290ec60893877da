"""A folder of small images, and threads that leave the other cores alone."""

import numpy as np
import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity
from PIL import Image


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def task_identity(monkeypatch):
    """The identity without which Flower builds no message outside a run."""
    for field in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, field, 1)


@pytest.fixture
def image_folder(tmp_path):
    """Function of class names → a folder of ten images each."""

    def build(*classes):
        rng = np.random.default_rng(0)
        for name in classes:
            folder = tmp_path / "images" / name
            folder.mkdir(parents=True)
            for i in range(10):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
        return str(tmp_path / "images")

    return build
