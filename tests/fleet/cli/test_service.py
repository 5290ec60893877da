import getpass
import shutil

import pytest
from click.testing import CliRunner

from fleet.cli import main
from fleet.deploy import services
from fleet.deploy.addresses import Address
from fleet.deploy.provisioning import Provisioner


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Without what this machine has of systemd's."""
    monkeypatch.setattr(services, "program", lambda: "/srv/fleet/bin/fleet")
    monkeypatch.setattr(services, "clock_units", lambda: [])
    monkeypatch.setattr(services, "systemd_version", lambda: 254)


@pytest.fixture
def service(tmp_path):
    """A function that runs `fleet service install` with paths that are there."""
    for name in ("images", "units"):
        (tmp_path / name).mkdir()
    Provisioner(tmp_path).begin([Address("server.local", 8000)], ["pi-01"])
    paths = {
        "client": ("--bundle", tmp_path / "pi-01.tar.gz", "--data", tmp_path / "images"),
        "server": ("--dir", tmp_path / "server"),
    }

    def run(side, *arguments, given=True):
        common = ("--unit-dir", tmp_path / "units", "--state", tmp_path / "state")
        who = ("--user", getpass.getuser())
        command = ("service", "install", side, *(paths[side] if given else ()), *common, *who)
        return CliRunner().invoke(main, [*map(str, command), *map(str, arguments)])

    return run


@pytest.mark.parametrize("side", ["client", "server"])
def test_it_prints_what_it_wrote_and_how_to_go_on(service, tmp_path, side):
    result = service(side)
    assert result.exit_code == 0, result.output
    path = tmp_path / f"units/fleet-{side}.service"
    assert result.output == (
        f"{path.read_text()}\nwrote {path}; go on with\n"
        f"    sudo systemctl daemon-reload\n"
        f"    sudo systemctl enable --now fleet-{side}\n"
    )


def test_again_it_says_that_nothing_changes_and_after_a_change_to_restart(service, tmp_path):
    service("client")
    path = tmp_path / "units/fleet-client.service"
    assert service("client").output == f"{path} is there already, the same in every line\n"
    changed = service("client", "--memory-max", "1500M").output
    assert changed.endswith(
        f"replaced {path}; go on with\n"
        f"    sudo systemctl daemon-reload\n"
        f"    sudo systemctl restart fleet-client\n"
    )


def test_print_writes_nothing(service, tmp_path):
    result = service("client", "--print", "--", "--budget-mib", "16")
    assert result.exit_code == 0, result.output
    assert f"--state {tmp_path / 'state'} --budget-mib 16\n" in result.output
    assert list((tmp_path / "units").iterdir()) == []
    assert not (tmp_path / "state").exists()


def test_options_reach_the_unit(service, tmp_path):
    text = service(
        *("server", "--host", "0.0.0.0", "--port", "443", "--writable", tmp_path / "runs"),
        *("--name", "lab", "--memory-max", "2G", "--gpu", "--print"),
    ).output
    assert "--host 0.0.0.0 --port 443\n" in text
    assert "AmbientCapabilities=CAP_NET_BIND_SERVICE\n" in text
    assert "MemoryMax=2G\n" in text
    assert f'"{tmp_path / "runs"}"\n' in text
    assert "PrivateDevices" not in text


def test_waiting_for_the_clock_is_said_and_can_be_left_out(service, monkeypatch):
    units = ["time-sync.target", "chrony-wait.service"]
    monkeypatch.setattr(services, "clock_units", lambda: units)
    waits = service("client")
    assert "Wants=network-online.target time-sync.target chrony-wait.service\n" in waits.output
    assert waits.output.endswith(
        "It waits for chrony-wait.service; without a time server in reach that is for ever: "
        "--no-wait-for-clock\n"
    )
    assert "chrony" not in service("client", "--no-wait-for-clock").output


def test_uninstall_needs_no_paths_and_tells_what_is_left(service, tmp_path):
    service("client")
    path = tmp_path / "units/fleet-client.service"
    result = service("client", "--uninstall", given=False)
    assert result.exit_code == 0, result.output
    assert not path.exists()
    assert result.output == (
        f"removed {path}; end it with\n"
        f"    sudo systemctl stop fleet-client\n"
        f"    sudo systemctl daemon-reload\n"
    )


def test_what_is_missing_is_named(service):
    result = service("client", given=False)
    assert result.exit_code == 1
    assert "--bundle is missing; fleet service install client --help tells" in result.output


