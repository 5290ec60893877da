import gzip
import io
import os
import tarfile
from pathlib import Path

import pytest
import tomli_w
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from clients.doctor.address import (
    Server,
    bundle_finding,
    bundle_server,
    parse_server,
    read_authority,
    read_bundle,
)
from fleet.deploy.bundle import install_bundle
from fleet.deploy.bundle import read_bundle as read_as_client
from fleet.errors import ConfigError


@pytest.fixture
def files(authority):
    key = ec.generate_private_key(ec.SECP384R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    settings = {"version": 1, "name": "pi-01", "server": "server.local:8443"}
    return {
        "bundle.toml": tomli_w.dumps(settings).encode(),
        "ca.crt": authority.pem.encode(),
        "device.key": key,
    }


def archive(path, files, mode=0o600, folder="pi-01/"):
    with tarfile.open(path, "w:gz") as packed:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}{name}")
            member.size = len(content)
            packed.addfile(member, io.BytesIO(content))
    path.chmod(mode)
    return path


def folder(path, files, mode=0o600):
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)
        (path / name).chmod(mode)
    return path


@pytest.mark.parametrize("make", [archive, folder])
def test_a_bundle_tells_its_server_and_authority(tmp_path, files, make):
    bundle = read_bundle(make(tmp_path / "pi-01", files))
    assert bundle.files == files
    assert bundle_server(bundle) == Server("server.local", 8443, files["ca.crt"].decode())
    found = bundle_finding(bundle, os.getuid())
    assert found.state == "ok"
    assert found.fact.endswith("is whole, its key for its owner alone (0600)")


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o604])
def test_an_archive_that_others_can_read_is_a_warning(tmp_path, files, mode):
    path = archive(tmp_path / "pi-01", files, mode)
    found = bundle_finding(read_bundle(path), os.getuid())
    assert found.state == "warning"
    assert found.fact == f"{path} holds the device's key, and has permissions {mode:04o}"
    assert found.remedy.startswith(f"chmod 600 {path};")


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o604])
def test_a_folder_whose_key_others_can_use_is_the_problem_that_the_client_has(
    tmp_path, files, mode
):
    path = folder(tmp_path / "pi-01", files, mode)
    found = bundle_finding(read_bundle(path), os.getuid())
    assert found.state == "problem"
    with pytest.raises(ConfigError) as refused:
        read_as_client(path)
    assert f"{found.fact}; {found.remedy}" == str(refused.value)
    assert found.fact.startswith(f"{path}/device.key is this device's private key, and its mode")
    assert found.remedy.startswith(f"chmod 600 {path}/device.key ")


def test_somebody_elses_bundle_is_for_them_to_look_at(tmp_path, files):
    found = bundle_finding(read_bundle(archive(tmp_path / "b", files)), os.getuid() + 1)
    assert found.state == "unknown"
    assert found.remedy == "run this as the user that the client runs as"


BEGIN, END = b"-----BEGIN OPENSSH PRIVATE KEY-----\n", b"-----END OPENSSH PRIVATE KEY-----\n"


@pytest.mark.parametrize(
    "key",
    [
        b"",
        b"ssh-ecdsa AAAA",
        BEGIN,
        BEGIN + END,
        BEGIN + b"no base64!\n" + END,
        BEGIN + b"AAAA\n" + END,  # base64 of something else
        BEGIN.replace(b"OPENSSH ", b"") + b"AAAA\n" + END.replace(b"OPENSSH ", b""),
    ],
)
def test_a_bundle_without_a_key_is_a_problem(tmp_path, files, key):
    path = archive(tmp_path / "b.tar.gz", files | {"device.key": key})
    found = bundle_finding(read_bundle(path), os.getuid())
    assert (found.state, found.fact) == ("problem", f"device.key of {path} is no key")
    assert found.remedy == "copy the bundle from the server again"
    refused_by_the_client(path, tmp_path)


def test_a_key_that_was_cut_is_a_problem(tmp_path, files):
    path = archive(tmp_path / "b.tar.gz", files | {"device.key": files["device.key"][:-40]})
    assert bundle_finding(read_bundle(path), os.getuid()).state == "problem"
    refused_by_the_client(path, tmp_path)


