"""A device whose training is killed, or gets no more memory: the next round takes less.

The training runs in a process of its own. Before its third step it stays until it is killed; or,
run as

python tests/clients/test_killed_for_memory.py STATE IMAGES

it may grow no further (RLIMIT_DATA) than 4 MiB.
"""

import json
import resource
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from clients import attempts, local_update
from clients.attempts import Attempt, Experience, attempting, recall
from clients.client import Client
from clients.device import Cooling
from clients.local_update import train_task
from clients.memory import ClientMemory
from fleet.backbones import load_backbone
from fleet.codec import Versions, decode
from fleet.config import default_settings, read_config
from fleet.errors import ConfigError
from fleet.message import Task
from fleet.plan import make_plan
from fleet.state import capture
from tests.forked import Forked

pytestmark = pytest.mark.usefixtures("quick_runs")

CLASSES = ("cat", "dog")
BLOCKS = 11  # all of MobileNetV3-Small's


def train(state, images, server_round=1, method="mobiletl", **settings):
    """One round on a device; blocks of its update, and its metrics."""
    own = {
        "backbone": "mobilenet_v3_small",
        "weights": "none",
        "image-size": 96,
        "local-epochs": 2,
        "batch-size": 8,
        "blocks": BLOCKS,
        "state-dir": str(state),
        "cache": "off",
    }
    client = Client.of(
        7, {"name": "attic", "data": str(images)}, read_config(default_settings() | own | settings)
    )
    backbone = load_backbone("mobilenet_v3_small", num_classes=2, image_size=96, weights="none")
    plan = make_plan(backbone, method=method, blocks=BLOCKS)
    download = Versions(capture(backbone.model, plan), "float32").download(None)
    task = Task(plan.summary(), CLASSES, server_round, "ab12")
    payload, metrics = train_task(client, task, download)
    decode(payload, plan.narrow(metrics["blocks"]))
    return metrics


def killed(state, images):
    child = Forked(partial(train_up_to, Hang, state, images), sys.__stderr__)
    assert child.stdout.readline() == "in the third step\n"
    child.kill()
    assert child.wait() == -signal.SIGKILL


def train_up_to(event, state, images, **options):
    """Train in this process, whose third step does not come."""
    # A kernel that does not count whom it kills for memory: ours was not asked to.
    attempts._VMSTAT = Path("/nowhere")
    local_update.Cooling = event
    train(state, images, **options)


def test_a_training_that_is_killed_is_planned_smaller_in_the_next_round(image_folder, tmp_path):
    images, state = image_folder(*CLASSES), tmp_path / "state"
    first = train(tmp_path / "another", images)
    assert first["blocks"] == BLOCKS and "killed-before" not in first
    killed(state, images)
    then = train(state, images, 2)
    assert then["killed-before"] == 1
    assert then["planned-peak-bytes"] <= then["memory-limit-bytes"] < first["peak-bytes"]
    assert then["peak-bytes"] <= 1.02 * then["planned-peak-bytes"] < 0.9 * first["peak-bytes"]
    after = train(state, images, 3)
    assert "killed-before" not in after
    assert then["memory-limit-bytes"] < after["memory-limit-bytes"]


def test_a_training_that_gets_no_more_memory_is_refused_and_planned_smaller(image_folder, tmp_path):
    images, state = image_folder(*CLASSES), tmp_path / "state"
    command = [sys.executable, __file__, str(state), str(images)]
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode == 3:
        pytest.skip("this system does not hold a process to RLIMIT_DATA")
    assert child.returncode == 0, child.stderr
    reason = json.loads(child.stdout.splitlines()[-1])
    assert reason.startswith(f"training {BLOCKS} blocks at batch 8 ran out of memory beyond ")
    then = train(state, images, 2, method="blocks")
    assert then["killed-before"] == 1
    assert then["planned-peak-bytes"] <= then["memory-limit-bytes"]


def test_a_limit_below_the_floor_is_a_refusal_until_it_has_risen(image_folder, tmp_path):
    images, memory = image_folder(*CLASSES), ClientMemory(tmp_path / "state", "ab12", "attic")
    tiny = Attempt(server_round=1, blocks=0, batch_size=8, peak_bytes=1000)
    with pytest.raises(ConfigError), attempting(memory, Experience(), tiny):
        raise MemoryError
    text = r"training was killed for memory, and what it is planned within since then is too litt"
    with pytest.raises(ConfigError, match=text):
        train(tmp_path / "state", images, 2)
    assert recall(memory).limit_bytes == 735  # 5 % more than 70 %


class Hang(Cooling):
    """Stays before the third step."""

    calls = 0

    def __call__(self):
        self.calls += 1
        if self.calls == 3:
            self.happen()

    def happen(self):
        print("in the third step", flush=True)
        signal.pause()


class Limit(Hang):
    """From the third step on the system gives no more memory."""

    def happen(self):
        status = Path("/proc/self/status").read_text().splitlines()
        data = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, (data + 2**22, data + 2**22))
        try:
            bytearray(2**30)
        except MemoryError:
            return
        sys.exit(3)


if __name__ == "__main__":
    try:
        # By stock autograd, which asks for much at once: a system that refuses a little
        # ends PyTorch in C++, where nothing can be told.
        train_up_to(Limit, *sys.argv[1:], method="blocks")
    except ConfigError as error:
        print(json.dumps(str(error)))
