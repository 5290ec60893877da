"""The fleet's own commands on real processes: a signed run that loses all that it can.

In round 1 its SuperLink is killed, in round 2 a device's ClientApp, in round 3 the server. One
device trusts another signer, one has a key that the server does not know; at last one is
revoked. More ways to lose a device: test_killed_mid_round; runs without a signature:
test_signed_apps.
"""

import contextlib
import http.client
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from safetensors import safe_open

from fleet.backbones import load_backbone
from fleet.deploy.addresses import Address
from fleet.deploy.control import Control
from fleet.deploy.provisioning import Provisioner
from fleet.deploy.server import answers
from fleet.deploy.wishes import Wishes
from fleet.records import RoundReport, RunRecord
from tests.deployment import (
    HOST,
    Processes,
    client_app,
    free_ports,
    handshake,
    processes_in_a_folder,
    rounds_on_record,
    superlink_of,
    wait_for_keys,
    wait_until_at_work,
    write_digits,
)
from tests.ssh_keys import fingerprint, make_key, public

CLASSES = {"eight": 8, "four": 4, "one": 1}  # class folder → digit
LOST = "pi-02"  # its ClientApp is killed in round 2
BLOCKS = {"pi-01": 1, LOST: 2}
IMAGES = {"pi-01": 20, LOST: 80, "server": 10}  # of each class; the lost one is at work for a while
WARY = "pi-03"  # trusts another signer than the run's
TRUSTS = {"pi-01": "ops", LOST: "ops", WARY: "boss"}  # device → whose key it has
STRANGER = "stranger"  # has the server's certificate, but no key that it knows
IMAGE_SIZE = 32
SETTINGS = {
    "image-size": IMAGE_SIZE,
    "weights": "none",
    "blocks": 2,
    "local-epochs": 1,
    "batch-size": 8,
    "rounds": 3,
    "min-clients": 2,
    "round-timeout": 180,
    "cache": "off",
}
# Each command starts Python and imports Flower, every task of a client torch too.
START_SECONDS, RUN_SECONDS = 180, 900


@dataclass(frozen=True)
class Deployment:
    """What a run over real processes left, while the processes are still there.

    Attributes:
        signer: the fingerprint of the key that signed it.
        killed: the SuperLink that was killed in the first round.
        away_seconds: from then until its successor answered.
    """

    provisioner: Provisioner
    port: int
    processes: Processes
    record: RunRecord
    signer: str
    killed: int
    away_seconds: float

    @property
    def rounds(self) -> list[RoundReport]:
        """From round 0 on."""
        return list(self.record.rounds())

    def refused(self, report: RoundReport) -> dict[str, str]:
        """Who was refused in a round, and why, but for the wary device: that is none of Flower's
        nodes by name."""
        return {n: why for n, why in report.refused.items() if f"client {WARY} " not in why}

    def control(self) -> Control:
        """As the server itself talks to the SuperLink."""
        return Control(Address(HOST, self.port), self.provisioner.server.authority_path)


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    with processes_in_a_folder() as processes:
        yield deploy(processes)


@pytest.fixture(autouse=True)
def logs_of_a_failure(deployment, request):
    """A failed test shows what the processes printed."""
    failed_before = request.session.testsfailed
    yield
    if request.session.testsfailed > failed_before:
        print(deployment.processes.all_logs())


def test_both_devices_train_their_own_blocks_on_their_own_images_in_every_round(deployment):
    start, *trained = deployment.rounds
    assert [start.server_round, *(r.server_round for r in trained)] == [0, 1, 2, 3]
    assert start.clients == ()
    for report in trained:
        expected = dict(BLOCKS)
        if report.server_round == 2:
            del expected[LOST]
        else:  # nobody's update was lost with a server
            assert deployment.refused(report) == {}
        assert {client.name: client.blocks for client in report.clients} == expected
        for client in report.clients:  # some validate
            images = len(CLASSES) * IMAGES[client.name]
            assert images / 2 < client.num_examples < images
        # The wider device's own block, the rest.
        assert set(report.coverage.values()) == ({1} if LOST not in expected else {1, 2})


def test_the_run_went_on_over_a_superlink_that_was_killed(deployment):
    log = deployment.processes.log("server")
    assert "superlink was killed by signal 9; started again in" in log
    assert log.count("run first is submitted") == 1 and "was lost" not in log
    assert not psutil.pid_exists(deployment.killed)
    assert deployment.away_seconds < 90


