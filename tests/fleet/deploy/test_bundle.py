import gzip
import io
import os
import tarfile

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fleet.deploy.addresses import Address
from fleet.deploy.bundle import (
    FILES,
    bundle_files,
    bundle_to_use,
    install_bundle,
    installed_bundle,
    pack,
    read_bundle,
)
from fleet.deploy.certificates import make_authority, make_device_key
from fleet.errors import ConfigError

SERVER = Address("server.local", 8443)


def files_of(name="pi-01"):
    return bundle_files(name, SERVER, make_authority().certificate, make_device_key()[0])


def archive(members):
    """A `.tar.gz` of (TarInfo or name, content)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for member, content in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            if info.isreg():
                info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state"


def written(tmp_path, content):
    path = tmp_path / "pi-01.tar.gz"
    path.write_bytes(content)
    return path


def test_a_bundle_arrives_as_it_was_packed(tmp_path, state):
    files = files_of()
    bundle = install_bundle(written(tmp_path, pack("pi-01", files)), state)
    assert (bundle.name, bundle.server) == ("pi-01", SERVER)
    assert {name: (bundle.folder / name).read_bytes() for name in FILES} == files
    assert bundle.key_path.read_bytes() == files["device.key"]
    assert bundle.authority_path.read_bytes() == files["ca.crt"]


def test_what_it_writes_is_for_its_owner_alone(tmp_path, state):
    bundle = install_bundle(written(tmp_path, pack("pi-01", files_of())), state)
    assert all((bundle.folder / name).stat().st_mode & 0o777 == 0o600 for name in FILES)
    assert bundle.folder.stat().st_mode & 0o777 == 0o700


def test_once_installed_the_archive_is_needed_no_more(tmp_path, state):
    path = written(tmp_path, pack("pi-01", files_of()))
    first = install_bundle(path, state)
    assert install_bundle(path, state).folder.samefile(first.folder)
    path.unlink()
    assert installed_bundle(state).key_path.read_bytes() == first.key_path.read_bytes()


def test_once_its_copy_is_removed_the_installed_bundle_is_used(tmp_path, state, caplog):
    caplog.set_level("INFO")
    path = written(tmp_path, pack("pi-01", files_of()))
    first = bundle_to_use(path, state)
    path.unlink()
    again = bundle_to_use(path, state)
    assert again == bundle_to_use(None, state) and again.folder.samefile(first.folder)
    (line,) = caplog.messages
    assert line.startswith(f"there is no bundle {path} any more; using the one of pi-01 in the")


def test_a_bad_bundle_is_told_though_one_is_installed(tmp_path, state):
    bundle_to_use(written(tmp_path, pack("pi-01", files_of())), state)
    with pytest.raises(ConfigError, match="is no bundle"):
        bundle_to_use(written(tmp_path, b"x"), state)


def test_a_new_bundle_takes_the_place_of_the_old_one(tmp_path, state):
    install_bundle(written(tmp_path, pack("pi-01", files_of())), state)
    newer = files_of()
    install_bundle(written(tmp_path, pack("pi-01", newer)), state)
    assert installed_bundle(state).key_path.read_bytes() == newer["device.key"]


def test_a_folder_is_a_bundle_too(tmp_path, state):
    folder = tmp_path / "pi-01"
    folder.mkdir()
    for name, content in files_of().items():
        (folder / name).write_bytes(content)
    (folder / "device.key").chmod(0o600)
    assert install_bundle(folder, state).name == read_bundle(folder).name == "pi-01"


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o602])
def test_the_key_of_a_folder_that_others_can_use_is_refused(tmp_path, state, mode):
    bundle = install_bundle(written(tmp_path, pack("pi-01", files_of())), state)
    bundle.key_path.chmod(mode)
    for open_one in (lambda: install_bundle(bundle.folder, tmp_path / "s"), bundle_in_use(state)):
        with pytest.raises(ConfigError) as told:
            open_one()
        key = state / "bundles" / bundle.folder.name / "device.key"
        assert f"{key} is this device's private key, and its mode is {mode:04o}" in str(told.value)
        assert f"; chmod 600 {key} " in str(told.value)
    assert not (tmp_path / "s").exists()
    bundle.key_path.chmod(0o600)
    assert installed_bundle(state).name == "pi-01"


def bundle_in_use(state):
    return lambda: bundle_to_use(None, state)


def test_without_a_bundle_it_says_how_to_get_one(state):
    with pytest.raises(
        ConfigError, match=r"no bundle was ever given to this device.*--bundle NAME"
    ):
        installed_bundle(state)


def special(name, kind, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


HOSTILE = {
    "a path out of the folder": [("../device.key", b"x")],
    "a deeper path out of it": [("pi-01/../../device.key", b"x")],
    "an absolute path": [("/device.key", b"x")],
    "an absolute folder": [("/etc/device.key", b"x")],
    "a file of another name": [("pi-01/authorized_keys", b"x")],
    "a symbolic link": [(special("pi-01/device.key", tarfile.SYMTYPE, "/etc/passwd"), b"")],
    "a hard link": [(special("pi-01/device.key", tarfile.LNKTYPE, "/etc/passwd"), b"")],
    "a device file": [(special("pi-01/device.key", tarfile.CHRTYPE), b"")],
    "a pipe": [(special("pi-01/device.key", tarfile.FIFOTYPE), b"")],
    "a file twice": [("pi-01/device.key", b"x"), ("pi-01/device.key", b"y")],
    "nothing": [],
}


@pytest.mark.parametrize("what", HOSTILE)
def test_an_archive_with_anything_else_in_it_is_refused_and_writes_nothing(tmp_path, state, what):
    outside = tmp_path / "device.key"
    path = written(tmp_path, archive(HOSTILE[what]))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=r"is no bundle: .*copy the bundle from the server again"):
        install_bundle(path, state)
    assert sorted(tmp_path.rglob("*")) == before and not outside.exists()


def test_a_bomb_is_not_unpacked(tmp_path, state):
    bomb = gzip.compress(bytes(50 * 2**20))
    assert len(bomb) < 2**20
    with pytest.raises(ConfigError, match="larger than 1048576 bytes once unpacked"):
        install_bundle(written(tmp_path, bomb), state)


def test_a_file_that_is_too_large_is_not_read_as_a_bundle(tmp_path, state):
    with pytest.raises(ConfigError, match="has 1048577 bytes, and is no bundle"):
        install_bundle(written(tmp_path, bytes(2**20 + 1)), state)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("what", ["/dev/zero", "pipe"])
def test_what_never_ends_is_not_read_as_a_bundle(tmp_path, state, what, inside):
    os.mkfifo(tmp_path / "pipe")
    source = tmp_path / what
    if inside:
        (tmp_path / "pi-01").mkdir()
        (tmp_path / "pi-01" / "bundle.toml").symlink_to(source)
        source = tmp_path / "pi-01"
    with pytest.raises(ConfigError, match="is no regular file, and no bundle; copy the bundle"):
        install_bundle(source, state)


@pytest.mark.parametrize("cut", range(0, 1500, 100))
def test_a_bundle_that_was_copied_in_part_is_refused(tmp_path, state, cut):
    whole = pack("pi-01", files_of())
    with pytest.raises(ConfigError, match="is no bundle"):
        install_bundle(written(tmp_path, whole[: min(cut, len(whole) - 20)]), state)
    assert not (state / "device").exists()


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("bundle.toml", b"version = 2\n", "it has version 2, this program reads 1"),
        ("bundle.toml", b"version = 1\n", "is no bundle: 'name'"),
        ("bundle.toml", b'version = 1\nname = "../x"\nserver = "a:1"', "cannot be used"),
        ("bundle.toml", b'version = 1\nname = "x"\nserver = "a b"', "neither a DNS name"),
        ("bundle.toml", b"\xff", "is no bundle"),
        ("ca.crt", b"x", "is no bundle: ca.crt: it holds no certificate that can be read"),
        ("device.key", b"x", "device.key: it holds no private key that can be read"),
    ],
)
def test_a_file_that_holds_something_else_is_named(tmp_path, state, file, content, complaint):
    files = files_of() | {file: content}
    with pytest.raises(ConfigError, match=complaint):
        install_bundle(written(tmp_path, pack("pi-01", files)), state)


def pem(key, form=serialization.PrivateFormat.OpenSSH):
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def garbled(key):
    lines = key.splitlines(keepends=True)
    lines[2] = lines[2].swapcase()  # still base64, but its point is not on the curve
    return b"".join(lines)


BAD_KEYS = {
    "no base64": (
        lambda: b"-----BEGIN OPENSSH PRIVATE KEY-----\n!\n-----END OPENSSH PRIVATE KEY-----\n",
        "no private key that can be read",
    ),
    "cut": (lambda: make_device_key()[0][:200], "no private key that can be read"),
    "garbled": (lambda: garbled(make_device_key()[0]), "no private key that can be read"),
    "of another format": (
        lambda: pem(ec.generate_private_key(ec.SECP384R1()), serialization.PrivateFormat.PKCS8),
        "no private key that can be read",
    ),
    "of another curve": (
        lambda: pem(ec.generate_private_key(ec.SECP256R1())),
        "a private key of secp256r1, not of secp384r1",
    ),
    "of another kind": (
        lambda: pem(ed25519.Ed25519PrivateKey.generate()),
        "a private key of Ed25519PrivateKey, not of secp384r1",
    ),
}


@pytest.mark.parametrize("what", BAD_KEYS)
def test_a_bundle_with_a_bad_key_leaves_the_good_one_in_use(tmp_path, state, what):
    good = files_of()
    install_bundle(written(tmp_path, pack("pi-01", good)), state)
    make_key, complaint = BAD_KEYS[what]
    bad = written(tmp_path, pack("pi-01", good | {"device.key": make_key()}))
    with pytest.raises(ConfigError, match=f"is no bundle: device.key: .*{complaint}"):
        install_bundle(bad, state)
    in_use = installed_bundle(state)
    assert {name: (in_use.folder / name).read_bytes() for name in FILES} == good


def test_a_bundle_with_a_cut_certificate_leaves_the_good_one_in_use(tmp_path, state):
    good = files_of()
    install_bundle(written(tmp_path, pack("pi-01", good)), state)
    bad = written(tmp_path, pack("pi-01", good | {"ca.crt": good["ca.crt"][:300]}))
    with pytest.raises(ConfigError, match=r"is no bundle: ca\.crt: it holds no certificate"):
        install_bundle(bad, state)
    assert installed_bundle(state).authority_path.read_bytes() == good["ca.crt"]


def test_a_bundle_that_is_not_there_is_named(tmp_path, state):
    with pytest.raises(ConfigError, match=r"there is no bundle, .*pi-01.tar.gz"):
        bundle_to_use(tmp_path / "pi-01.tar.gz", state)
