import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import ssl
import stat
import subprocess
import sys
import threading

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives import serialization

from fleet.cli import main
from fleet.deploy.addresses import Address
from fleet.deploy.bundle import install_bundle
from fleet.deploy.certificates import public_pem
from fleet.deploy.provisioning import Provisioner
from fleet.deploy.registry import read_devices
from fleet.errors import ConfigError

HOST = Address("server.local", 8443)


@pytest.fixture
def fleet(tmp_path):
    """A folder with an authority, a server and two devices."""
    provisioner = Provisioner(tmp_path)
    provisioner.begin([HOST], ["pi-01", "pi-02"])
    return provisioner


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def devices(fleet):
    return read_devices(fleet.server.registry_path)


def test_every_machine_has_a_folder_of_its_own(fleet):
    names = {str(path.relative_to(fleet.out)) for path in fleet.out.rglob("*") if path.is_file()}
    device = {"bundle.toml", "ca.crt", "device.key"}
    assert names == {
        *("authority/ca.key", "authority/ca.crt"),
        *("server/ca.crt", "server/server.pem", "server/server.key"),
        *("server/devices.toml", "server/server.toml"),
        *(f"pi-01/{name}" for name in device),
        *(f"pi-02/{name}" for name in device),
        *("pi-01.tar.gz", "pi-02.tar.gz"),
    }


def test_everything_is_for_its_owner_alone(tmp_path):
    before = os.umask(0)  # the most that a careless user allows
    try:
        Provisioner(tmp_path / "out").begin([HOST], ["pi-01"])
    finally:
        os.umask(before)
    for path in (tmp_path / "out").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_the_registry_has_the_public_half_of_the_key_in_the_bundle(fleet, tmp_path):
    for name, device in devices(fleet).items():
        bundle = install_bundle(fleet.bundle_path(name), tmp_path / f"state-{name}")
        private = serialization.load_ssh_private_key(bundle.key_path.read_bytes(), password=None)
        pem = private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        assert public_pem(device.public_key) == pem
        assert (bundle.name, bundle.server) == (name, HOST)


def test_the_servers_key_is_that_of_its_certificate(fleet):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(fleet.server.certificate_path, fleet.server.key_path)


def test_a_device_that_is_added_gets_a_key_and_touches_no_other(fleet):
    before = contents(fleet.out)
    fleet.add(["pi-03"])
    after = contents(fleet.out)
    registry = fleet.server.registry_path
    assert {path for path in before if after[path] != before[path]} == {registry}
    assert list(devices(fleet)) == ["pi-01", "pi-02", "pi-03"]


def test_a_revoked_device_stays_on_record_and_may_come_back_with_a_new_key(fleet):
    old = devices(fleet)["pi-01"]
    fleet.revoke(["pi-01"])
    revoked = devices(fleet)["pi-01"]
    assert revoked.revoked >= revoked.added and revoked.public_key == old.public_key
    with pytest.raises(ConfigError, match="pi-01 is there already, and keys are never overwritten"):
        fleet.add(["pi-01"])
    for path in (fleet.out / "pi-01").iterdir():
        path.unlink()
    (fleet.out / "pi-01").rmdir()
    fleet.bundle_path("pi-01").unlink()
    fleet.add(["pi-01"])
    again = devices(fleet)["pi-01"]
    assert again.revoked is None and again.public_key != old.public_key


def test_renewing_replaces_the_servers_certificate_alone(fleet):
    before = contents(fleet.out)
    fleet.renew()
    server = fleet.server
    after = contents(fleet.out)
    changed = {path for path in before if after[path] != before[path]}
    assert changed == {server.certificate_path, server.key_path}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.certificate_path, server.key_path)


def test_renewing_for_another_host_is_what_new_bundles_say(fleet, tmp_path):
    fleet.renew([Address("10.0.0.9", 9000), HOST])
    assert fleet.show().names[:2] == ("10.0.0.9", "server.local")
    fleet.add(["pi-03"])
    bundle = install_bundle(fleet.bundle_path("pi-03"), tmp_path / "state")
    assert str(bundle.server) == "10.0.0.9:9000"


