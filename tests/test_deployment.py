"""The app on real processes: a SuperLink and two SuperNodes with TLS and node keys."""

import http.client
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import tomli_w
import torch
from PIL import Image
from safetensors import safe_open
from sklearn.datasets import load_digits

from fleet.backbones import load_backbone
from fleet.records import RoundReport, RunRecord
from tests.deployment import (
    HOST,
    Processes,
    free_ports,
    handshake,
    write_certificates,
    write_node_key,
)

CHECKOUT = Path(__file__).resolve().parent.parent
CLASSES = {"eight": 8, "four": 4, "one": 1}  # class folder → digit
BLOCKS = {"pi-01": 1, "pi-02": 2}
IMAGES = {"pi-01": 30, "pi-02": 20}  # of each class
STRANGER = "stranger"  # has the address and the certificate, but no registered key
IMAGE_SIZE = 32
SETTINGS = {
    "image-size": IMAGE_SIZE,
    "blocks": "2",
    "local-epochs": 1,
    "batch-size": 8,
    "rounds": 2,
    "min-clients": 2,
    "round-timeout": 300,
    "evaluation": "clients",
}
# Each command starts Python and imports Flower, every task of a client torch too.
START_SECONDS, RUN_SECONDS = 120, 900


@dataclass(frozen=True)
class Deployment:
    """What a run over real processes left, while the processes are still there."""

    port: int
    authority: Path
    processes: Processes
    record: RunRecord

    @property
    def rounds(self) -> list[RoundReport]:
        """From round 0 on."""
        return list(self.record.rounds())


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    # Not pytest's own folder: its name is long, and it stays.
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder:
        processes = Processes(Path(folder))
        try:
            yield deploy(processes)
        finally:
            processes.stop()


@pytest.fixture(autouse=True)
def logs_of_a_failure(deployment, request):
    """A failed test shows what the processes printed."""
    failed_before = request.session.testsfailed
    yield
    if request.session.testsfailed > failed_before:
        print(deployment.processes.logs())


def test_both_devices_train_their_own_blocks_on_their_own_images_in_both_rounds(deployment):
    start, *trained = deployment.rounds
    assert [start.server_round, *(r.server_round for r in trained)] == [0, 1, 2]
    assert start.clients == ()
    for report in trained:
        assert {client.name: client.blocks for client in report.clients} == BLOCKS
        assert {client.name: client.num_examples for client in report.clients} == {
            name: len(CLASSES) * count * 4 // 5 for name, count in IMAGES.items()
        }  # the fifth part validates
        assert set(report.coverage.values()) == {1, 2}  # the wider device's own block, the rest


def test_both_rounds_are_evaluated_and_refuse_nobody(deployment):
    for report in deployment.rounds[1:]:
        assert report.refused == {}
        assert 0 <= report.accuracy <= 1
        assert report.loss > 0
    assert deployment.record.summary()["accuracy"] == deployment.rounds[-1].accuracy


def test_devices_report_their_memory_and_where_there_is_a_sensor_their_temperature(deployment):
    sensors = getattr(psutil, "sensors_temperatures", dict)()
    for client in (c for report in deployment.rounds for c in report.clients):
        assert client.metrics["resident-peak-bytes"] > client.peak_bytes > 0
        assert ("temperature-celsius" in client.metrics) == any(sensors.values())


def test_the_saved_model_differs_from_the_pretrained_one_where_a_device_trained(deployment):
    path = deployment.record.model_path
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["classes"]) == list(CLASSES)
    options = {"num_classes": len(CLASSES), "image_size": IMAGE_SIZE}
    pretrained = load_backbone("efficientnet_lite0", **options)
    saved = load_backbone("efficientnet_lite0", **options, weights=str(path))
    before, after = pretrained.model.state_dict(), saved.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == deployment.rounds[-1].coverage.keys()


def test_the_server_speaks_tls_alone(deployment):
    assert handshake(deployment.port, deployment.authority) is not None
    plain = http.client.HTTPConnection(HOST, deployment.port, timeout=30)
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        plain.request("GET", "/")
        plain.getresponse()


