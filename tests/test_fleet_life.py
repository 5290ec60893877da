"""The life of a fleet, by its commands alone: provisioned, trained, a device lost and back, a bad
link, a wrong model; then exported, and predicting on a device."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fleet.backbones import load_backbone
from fleet.records import RoundReport, RunRecord
from tests.deployment import (
    HOST,
    Processes,
    free_ports,
    processes_in_a_folder,
    rounds_on_record,
    wait_for_keys,
    write_digits,
)

CLASSES = {"eight": 8, "four": 4, "one": 1}  # class folder → digit
LOST = "pi-01"  # killed in round 2, and back for round 3
FAR = "pi-02"  # behind a bad link, and with little memory
ODD = "pi-03"  # has other pretrained weights than the server
BUDGETS = {LOST: "off", FAR: "9"}  # MiB
IMAGES = {LOST: 16, FAR: 16, ODD: 8, "server": 8}  # of each class
BLOCKS, IMAGE_SIZE = 3, 32
SETTINGS = {
    "image-size": IMAGE_SIZE,
    "blocks": BLOCKS,
    "local-epochs": 1,
    "batch-size": 8,
    "rounds": 3,
    "min-clients": 3,  # a round waits for the lost device
    "round-timeout": 300,
    "codec-up": "topk:0.02+int4",
    "codec-down": "topk:0.02+int4",
    "cache": "off",
}
LINK = ("--kbits", 256, "--delay-ms", 150, "--resets", 0.05, "--seed", 1)
RUN_SECONDS = 1200


@dataclass(frozen=True)
class Life:
    """What the fleet's life left behind; its processes are still there.

    Attributes:
        seen: by the bad link, as it prints it.
    """

    folder: Path
    processes: Processes
    record: RunRecord
    seen: dict[str, int]

    @property
    def rounds(self) -> list[RoundReport]:
        """From round 1 on."""
        return list(self.record.rounds())[1:]

    def fleet(self, *arguments: object) -> str:
        """What a command of the project's prints, once it has ended well."""
        name = str(arguments[0])
        self.processes.fork_fleet(name, *arguments)
        self.processes.finish(name, 600)
        return self.processes.log(name)


@pytest.fixture(scope="module")
def life() -> Iterator[Life]:
    with processes_in_a_folder() as processes:
        yield live(processes)


@pytest.fixture(autouse=True)
def logs_of_a_failure(life, request):
    """A failed test shows what the processes printed."""
    failed_before = request.session.testsfailed
    yield
    if request.session.testsfailed > failed_before:
        print(life.processes.all_logs())


def test_every_round_is_done_by_all_that_could(life):
    taking_part = [{client.name for client in report.clients} for report in life.rounds]
    everyone = {LOST, FAR}
    assert taking_part == [everyone, everyone - {LOST}, everyone]
    assert all(report.stepped for report in life.rounds)


def test_the_device_that_was_lost_is_named_and_nobody_else_is(life):
    for report in life.rounds:
        expected = {ODD, LOST} if report.server_round == 2 else {ODD}
        assert report.refused.keys() == expected, report.refused


def test_a_device_with_another_model_is_refused_and_the_record_says_in_what(life):
    for report in life.rounds:
        assert "weights" in report.refused[ODD]


def test_devices_train_what_their_budgets_allow(life):
    for report in life.rounds:
        blocks = {client.name: client.blocks for client in report.clients}
        assert blocks.pop(FAR) < BLOCKS
        assert blocks == ({} if report.server_round == 2 else {LOST: BLOCKS})
        (small,) = (client for client in report.clients if client.name == FAR)
        assert small.peak_bytes <= float(BUDGETS[FAR]) * 2**20
        assert small.metrics["budget-bytes"] == float(BUDGETS[FAR]) * 2**20


def test_the_far_device_lost_no_update_on_its_bad_link(life):
    assert life.seen["cut"] > 0 and life.seen["exchanges"] > life.seen["cut"]
    assert all(FAR in {client.name for client in report.clients} for report in life.rounds)