@pytest.mark.parametrize("name", ["", ".hidden", "-x", "a/b", "a b", "é", "a" * 64, "server"])
def test_a_name_that_is_no_folders_is_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(ConfigError, match=r"device name .* cannot be used; take letters"):
        Provisioner(tmp_path / "out").begin([HOST], ["pi-01", name])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", [("pi-03", "pi-03"), ("pi-03", "PI-03")])
def test_a_name_that_is_given_twice_is_refused(fleet, names):
    with pytest.raises(ConfigError, match="is named twice; name each once"):
        fleet.add(names)
    assert "pi-03" not in devices(fleet)


def test_a_fleet_that_begins_with_a_name_twice_leaves_nothing(tmp_path):
    with pytest.raises(ConfigError, match="device X is named twice; name each once"):
        Provisioner(tmp_path / "out").begin([HOST], ["x", "X"])
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def full_from(write):
    """A disk that has room for so many files, and for no more."""
    writes, fsync = itertools.count(), os.fsync

    def failing(handle):
        if stat.S_ISREG(os.fstat(handle).st_mode) and next(writes) >= write:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        yield


def begin_on_a_full_disk(provisioner):
    """Provision with room for no file, for one, and so on; yields after each failure."""
    for write in range(100):
        try:
            with full_from(write):
                provisioner.begin([HOST], ["pi-01"])
            return
        except ConfigError as error:
            assert "No space left on device; free space" in str(error)
            yield


def test_a_fleet_that_did_not_come_about_says_what_is_in_the_way(tmp_path):
    """And begins once that is removed."""
    failures = 0
    for _ in begin_on_a_full_disk(Provisioner(tmp_path)):
        failures += 1
        files = {path for path in tmp_path.rglob("*") if path.is_file()}
        assert not (tmp_path / "pi-01").exists()  # half of a bundle is never left
        if tmp_path / "server" / "devices.toml" in files:
            with pytest.raises(ConfigError, match="is provisioned already; add devices with --add"):
                Provisioner(tmp_path).begin([HOST], ["pi-01"])
            Provisioner(tmp_path).add(["pi-01"])
        elif files:
            with pytest.raises(ConfigError, match=r"in part only: .*toml is missing") as told:
                Provisioner(tmp_path).begin([HOST], ["pi-01"])
            named = {path for path in files if str(path) in str(told.value)}
            assert named >= files - {tmp_path / "authority" / "ca.crt"}
        for path in tmp_path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert failures == 12  # files of authority, server and device, the registry twice
    assert devices(Provisioner(tmp_path)).keys() == {"pi-01"}


def test_a_folder_in_which_a_server_was_tried_without_keys_can_be_provisioned(tmp_path):
    (tmp_path / "server" / "state").mkdir(parents=True)
    Provisioner(tmp_path).begin([HOST], ["pi-01"])


DAMAGES = {
    "the key of another": lambda server, other: other.key_path.read_bytes(),
    "no key": lambda server, other: b"x",
    "half a key": lambda server, other: server.key_path.read_bytes()[:100],
    "nothing": lambda server, other: b"",
}


