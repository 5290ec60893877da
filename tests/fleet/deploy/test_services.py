import getpass
import os
import pwd
import sys
from pathlib import Path

import pytest

from fleet.deploy import services
from fleet.deploy.services import (
    check,
    client_service,
    clock_units,
    default_user,
    install,
    program_folders,
    server_service,
    systemd_version,
    uninstall,
)
from fleet.deploy.units import unit_text
from fleet.errors import ConfigError

USER = getpass.getuser()


@pytest.fixture(autouse=True)
def installed_program(tmp_path, monkeypatch):
    """A `fleet` of this Python's, wherever the tests run from."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "fleet").write_text("#!/bin/sh\n")
    (scripts / "fleet").chmod(0o755)
    monkeypatch.setattr(services.sysconfig, "get_path", lambda name: str(scripts))
    return scripts / "fleet"


@pytest.fixture
def units(tmp_path):
    folder = tmp_path / "units"
    folder.mkdir()
    return folder


@pytest.fixture
def client(tmp_path):
    """A function that makes a client's service."""
    (tmp_path / "pi-01.tar.gz").write_bytes(b"keys")
    (tmp_path / "pi-01.tar.gz").chmod(0o600)
    (tmp_path / "images").mkdir()

    def make(**options):
        given = {
            "name": "fleet-client",
            "bundle": tmp_path / "pi-01.tar.gz",
            "data": tmp_path / "images",
            "state": tmp_path / "state",
            "user": USER,
        }
        return client_service(**given | options)

    return make


def test_a_clients_command_is_the_documented_one(client, tmp_path, installed_program):
    service = client(arguments=["--budget-mib", "16"])
    assert service.command == [
        *(str(installed_program), "client", "--bundle", str(tmp_path / "pi-01.tar.gz")),
        *("--data", str(tmp_path / "images"), "--state", str(tmp_path / "state")),
        *("--budget-mib", "16"),
    ]
    assert service.environment == {"FLEET_CACHE": str(tmp_path / "state/features")}


def test_a_servers_command_is_the_documented_one(tmp_path, installed_program):
    options = {"name": "s", "folder": tmp_path / "server", "state": None, "user": USER}
    service = server_service(**options)
    assert service.command == [
        *(str(installed_program), "server"),
        *("--dir", str(tmp_path / "server"), "--state", "/var/lib/s"),
    ]
    listening = server_service(**options, host="0.0.0.0", port=443, writable=[tmp_path / "runs"])
    assert listening.command[-4:] == ["--host", "0.0.0.0", "--port", "443"]
    assert listening.low_port and not service.low_port
    assert listening.writable == [tmp_path / "server", tmp_path / "runs"]


