import getpass

import pytest
from click.testing import CliRunner

from fleet.cli import main
from fleet.deploy import services


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Without what this machine has of systemd's."""
    monkeypatch.setattr(services, "program", lambda: "/opt/fleet/bin/fleet")
    monkeypatch.setattr(services, "clock_units", lambda: [])
    monkeypatch.setattr(services, "systemd_version", lambda: 254)


@pytest.fixture
def service(tmp_path):
    """A function that runs `fleet service install` with paths that are there."""
    for name in ("images", "server", "units"):
        (tmp_path / name).mkdir()
    (tmp_path / "pi-01.tar.gz").touch()
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