@pytest.mark.parametrize("file", ["server.key", "server.pem", "ca.crt"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_server_whose_files_are_damaged_is_told_so_before_it_serves(
    fleet, tmp_path_factory, file, damage
):
    fleet.server.check()
    other = Provisioner(tmp_path_factory.mktemp("other"))
    other.begin([HOST], ["pi-01"])
    path = fleet.server.path / file
    path.write_bytes(DAMAGES[damage](fleet.server, other.server))
    with pytest.raises(ConfigError, match="server are damaged, or not of one another") as told:
        fleet.server.check()
    assert file in str(told.value) and "fleet provision --renew" in str(told.value)


def test_an_address_edited_by_hand_is_told_where_it_is_wrong(fleet):
    fleet.server.settings_path.write_text("hosts = 7")
    with pytest.raises(ConfigError, match=r"server.toml has hosts = 7, which is no list of addr"):
        fleet.server.hosts()


def test_a_certificate_that_has_expired_is_said_to_be_so(tmp_path, fleet, monkeypatch):
    monkeypatch.setattr("fleet.deploy.provisioning.days_left", lambda moment: -3)
    output = run("--out", tmp_path).output
    assert re.search(
        r"server's certificate expired 20.*, and no device connects; renew it:", output
    )


def test_nothing_is_provisioned_twice(fleet):
    before = contents(fleet.out)
    with pytest.raises(ConfigError, match="is provisioned already; add devices with --add"):
        fleet.begin([HOST], ["pi-09"])
    with pytest.raises(ConfigError, match="device pi-01 is registered already"):
        fleet.add(["pi-09", "pi-01"])
    assert contents(fleet.out) == before


def test_revoking_names_whom_it_does_not_know(fleet):
    with pytest.raises(ConfigError, match="there is no device pi-7; known: pi-01, pi-02"):
        fleet.revoke(["pi-01", "pi-7"])
    assert devices(fleet)["pi-01"].revoked is None
    fleet.revoke(["pi-01"])
    with pytest.raises(ConfigError, match="device pi-01 was revoked already"):
        fleet.revoke(["pi-01"])


@pytest.mark.parametrize(
    ("file", "what", "way_out"),
    [
        ("server/server.pem", "certificate", "make it anew with: fleet provision --renew"),
        ("server/ca.crt", "certificate", "put it back with: cp {out}/authority/ca.crt {file}"),
        ("authority/ca.crt", "certificate", "put it back from a backup, or provision anew"),
        ("authority/ca.key", "private key", "put it back from a backup, or provision anew"),
    ],
)
def test_a_damaged_file_is_named_with_the_way_out(fleet, file, what, way_out):
    path = fleet.out / file
    path.write_bytes(path.read_bytes()[:100])
    before = contents(fleet.out)
    option = ("--renew",) if file.startswith("authority") else ("--add", "pi-03")
    result = run("--out", fleet.out, *option)
    assert result.exit_code == 1
    assert f"Error: {path}: it holds no {what} that can be read (" in result.output
    assert f"; {way_out.format(out=fleet.out, file=path)}" in result.output
    assert contents(fleet.out) == before


def test_a_damaged_server_certificate_is_mended_by_what_the_error_says(fleet):
    fleet.server.certificate_path.write_bytes(b"x")
    assert run("--out", fleet.out, "--renew").exit_code == 0
    assert run("--out", fleet.out, "--add", "pi-03").exit_code == 0


def test_without_its_authority_a_server_cannot_be_renewed(fleet):
    (fleet.out / "authority" / "ca.key").unlink()
    with pytest.raises(ConfigError, match=r"there is no authority's key, .*put it back from a"):
        fleet.renew()


def test_where_nothing_is_it_says_how_to_begin(tmp_path):
    with pytest.raises(ConfigError, match="begin with: fleet provision --host NAME --devices"):
        Provisioner(tmp_path).show()


@pytest.mark.parametrize(
    "content",
    [
        "x",
        "",
        "[devices.pi-01]\n",
        '[devices."a/b"]\npublic-key = "x"',
        '[devices.pi-01]\npublic-key = "ssh-rsa AAAA"\nadded = 2026-01-01T00:00:00Z',
        "[devices.pi-01]\npublic-key = 7\nadded = 2026-01-01T00:00:00Z",
    ],
)
def test_a_registry_that_is_none_is_refused_whole(fleet, content):
    fleet.server.registry_path.write_text(content)
    with pytest.raises(ConfigError, match=r"registry .*devices.toml cannot be read"):
        devices(fleet)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [("added", "addde", "unknown key addde"), ("Z", "", "added is no time with a zone")],
)
def test_a_registry_edited_by_hand_is_told_where_it_is_wrong(fleet, old, new, complaint):
    path = fleet.server.registry_path
    lines = path.read_text().splitlines()
    edited = [line.replace(old, new) if line.startswith("added") else line for line in lines]
    path.write_text("\n".join(edited).replace("+00:00", new if old == "Z" else "+00:00"))
    with pytest.raises(ConfigError, match=complaint):
        devices(fleet)


def run(*arguments):
    return CliRunner().invoke(main, ["provision", *map(str, arguments)])


def test_the_command_line_takes_names_as_they_are_written(tmp_path):
    made = run("--host", "server.local", "10.0.0.9", "--devices", "a", "b", "c", "--out", tmp_path)
    assert made.exit_code == 0, made.output
    assert "server at server.local:8000, 10.0.0.9:8000" in made.output
    assert f"for c: {tmp_path / 'c.tar.gz'}" in made.output
    assert run("--out", tmp_path, "--revoke", "a", "b", "--add", "d", "e").exit_code == 0
    shown = json.loads(run("--show", "--out", tmp_path, "--format", "json").output)
    assert [d["name"] for d in shown["devices"] if d["revoked"]] == ["a", "b"]
    assert [d["name"] for d in shown["devices"] if not d["revoked"]] == ["c", "d", "e"]
    assert 820 < shown["certificates"]["server"]["days_left"] <= 825
    assert all(d["fingerprint"].startswith("SHA256:") for d in shown["devices"])
    table = run("--out", tmp_path).output
    assert all(d["fingerprint"] in table for d in shown["devices"])
    assert "server's certificate expires" in table


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--devices", "a"], "the server has no host; name one with --host"),
        (["--host", "s", "--devices", "a", "--add", "b"], "--devices begins a fleet"),
        (["--host", "s"], "--host goes with --devices, which begins a fleet, or with --renew"),
        (["--host", "s:99999", "--devices", "a"], "a port lies between 1 and 65535"),
        (["--add", "a"], "there is no registry of devices"),
    ],
)
def test_the_command_line_refuses_what_makes_no_sense(tmp_path, arguments, complaint):
    result = run(*arguments, "--out", tmp_path)
    assert result.exit_code == 1 and complaint in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_be_written_is_named(fleet, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    before = contents(fleet.out)
    with pytest.raises(ConfigError, match=r"cannot write .*: No space left on device; free space"):
        fleet.revoke(["pi-01"])
    assert contents(fleet.out) == before


def test_changes_at_the_same_time_all_count(fleet):
    names = [f"device-{number}" for number in range(8)]
    fleet.add(names)
    code = "import sys; from pathlib import Path; from fleet.deploy.provisioning import Provisioner"
    code += "; sys.stdin.readline(); getattr(Provisioner(Path(sys.argv[1])), sys.argv[2])"
    code += "(sys.argv[3:])"
    calls = [("add", "new-1", "new-2", "new-3"), ("revoke", *names[:4])]
    calls += [("revoke", *names[4:]), ("add", "new-4", "new-5")]
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(fleet.out), *call], stdin=subprocess.PIPE)
        for call in calls
    ]
    for process in processes:
        process.stdin.write(b"go\n")
        process.stdin.flush()
    for process in processes:
        process.stdin.close()
        assert process.wait(60) == 0
    there = devices(fleet)
    assert {name for name in there if there[name].revoked is not None} == set(names)
    assert {f"new-{number}" for number in range(1, 6)} <= there.keys()


def test_a_change_reads_what_another_wrote_before_its_turn(fleet):
    """Whatever the timing: while the folder is held, nothing is read or written."""
    late = threading.Thread(target=fleet.add, args=(["pi-03"],))
    with fleet._alone():
        late.start()
        late.join(0.3)
        assert late.is_alive() and "pi-03" not in devices(fleet)
        fleet._revoke(["pi-02"])
    late.join()
    assert devices(fleet)["pi-02"].revoked is not None and "pi-03" in devices(fleet)


@pytest.mark.parametrize(
    ("change", "arguments"), [("add", ["pi-03"]), ("revoke", ["pi-01"]), ("renew", [])]
)
def test_one_whose_turn_does_not_come_is_told_of_the_other(fleet, monkeypatch, change, arguments):
    monkeypatch.setattr("fleet.deploy.provisioning._LOCK_SECONDS", 0.1)
    before = contents(fleet.out)
    complaint = f"another fleet provision runs in {fleet.out} already; .* with --out"
    with fleet._alone(), pytest.raises(ConfigError, match=complaint):
        getattr(fleet, change)(arguments)
    assert contents(fleet.out) == before