def test_the_run_was_resumed_by_the_server_that_took_the_place_of_a_killed_one(deployment):
    assert deployment.processes.exit_code("server") == -9
    log = deployment.processes.log("server-again")
    assert "run first: it was lost" in log and "goes on from its checkpoint" in log
    assert "submission 2)" in log and "run first has finished" in log
    standing = Wishes(deployment.provisioner.server.runs_path).standing("first")
    assert (standing.status, standing.submissions, standing.fruitless) == ("finished", 2, 0)


def test_a_round_goes_on_without_a_device_whose_client_app_is_killed(deployment):
    report, back = deployment.rounds[2:]
    assert [client.name for client in report.clients] == ["pi-01"] and report.stepped
    assert {client.name for client in back.clients} == {"pi-01", LOST}


def test_a_client_app_that_dies_is_known_at_once_and_the_device_says_how(deployment):
    report = deployment.rounds[2]
    # Flower takes 40 to 60 s, or for ever, and knows nothing of a signal.
    assert report.seconds < 40
    assert deployment.refused(report).keys() == {LOST}
    reason = report.refused[LOST]
    assert "the process that worked on it died (killed by signal 9); on the device " in reason
    assert f"{LOST}/logs/supernode.log says more" in reason
    assert f"round 2: {LOST}: {reason}" in deployment.processes.log("run")


def test_a_device_that_trusts_the_signer_trains_and_has_nothing_to_say(deployment):
    assert deployment.signer not in deployment.processes.log("pi-01")


def test_another_refuses_by_name_and_the_record_and_its_own_log_say_why(deployment):
    refusal = (
        f"runs only apps that are signed by boss, and this one is signed by {deployment.signer};"
    )
    assert any(f"client {WARY} {refusal}" in why for why in deployment.rounds[1].refused.values())
    assert (
        f"this device {refusal} start the run with: fleet run --sign"
        in deployment.processes.log(WARY)
    )


def test_every_round_was_evaluated(deployment):
    for report in deployment.rounds[1:]:
        assert 0 <= report.accuracy <= 1
        assert report.loss > 0
    assert deployment.record.summary()["accuracy"] == deployment.rounds[-1].accuracy


def test_devices_report_their_memory_and_where_there_is_a_sensor_their_temperature(deployment):
    sensors = getattr(psutil, "sensors_temperatures", dict)()
    for client in (c for report in deployment.rounds for c in report.clients):
        assert client.metrics["resident-peak-bytes"] > client.peak_bytes > 0
        assert ("temperature-celsius" in client.metrics) == any(sensors.values())


def test_the_saved_model_differs_from_the_first_one_where_a_device_trained(deployment):
    path = deployment.record.model_path
    with safe_open(path, "pt") as file:
        assert sorted(json.loads(file.metadata()["classes"])) == sorted(CLASSES)
    options = {"num_classes": len(CLASSES), "image_size": IMAGE_SIZE}
    before = load_backbone("efficientnet_lite0", **options, weights="none").model.state_dict()
    saved = load_backbone("efficientnet_lite0", **options, weights=str(path)).model.state_dict()
    trained = deployment.rounds[-1].coverage.keys()
    assert trained <= saved.keys() == before.keys()
    assert all(not torch.equal(before[name], saved[name]) for name in trained)


def test_who_follows_a_run_sees_its_rounds_and_its_end(deployment):
    log = deployment.processes.log("run")
    assert [log.count(f"round {number}/3") for number in range(4)] == [1, 1, 1, 1]
    assert str(deployment.record.model_path) in log


def test_the_log_beside_the_record_names_each_round(deployment):
    log = (deployment.record.path / "server.log").read_text()
    assert all(f"round {number}/3: accuracy" in log for number in range(1, 4))


def test_the_server_speaks_tls_alone(deployment):
    authority = deployment.provisioner.server.authority_path
    assert handshake(deployment.port, authority) is not None
    plain = http.client.HTTPConnection(HOST, deployment.port, timeout=30)
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        plain.request("GET", "/")
        plain.getresponse()


def test_a_stranger_is_told_so_and_what_to_do(deployment):
    log = deployment.processes.log(STRANGER)
    assert f"does not know the key of {STRANGER}: it was taken out, or the bundle is" in log
    assert "fleet provision --add NAME" in log
    assert deployment.processes.exit_code(STRANGER) is None  # it keeps trying
    with contextlib.closing(deployment.control()) as control:
        assert len(control.nodes()) == len(TRUSTS)