def test_the_exported_model_is_the_runs_and_fits_the_original(life, tmp_path):
    path = tmp_path / "model.safetensors"
    life.fleet("export", life.record.path, "--to", path)
    exported, own = load_file(path), load_file(life.record.model_path)
    assert exported.keys() == own.keys()
    assert all(torch.equal(exported[name], own[name]) for name in own)
    original = load_backbone("efficientnet_lite0", num_classes=3, image_size=32, weights="none")
    original.model.load_state_dict(exported, strict=True)


def test_the_model_predicts_on_the_server_and_on_a_device(life):
    images = sorted((life.folder / "server-images").rglob("*.png"))[:6]
    for source in ([life.record.path], ["--state", life.folder / FAR]):
        told = json.loads(life.fleet("predict", *source, *images, "--format", "json"))
        assert len(told["predictions"]) == len(images)
        for prediction in told["predictions"]:
            assert prediction["ranking"][0]["class"] in CLASSES


def live(processes: Processes) -> Life:
    """Provision, start all, run; kill a device in round 2 and bring it back for round 3."""
    folder = processes.folder
    port, far_port = free_ports(2)
    machines = folder / "fleet"
    write_digits(folder, IMAGES, CLASSES)
    (folder / "odd-weights").mkdir()
    save_file(other_weights(), folder / "odd-weights" / "odd.safetensors")
    devices = [*BUDGETS, ODD]
    hosts = (f"{HOST}:{port}", "localhost")
    provision = ("provision", "--host", *hosts, "--devices", *devices, "--out", machines)
    processes.fleet("provision", *provision)
    processes.finish("provision", 600)
    link = (Path(__file__).with_name("slow_link.py"), "--listen", f"{HOST}:{far_port}", *LINK)
    processes.start("link", "user", "python", *link, "--to", f"{HOST}:{port}")
    processes.fleet("server", "server", "--dir", machines / "server", "--host", HOST)
    move_behind(machines / FAR, far_port)
    wait_for_keys(processes, "server", devices)
    for name in devices:
        start_client(processes, machines, name)
    settings = [f"--{key}={value}" for key, value in SETTINGS.items()]
    processes.fork_fleet(
        *("run", "run", "--dir", machines / "server", "--name", "life", *settings),
        *("--data", folder / "server-images"),
    )
    record = RunRecord(machines / "server" / "runs" / "life")
    processes.wait("round 1", lambda: rounds_on_record(record) >= 2, RUN_SECONDS)
    messages = processes.supernode_log(LOST).count("Receiving: train message")
    processes.wait(
        "round 2 on the device that is to be lost",
        lambda: processes.supernode_log(LOST).count("Receiving: train message") > messages,
        RUN_SECONDS,
    )
    processes.kill(LOST)
    processes.wait("round 2", lambda: rounds_on_record(record) >= 3, RUN_SECONDS)
    start_client(processes, machines, LOST)
    processes.finish("run", RUN_SECONDS)
    processes.process("link").terminate()
    processes.finish("link", 30)
    return Life(folder, processes, record, json.loads(processes.log("link").splitlines()[-1]))


def move_behind(bundle: Path, port: int) -> None:
    """Let a device find the server at another port: that of the link."""
    about = bundle / "bundle.toml"
    lines = about.read_text().splitlines()
    moved = [f'server = "{HOST}:{port}"' if line.startswith("server") else line for line in lines]
    assert moved != lines
    about.write_text("\n".join(moved) + "\n")


def start_client(processes: Processes, machines: Path, name: str) -> None:
    """As `fleet client` is called on the device; again, it has its bundle already."""
    folder = processes.folder
    options = ["--data", folder / f"{name}-images", "--state", folder / name]
    options += ["--budget-mib", BUDGETS.get(name, "off")]
    if name == ODD:
        options += ["--weights", folder / "odd-weights" / "odd.safetensors"]
    if not (folder / name).exists():
        options += ["--bundle", machines / name]
    processes.fleet(name, "client", *options)


def other_weights() -> dict[str, torch.Tensor]:
    """The pretrained model with one frozen tensor that differs."""
    state = load_backbone("efficientnet_lite0", num_classes=3, image_size=32).model.state_dict()
    name = next(name for name, tensor in state.items() if tensor.dim() == 4)
    return {n: (t * 1.01 if n == name else t).contiguous().clone() for n, t in state.items()}
