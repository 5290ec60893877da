"""Devices that run signed code alone, on real processes: a run that nobody signed, then one that
one of them trusts, of the same app.

A signed run alone is in test_fleet_server, which is not slow.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from fleet.deploy.addresses import Address
from fleet.deploy.provisioning import Provisioner
from fleet.records import RoundReport, RunRecord
from tests.deployment import (
    FEW_IMAGES,
    HOST,
    SMALL_RUN,
    TWO_CLASSES,
    Processes,
    free_ports,
    processes_in_a_folder,
    wait_for_keys,
    write_digits,
)
from tests.ssh_keys import fingerprint, make_key, public

TRUSTS = {"pi-01": "ops", "pi-02": "boss"}  # device → whose key it has
SETTINGS = SMALL_RUN | {"rounds": 1, "min-clients": 1}
RUN_SECONDS = 600

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Unsigned:
    """What was seen of a run that is not signed, long before its round-timeout was over.

    Attributes:
        followed: what its follower printed.
        listed: what fleet run --list said of it.
        devices: what each device's client had printed.
    """

    followed: str
    listed: str
    devices: dict[str, str]


@dataclass(frozen=True)
class Life:
    """What runs of the same app left.

    Attributes:
        signer: the fingerprint of the one key that signed the last.
        unsigned: of the one before it.
        devices: what each device's client had printed by the end.
        rounds: of the signed run, from round 1 on.
    """

    signer: str
    unsigned: Unsigned
    devices: dict[str, str]
    rounds: list[RoundReport]


@pytest.fixture(scope="module")
def life() -> Iterator[Life]:
    with processes_in_a_folder() as processes:
        try:
            yield live(processes)
        except AssertionError:
            print(processes.all_logs())
            raise


def test_a_run_that_is_not_signed_is_refused_by_every_device(life):
    for device, trusted in TRUSTS.items():
        refusal = f"runs only apps that are signed by {trusted}, and this one is signed by nobody"
        shown = f"refused: client {device} {refusal}; start the run with: fleet run"
        assert f"the run: {shown}" in life.unsigned.followed
        assert shown in life.unsigned.listed
        assert f"this device {refusal}; start" in life.unsigned.devices[device]


def test_the_device_that_trusts_the_signer_trains(life):
    (report,) = life.rounds
    assert [client.name for client in report.clients] == ["pi-01"] and report.stepped
    assert life.signer not in life.devices["pi-01"]


def test_the_other_is_refused_by_name_and_the_record_and_its_own_log_say_why(life):
    (report,) = life.rounds
    refusal = f"runs only apps that are signed by boss, and this one is signed by {life.signer};"
    (reason,) = report.refused.values()
    assert f"client pi-02 {refusal}" in reason
    assert f"this device {refusal} start the run with: fleet run --sign" in life.devices["pi-02"]


def live(processes: Processes) -> Life:
    """Start all, with a run that is not signed; then sign one, and see its end."""
    folder, (port,) = processes.folder, free_ports(1)
    provisioner = Provisioner(folder / "fleet")
    provisioner.begin([Address("localhost", port)], [*TRUSTS])
    write_digits(folder, FEW_IMAGES, TWO_CLASSES)
    processes.fleet("server", "server", "--dir", provisioner.server.path, "--host", HOST)
    wait_for_keys(processes, "server", TRUSTS)
    keys = {name: make_key(folder / name) for name in TRUSTS.values()}
    for device, trusted in TRUSTS.items():
        (folder / f"{trusted}.yaml").write_text(f"{trusted}: {public(keys[trusted])}\n")
        processes.fleet(
            *(device, "client", "--bundle", provisioner.bundle_path(device)),
            *("--data", folder / f"{device}-images", "--state", folder / device),
            *("--trusted-entities", folder / f"{trusted}.yaml"),
        )

    def start(run: str, *arguments: object, timeout: int) -> None:
        settings = SETTINGS | {"round-timeout": timeout}
        processes.fork_fleet(
            *(run, "run", "--dir", provisioner.server.path, "--name", run, *arguments),
            *(f"--{key}={value}" for key, value in settings.items()),
            *("--data", folder / "server-images"),
        )

    def logs() -> dict[str, str]:
        return {device: processes.log(device) for device in TRUSTS}

    start("unsigned", timeout=2 * RUN_SECONDS)
    processes.wait(
        "both devices refuse",
        lambda: processes.log("unsigned").count("refused: client pi-") >= len(TRUSTS),
        RUN_SECONDS,
    )
    command = ("run", "--dir", provisioner.server.path)
    processes.fork_fleet("list", *command, "--list", "--format", "json")
    processes.finish("list", RUN_SECONDS)
    unsigned = Unsigned(processes.log("unsigned"), processes.log("list"), logs())
    processes.fork_fleet("stop", *command, "--stop", "unsigned")
    processes.wait("its end", lambda: processes.exit_code("unsigned") is not None, RUN_SECONDS)
    start("signed", "--sign", keys["ops"], timeout=120)
    processes.finish("signed", RUN_SECONDS)
    record = RunRecord(provisioner.server.runs_path / "signed")
    rounds = list(record.rounds())[1:]
    return Life(fingerprint(keys["ops"]), unsigned, logs(), rounds)
