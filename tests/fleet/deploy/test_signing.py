import base64
import os
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import ssh

from fleet.deploy.signing import Signer, key_id, open_signer, read_public_key, sign_app
from fleet.errors import ConfigError
from tests.ssh_keys import fingerprint, make_key, public, verified

APP = b"an app"


def nobody():
    """No terminal."""


@pytest.fixture
def key(tmp_path):
    return make_key(tmp_path / "ops")


def test_flower_verifies_what_is_signed_and_nothing_else(key, tmp_path):
    signatures = sign_app(APP, open_signer(key, nobody))
    trusted = {fingerprint(key): public(key)}
    assert verified(APP, signatures, trusted)
    assert not verified(APP + b".", signatures, trusted)
    assert not verified(APP, {}, trusted)
    other = make_key(tmp_path / "other")
    assert not verified(APP, signatures, {fingerprint(other): public(other)})
    assert not verified(APP, signatures, {fingerprint(key): public(other)})


def test_a_signature_holds_for_its_time_alone(key):
    signer = open_signer(key, nobody)
    early, late = (sign_app(APP, signer, clock=lambda t=t: t) for t in (1.9, 2.0))
    (name,) = early
    trusted = {name: public(key)}
    assert verified(APP, early, trusted) and verified(APP, late, trusted)
    assert '"signed_at": 1}' in early[name]
    assert not verified(APP, {name: early[name].replace(": 1}", ": 2}")}, trusted)


def test_an_agent_signs_with_a_key_whose_public_one_alone_is_here(key, tmp_path, monkeypatch):
    started = subprocess.run(["ssh-agent", "-s"], capture_output=True, text=True, check=True)
    variables = dict(
        line.split(";")[0].split("=") for line in started.stdout.splitlines() if "=" in line
    )
    try:
        monkeypatch.setenv("SSH_AUTH_SOCK", variables["SSH_AUTH_SOCK"])
        signer = open_signer(Path(f"{key}.pub"), nobody)
        with pytest.raises(ConfigError, match=r"agent does not have this key.*ssh-add.*ssh -A"):
            sign_app(APP, signer)
        subprocess.run(["ssh-add", "-q", key], check=True)
        key.unlink()
        assert verified(APP, sign_app(APP, signer), {key_id(signer.public_key): public(key)})
    finally:
        os.kill(int(variables["SSH_AGENT_PID"]), signal.SIGTERM)


@pytest.mark.parametrize("answer", [b"", b"\0\0", b"\xff\xff\xff\xff", None])
def test_an_agent_that_does_not_answer_as_one_is_named(key, tmp_path, monkeypatch, answer):
    address = tmp_path / "agent"
    monkeypatch.setenv("SSH_AUTH_SOCK", str(address))
    with socket.socket(socket.AF_UNIX) as agent:
        if answer is not None:
            agent.bind(str(address))
            agent.listen()
            threading.Thread(target=lambda: answer_once(agent, answer), daemon=True).start()
        with pytest.raises(ConfigError, match=r"SSH agent at .*agent does not answer .*ssh-add"):
            sign_app(APP, open_signer(Path(f"{key}.pub"), nobody))


def answer_once(agent, answer):
    connection, _ = agent.accept()
    with connection:
        connection.recv(4096)
        connection.sendall(answer)


def test_without_an_agent_a_public_key_signs_nothing(key, monkeypatch):
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    with pytest.raises(ConfigError, match=r"no SSH agent is there to sign .*ssh -A"):
        sign_app(APP, open_signer(Path(f"{key}.pub"), nobody))


def test_a_key_goes_by_the_fingerprint_that_openssh_shows(key):
    assert key_id(open_signer(key, nobody).public_key) == fingerprint(key)
    assert key_id(read_public_key(public(key).encode(), "keys.yaml")) == fingerprint(key)


def test_a_passphrase_is_asked_for(tmp_path):
    pytest.importorskip("bcrypt")
    locked = make_key(tmp_path / "locked", passphrase="secret")
    signatures = sign_app(APP, open_signer(locked, lambda: "secret"))
    assert verified(APP, signatures, {fingerprint(locked): public(locked)})
    with pytest.raises(ConfigError, match=r"passphrase does not open .*locked .*try again"):
        open_signer(locked, lambda: "wrong")


def test_a_passphrase_that_nobody_can_be_asked_for_is_an_error(tmp_path):
    locked = make_key(tmp_path / "locked", passphrase="secret")
    with pytest.raises(ConfigError, match=r"no terminal to ask.*ssh-add .*--sign .*locked\.pub"):
        open_signer(locked, nobody)


def test_without_bcrypt_a_passphrase_does_not_help(tmp_path, monkeypatch):
    def lacking(*arguments):
        raise UnsupportedAlgorithm("Need bcrypt module")

    monkeypatch.setattr(ssh, "_bcrypt_kdf", lacking)
    locked = make_key(tmp_path / "locked", passphrase="secret")
    with pytest.raises(ConfigError, match=r"a further package .*: pip install bcrypt, or let an"):
        open_signer(locked, lambda: "secret")


def test_what_is_no_key_to_sign_with_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no key to sign with, .*ssh-keygen -t ed25519 -f ops"):
        open_signer(tmp_path / "none", nobody)
    for kind in ("ecdsa", "rsa"):
        with pytest.raises(ConfigError, match="no Ed25519 key, and Flower takes no other"):
            open_signer(make_key(tmp_path / kind, kind), nobody)
        with pytest.raises(ConfigError, match=f"kind .*{kind}.*, and Flower takes ssh-ed25519"):
            open_signer(tmp_path / f"{kind}.pub", nobody)
    blob = b"\0\0\0\x1ask-ssh-ed25519@openssh.com\0\0\0 " + bytes(32) + b"\0\0\0\4ssh:"
    token = f"sk-ssh-ed25519@openssh.com {base64.b64encode(blob).decode()}"
    (tmp_path / "token.pub").write_text(token)
    with pytest.raises(ConfigError, match=r"kind sk-ssh-ed25519@openssh\.com, and Flower takes"):
        open_signer(tmp_path / "token.pub", nobody)
    (tmp_path / "text").write_text("a text")
    with pytest.raises(ConfigError, match=r"no private key of OpenSSH's .*ssh-keygen -t ed25519"):
        open_signer(tmp_path / "text", nobody)
    (tmp_path / "cut.pub").write_text("ssh-ed25519 AAAA")
    with pytest.raises(ConfigError, match=r"cut\.pub is no public key of OpenSSH's"):
        open_signer(tmp_path / "cut.pub", nobody)


def test_signatures_are_as_flowers_own_review_makes_them():
    """`flwr app review` sends time and signature to Flower's Hub, which hands them on."""
    from flwr.cli.app_cmd.review import _sign_fab

    key = Ed25519PrivateKey.generate()
    signature, signed_at = _sign_fab(APP, key)
    text = base64.urlsafe_b64encode(signature).rstrip(b"=").decode()
    ours = sign_app(APP, Signer(key.public_key(), key.sign), clock=lambda: signed_at)
    assert ours == {
        key_id(key.public_key()): f'{{"signature": "{text}", "signed_at": {signed_at}}}'
    }