def refused_by_the_client(path, tmp_path):
    with pytest.raises(ConfigError, match="is no bundle"):
        install_bundle(path, tmp_path / "state")


@pytest.mark.parametrize(
    "name", ["../authorized_keys", "../../device.key", "x/../device.key", "/device.key", "./x"]
)
def test_an_archive_with_anything_else_in_it_is_refused_as_the_client_does(tmp_path, files, name):
    path = archive(tmp_path / "b.tar.gz", {name: b"x"} | files, folder="")
    with pytest.raises(ConfigError, match=r"cannot read bundle .* in it is none of bundle\.toml, "):
        read_bundle(path)
    refused_by_the_client(path, tmp_path)


def test_a_file_that_is_twice_in_an_archive_is_refused(tmp_path, files):
    twice = {"pi-02/device.key": b"x", **{f"pi-01/{name}": files[name] for name in files}}
    with pytest.raises(ConfigError, match=r"device\.key is in it twice"):
        read_bundle(archive(tmp_path / "b.tar.gz", twice, folder=""))


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_never_ends_is_not_read(tmp_path, files, make):
    path = folder(tmp_path / "pi-01", files)
    (path / "ca.crt").unlink()
    make(path / "ca.crt")
    with pytest.raises(ConfigError, match=r"ca\.crt is no regular file; copy the bundle"):
        read_bundle(path)
    with pytest.raises(ConfigError, match="zero is no regular file"):
        read_bundle(Path("/dev/zero"))


@pytest.mark.parametrize("make", [archive, folder])
def test_a_missing_file_is_named(tmp_path, files, make):
    del files["ca.crt"]
    path = tmp_path / "pi-01"
    with pytest.raises(ConfigError, match=r"lacks (ca\.crt|.*No such file)"):
        read_bundle(make(path, files))


def test_what_is_no_bundle_is_said_to_be_none(tmp_path, files):
    path = archive(tmp_path / "b.tar.gz", files)
    whole = path.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], gzip.compress(b"no archive" * 99)):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=f"bundle {path}.*; copy the bundle from the server"):
            read_bundle(path)
    path.unlink()
    with pytest.raises(ConfigError, match="No such file or directory; copy the bundle"):
        read_bundle(path)


def test_an_archive_that_inflates_without_end_is_not_read_to_it(tmp_path):
    path = tmp_path / "bomb.tar.gz"
    path.write_bytes(gzip.compress(bytes(64 * 2**20)))
    with pytest.raises(ConfigError, match="it is larger than 1048576 bytes once unpacked"):
        read_bundle(path)


@pytest.mark.parametrize(
    "settings", [b"server = ", b"name = 'pi-01'", b"server = 'a b'", b"\xff\xfe"]
)
def test_settings_that_cannot_be_read_are_named(tmp_path, files, settings):
    path = archive(tmp_path / "b", files | {"bundle.toml": settings})
    with pytest.raises(ConfigError, match=r"bundle\.toml or ca\.crt is not|server 'a b' is not"):
        bundle_server(read_bundle(path))


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("server.local:8443", "server.local", 8443),
        ("server.local", "server.local", 8000),
        ("192.168.1.10:1", "192.168.1.10", 1),
        ("[2001:db8::1]:443", "2001:db8::1", 443),
        ("[::1]", "::1", 8000),
    ],
)
def test_a_server_is_read_as_people_write_it(text, host, port):
    server = parse_server(text)
    assert (server.host, server.port) == (host, port)
    assert parse_server(str(server)) == server


@pytest.mark.parametrize(
    "text", ["", ":8000", "a:0", "a:65536", "a:b", "a:1:2", "2001:db8::1", "https://a:1", "a b:1"]
)
def test_what_is_no_server_is_refused(text):
    with pytest.raises(ConfigError, match=r"is not HOST:PORT; give for example server\.local:8000"):
        parse_server(text)


def test_an_authority_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"ca\.crt: No such file or directory; copy ca\.crt"):
        read_authority(tmp_path / "ca.crt")
    (tmp_path / "ca.crt").write_bytes(b"\x30\x82\xff")
    with pytest.raises(ConfigError, match=r"ca\.crt: it is no PEM text; copy ca\.crt"):
        read_authority(tmp_path / "ca.crt")