def test_paths_are_absolute_and_links_are_followed(client, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    service = client(data=Path("link"), bundle=Path("pi-01.tar.gz"))
    assert service.readable == [tmp_path / "pi-01.tar.gz", tmp_path / "images"]


@pytest.mark.parametrize("form", ["{0} {1}", "{0}={1}"])
def test_trusted_keys_are_seen_by_the_service_wherever_they_lie(
    client, tmp_path, monkeypatch, form
):
    (tmp_path / "keys.yaml").touch()
    monkeypatch.chdir(tmp_path)
    arguments = form.format("--trusted-entities", "keys.yaml").split()
    service = client(arguments=["--cold", *arguments])
    path = tmp_path / "keys.yaml"
    assert service.readable[2:] == [path]
    expected = form.format("--trusted-entities", path).split()
    assert service.command[-len(expected) - 1 :] == ["--cold", *expected]
    path.unlink()
    with pytest.raises(ConfigError, match=r"keys\.yaml is not there; the service could not start"):
        services.check(service)


def test_the_program_is_seen_in_its_environment(client):
    folders = program_folders()
    assert client().program == folders
    for needed in (sys.executable, os.path.realpath(sys.executable), services.__file__):
        assert any(Path(needed).is_relative_to(folder) for folder in folders)


def test_installing_writes_the_unit_and_makes_the_state_folder(client, units, tmp_path):
    done = install(client(), units)
    assert (done.changed, done.replaced) == (True, False)
    assert done.path == units / "fleet-client.service"
    assert done.path.read_text() == done.text == unit_text(client())
    assert done.path.stat().st_mode & 0o777 == 0o644
    state = (tmp_path / "state").stat()
    assert (state.st_mode & 0o777, state.st_uid) == (0o700, pwd.getpwnam(USER).pw_uid)
    assert [path.name for path in units.iterdir()] == ["fleet-client.service"]


def test_installing_again_changes_nothing_and_other_options_replace(client, units):
    install(client(), units)
    again = install(client(), units)
    assert (again.changed, again.replaced) == (False, False)
    other = install(client(memory_max="50%"), units)
    assert (other.changed, other.replaced) == (True, True)
    assert "MemoryMax=50%" in other.path.read_text()


def test_a_unit_changed_by_hand_is_never_overwritten_without_force(client, units):
    path = install(client(), units).path
    changed = path.read_text().replace("MemoryMax=80%", "MemoryMax=1G")
    path.write_text(changed)
    with pytest.raises(ConfigError, match="was changed, or made, by hand; keep it, put your"):
        install(client(memory_max="50%"), units)
    assert path.read_text() == changed
    assert install(client(), units, force=True).replaced
    assert path.read_text() == unit_text(client())


def test_uninstalling_removes_the_unit_and_its_start_and_leaves_the_state(client, units, tmp_path):
    path = install(client(), units).path
    wants = units / "multi-user.target.wants"
    wants.mkdir()
    (wants / path.name).symlink_to(path)
    assert uninstall("fleet-client", units) == path
    assert not path.exists()
    assert list(wants.iterdir()) == []
    assert (tmp_path / "state").is_dir()
    with pytest.raises(ConfigError, match=r"there is no .*; name the service with --name"):
        uninstall("fleet-client", units)


def test_uninstalling_spares_what_was_changed_by_hand(client, units):
    path = install(client(), units).path
    path.write_text(path.read_text() + "\n# mine\n")
    with pytest.raises(ConfigError, match="by hand; remove it all the same: --force"):
        uninstall("fleet-client", units)
    assert path.exists()
    uninstall("fleet-client", units, force=True)
    assert not path.exists()


def test_where_it_may_not_write_it_says_sudo(client, units, tmp_path):
    with pytest.raises(ConfigError, match=r"cannot write .*; run it with sudo .* or take the unit"):
        install(client(), tmp_path / "no such folder")


def test_what_is_not_there_is_named_before_anything_is_written(client, units, tmp_path):
    (tmp_path / "images").rmdir()
    with pytest.raises(ConfigError, match=r"images is not there; the service could not start"):
        install(client(), units)
    assert list(units.iterdir()) == []


def test_a_user_that_is_not_there_is_named(client):
    with pytest.raises(ConfigError, match=r"no user nobody-here on .*; name another with --user"):
        check(client(user="nobody-here"))


def test_a_bundle_that_the_user_cannot_read_is_named(client, monkeypatch):
    monkeypatch.setattr(services.pwd, "getpwnam", lambda name: pwd.struct_passwd(
        (name, "x", os.getuid() + 4321, 1, "", "/", "/bin/sh")
    ))  # fmt: skip
    with pytest.raises(
        ConfigError,
        match=r"pi-01\.tar\.gz can be read by its owner alone, who is not pi; sudo chown",
    ):
        check(client(user="pi"))


def test_the_project_has_to_be_installed(client, installed_program):
    installed_program.unlink()
    with pytest.raises(ConfigError, match="install the project: pip install fleet-mobiletl"):
        client()


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ([], []),
        (["usr/lib/systemd/system/systemd-time-wait-sync.service"], "systemd-time-wait-sync"),
        (
            [
                "lib/systemd/system/systemd-time-wait-sync.service",
                "etc/systemd/system/chrony-wait.service",
            ],
            "chrony-wait",
        ),
    ],
)
def test_the_unit_that_waits_for_the_clock_is_the_one_that_is_there(tmp_path, units, expected):
    for unit in units:
        (tmp_path / unit).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / unit).touch()
    wanted = ["time-sync.target", f"{expected}.service"] if expected else []
    assert clock_units(tmp_path) == wanted


def test_the_version_is_systemds_own(tmp_path, monkeypatch):
    program = tmp_path / "systemctl"
    program.write_text("#!/bin/sh\necho 'systemd 257 (257.13-1~deb13u1)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert systemd_version() == 257
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert systemd_version() == 254


def test_it_runs_as_who_called_sudo_and_as_root_only_by_name(monkeypatch):
    monkeypatch.setenv("SUDO_USER", "pi")
    assert default_user() == "pi"
    monkeypatch.setenv("SUDO_USER", "root")
    with pytest.raises(ConfigError, match=r"would run as root, .*name a user with --user NAME"):
        default_user()