def test_a_device_that_is_revoked_is_out_and_told_so_and_one_that_is_added_is_in(deployment):
    """Last of this file: it changes the fleet."""
    processes, provisioner = deployment.processes, deployment.provisioner
    provisioner.revoke(["pi-02"])
    provisioner.add(["pi-04"])
    processes.wait(
        "server follows the registry",
        lambda: (
            "pi-02 may no longer take part" in processes.log("server-again")
            and "pi-04 may take part" in processes.log("server-again")
        ),
        seconds=60,
    )
    with contextlib.closing(deployment.control()) as control:
        statuses = sorted(node.status for node in control.nodes())
    assert statuses == ["online", "online", "registered", "unregistered"]
    processes.wait(
        "the revoked device says so",
        lambda: "does not know the key of pi-02: it was taken out" in processes.log("pi-02"),
        seconds=START_SECONDS,
    )
    assert processes.exit_code("pi-02") is None


def test_everything_ends_with_the_commands(deployment):
    """The very last of this file: it ends the processes."""
    processes = deployment.processes
    started = [processes.process(name) for name in ("server-again", *TRUSTS, STRANGER)]
    family = [child for each in started for child in each.children(recursive=True)]
    assert len(family) >= 2 + 2 * len(TRUSTS) - 1
    for each in started:
        each.terminate()
    _, alive = psutil.wait_procs(started + family, timeout=60)
    assert alive == []
    for name in ("server-again", *TRUSTS, STRANGER):
        assert processes.exit_code(name) == 0, name
        assert "has ended" in processes.log(name)


def deploy(processes: Processes) -> Deployment:
    """Start all, ask for a run, kill one thing in each round; wait until it has ended."""
    folder = processes.folder
    (port,) = free_ports(1)
    provisioner = Provisioner(folder / "fleet")
    provisioner.begin([Address("localhost", port)], [*TRUSTS])
    write_digits(folder, IMAGES | {WARY: 1}, CLASSES)
    serve = ("server", "--dir", provisioner.server.path, "--host", HOST)
    processes.fleet("server", *serve)
    keys = {name: make_key(folder / name) for name in set(TRUSTS.values())}
    for name, key in keys.items():
        (folder / f"{name}.yaml").write_text(f"{name}: {public(key)}\n")
    wait_for_keys(processes, "server", TRUSTS)
    for name, trusted in TRUSTS.items():
        options = ("--trusted-entities", folder / f"{trusted}.yaml")
        # The wary one never gets as far as to need PyTorch, nor does the stranger.
        options += ("--blocks", BLOCKS[name]) if name in BLOCKS else ("--cold",)
        start_client(processes, provisioner.bundle_path(name), name, *options)
    settings = [f"--{key}={value}" for key, value in SETTINGS.items()]
    arguments = ("--dir", provisioner.server.path, "--name", "first", *settings)
    arguments += ("--sign", keys["ops"], "--data", folder / "server-images")
    processes.fork_fleet("run", "run", *arguments)
    # Not before both have all of their message: a run that is handing out is lost, and submitted
    # again. A device keeps the model that it has received.
    processes.wait(
        "both devices train",
        lambda: all([*(folder / name).rglob("models/*.safetensors")] for name in BLOCKS),
        RUN_SECONDS,
    )
    killed = superlink_of(processes)
    killed.kill()
    since = time.monotonic()
    killed.wait()
    address, authority = Address(HOST, port), provisioner.server.authority_path
    processes.wait("a SuperLink answers", lambda: answers(address, authority), RUN_SECONDS)
    away_seconds = time.monotonic() - since
    record = RunRecord(provisioner.server.runs_path / "first")
    wait_until_at_work(processes, LOST, 2, record)
    client_app(processes, LOST).kill()
    processes.wait("round 2", lambda: rounds_on_record(record) >= 3, RUN_SECONDS)
    processes.process("server").kill()  # with nobody left to end its children
    processes.fleet("server-again", *serve)  # as systemd would
    start_client(processes, bundle_of_a_stranger(provisioner), STRANGER, "--cold", images="pi-01")
    processes.finish("run", RUN_SECONDS)
    processes.wait(
        "the stranger is turned away",
        lambda: "does not know the key" in processes.log(STRANGER),
        START_SECONDS,
    )
    signer = fingerprint(keys["ops"])
    return Deployment(provisioner, port, processes, record, signer, killed.pid, away_seconds)


def start_client(
    processes: Processes, bundle: Path, name: str, *arguments: object, images: str = ""
) -> None:
    data = processes.folder / f"{images or name}-images"
    state = ("--state", processes.folder / name)
    processes.fleet(name, "client", "--bundle", bundle, "--data", data, *state, *arguments)


def bundle_of_a_stranger(provisioner: Provisioner) -> Path:
    """A bundle of another fleet's key, with this server's address and authority."""
    other = Provisioner(provisioner.out.parent / "other")
    other.begin(provisioner.server.hosts(), [STRANGER])
    folder = other.out / STRANGER
    (folder / "ca.crt").write_bytes(provisioner.server.authority_path.read_bytes())
    return folder