def test_a_unit_changed_by_hand_is_replaced_only_by_force(service, tmp_path):
    service("server")
    path = tmp_path / "units/fleet-server.service"
    path.write_text(path.read_text() + "# mine\n")
    assert "was changed, or made, by hand" in service("server").output
    assert service("server").exit_code == 1
    assert service("server", "--force").exit_code == 0
    assert "# mine" not in path.read_text()


@pytest.mark.parametrize(
    ("side", "arguments", "complaint"),
    [
        ("client", ["--budget-mib", "-7"], "budget-mib must be off, auto or a number of MiB above"),
        ("client", ["--set", "soft-temperature=999"], "from 0 to 150, got 999"),
        ("client", ["--set", "blocks=two"], "must be a whole number from 0 on, got 'two'"),
        ("client", ["--blocks", "-1"], "Invalid value for '--blocks': -1 is not in the range"),
        ("client", ["--bugdet-mib", "7"], "No such option"),
        ("client", ["--weights", "/no/file.pth"], "--weights /no/file.pth is no file"),
        ("client", ["--insecure"], "--insecure uses no keys, and --bundle holds some"),
        ("client", ["--data=/other"], "--data=/other after -- would take the place of the serv"),
        ("server", ["--insecure"], "--insecure serves without encryption and keys, and --host 0.0"),
        ("server", ["--port", "9"], "--port after -- would take the place of the service's own"),
        ("server", ["--hots", "x"], "No such option"),
    ],
)
@pytest.mark.parametrize("only_print", [[], ["--print"]])
def test_a_command_that_would_fail_for_ever_becomes_no_unit(
    service, tmp_path, side, arguments, complaint, only_print
):
    result = service(side, *only_print, "--", *arguments)
    assert result.exit_code != 0 and complaint in result.output
    assert list((tmp_path / "units").iterdir()) == []


def test_a_bundle_or_folder_that_is_none_becomes_no_unit(service, tmp_path):
    (tmp_path / "server" / "server.pem").write_text("x")
    assert "server are damaged, or not of one another" in service("server").output
    (tmp_path / "pi-01.tar.gz").write_text("x")
    assert "pi-01.tar.gz is no bundle: " in service("client").output
    (tmp_path / "images").rmdir()
    (tmp_path / "images").touch()
    shutil.copytree(tmp_path / "pi-01", tmp_path / "folder")
    more = ("--bundle", tmp_path / "folder")
    assert f"--data {tmp_path / 'images'} is no folder" in service("client", *more).output
    (tmp_path / "folder" / "device.key").chmod(0o644)
    assert "device.key is this device's private key, and its mode is 0644" in (
        service("client", *more).output
    )
    assert list((tmp_path / "units").iterdir()) == []


def test_files_that_arguments_name_are_seen_by_the_service(service, tmp_path, monkeypatch):
    (tmp_path / "own.pth").touch()
    monkeypatch.chdir(tmp_path)
    refused = service("client", "--", "--weights", "own.pth")
    assert refused.exit_code == 1
    assert f"would not find what is {tmp_path / 'own.pth'} here; name it so after --" in (
        refused.output
    )
    text = service("client", "--", "--set", f"weights={tmp_path / 'own.pth'}").output
    seen = [line for line in text.splitlines() if line.startswith("BindReadOnlyPaths")]
    assert any(str(tmp_path / "own.pth") in line for line in seen)


def test_links_that_the_service_would_lose_are_a_warning(service, tmp_path):
    (tmp_path / "images" / "dog").symlink_to(tmp_path / "dogs")
    (tmp_path / "dogs").mkdir()
    result = service("client")
    assert result.exit_code == 0
    assert (
        f"Warning: 1 link in {tmp_path / 'images'} leads to nothing, or to what a service does not "
        f"see, and what lies there takes no part; the first is {tmp_path / 'images' / 'dog'}, to "
        f"{tmp_path / 'dogs'}: copy the images into {tmp_path / 'images'}\n" in result.stderr
    )


def test_a_server_sees_the_data_of_its_runs(service, tmp_path):
    (tmp_path / "data").mkdir()
    text = service("server", "--readable", tmp_path / "data").output
    assert f'BindReadOnlyPaths="-{tmp_path / "data"}"\n' in text
    missing = service("server", "--readable", tmp_path / "none")
    assert missing.exit_code == 1
    assert f"{tmp_path / 'none'} is not there; the service could not start" in missing.output