def test_a_node_whose_key_is_not_registered_is_turned_away(deployment):
    log = deployment.processes.log(STRANGER)
    assert deployment.processes.exit_code(STRANGER) != 0
    assert "Failed to initialize the connection to the SuperLink" in log
    assert "SuperNode ID" not in log


def deploy(processes: Processes) -> Deployment:
    """Start server and devices, submit the app and wait until its run has ended."""
    folder = processes.folder
    authority = write_certificates(folder)
    for name in (*BLOCKS, STRANGER):
        write_node_key(folder / f"{name}-key")
    write_images(folder)
    port, *node_ports = free_ports(1 + len(BLOCKS) + 1)
    start_superlink(processes, port)
    processes.wait("SuperLink listens", lambda: handshake(port, authority), START_SECONDS)
    write_connection(folder / "user", port)
    register_devices(processes)
    for name, node_port in zip((*BLOCKS, STRANGER), node_ports, strict=True):
        start_supernode(processes, name, port, node_port)
    record = RunRecord(folder / "run")
    submit(processes, record)
    processes.finish("run", RUN_SECONDS)  # ends well even if the run does not
    processes.wait("summary", record.summary_path.exists, seconds=1)
    processes.wait(
        "end of stranger", lambda: processes.exit_code(STRANGER) is not None, START_SECONDS
    )
    return Deployment(port, authority, processes, record)


def write_images(folder: Path) -> None:
    """Each device's own part of the digits, as `pi-01-images/eight/0.png` and so on."""
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    for class_name, digit in CLASSES.items():
        images = iter(pixels[digits.target == digit])
        for device, count in IMAGES.items():
            class_folder = folder / f"{device}-images" / class_name
            class_folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(next(images)).save(class_folder / f"{i}.png")


def start_superlink(processes: Processes, port: int) -> None:
    folder = processes.folder
    processes.start(
        "superlink",
        "server",
        "flower-superlink",
        *("--host", HOST, "--port", port, "--database", "state.db", "--enable-supernode-auth"),
        *("--ssl-ca-certfile", folder / "ca.crt", "--ssl-certfile", folder / "server.pem"),
        *("--ssl-keyfile", folder / "server.key", "--disable-runtime-dependency-installation"),
    )


def write_connection(user: Path, port: int) -> None:
    """Tell the user's `flwr` where the SuperLink is."""
    user.mkdir()
    connection = {"address": f"{HOST}:{port}", "root-certificates": str(user.parent / "ca.crt")}
    (user / "config.toml").write_text(tomli_w.dumps({"superlink": {"lab": connection}}))


def register_devices(processes: Processes) -> None:
    for name in BLOCKS:
        key = processes.folder / f"{name}-key.pub"
        processes.start(
            f"register-{name}",
            "user",
            *("flwr", "supernode", "register", key, "lab", "--name", name),
        )
    for name in BLOCKS:
        processes.finish(f"register-{name}", START_SECONDS)


def start_supernode(processes: Processes, name: str, port: int, own_port: int) -> None:
    folder = processes.folder
    node = {"name": name, "data": str(folder / f"{name}-images"), "blocks": BLOCKS.get(name, 1)}
    processes.start(
        name,
        name,
        "flower-supernode",
        *("--superlink", f"{HOST}:{port}", "--root-certificates", folder / "ca.crt"),
        *("--auth-supernode-private-key", folder / f"{name}-key"),
        *("--host", HOST, "--port", own_port),
        *("--node-config", " ".join(f"{key}={json.dumps(value)}" for key, value in node.items())),
    )


def submit(processes: Processes, record: RunRecord) -> None:
    """Submit a copy of the app: Flower may write into the folder that it is given."""
    app = processes.folder / "app"
    for package in ("clients", "fleet", "strategies"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(CHECKOUT / package, app / package, ignore=ignore)
    shutil.copy(CHECKOUT / "pyproject.toml", app)
    settings = processes.folder / "run.toml"
    settings.write_text(tomli_w.dumps(SETTINGS | {"run-dir": str(record.path)}))
    processes.start("run", "user", "flwr", "run", app, "lab", "--stream", "--run-config", settings)
