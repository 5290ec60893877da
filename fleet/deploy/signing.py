"""Signatures of apps: who vouches for the code that devices run.

Flower's SuperNode asks for an Ed25519 signature of the time, 8 bytes, and the SHA-256 of
the bundle. A key goes by the fingerprint that `ssh-keygen -l` shows, so nobody has to
give it the same name in two places.
"""

import base64
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from fleet.deploy import private_files, ssh_agent
from fleet.errors import ConfigError

_MAKE_ONE = "make one with: ssh-keygen -t ed25519 -f ops"
_MOST_BYTES = 64 * 1024  # of a key's file


@dataclass(frozen=True)
class Signer:
    """Who signs.

    Attributes:
        public_key: that its signatures are verified with.
        sign: message → 64 bytes.
    """

    public_key: Ed25519PublicKey
    sign: Callable[[bytes], bytes]


def open_signer(path: Path, ask: Callable[[], str | None]) -> Signer:
    """A signer from a key in OpenSSH's format: a private one, or the public one of an agent's.

    Args:
        path: of the key.
        ask: for the passphrase of a key that has one; None: there is nobody to ask.

    Raises:
        ConfigError: if it is no Ed25519 key, or cannot be opened.
    """
    content = private_files.read(path, "key to sign with", _MAKE_ONE, _MOST_BYTES)
    if content.startswith((b"ssh-", b"ecdsa-", b"sk-")):
        public_key = read_public_key(content, str(path))
        return Signer(public_key, partial(ssh_agent.sign, public_key_blob(public_key)))
    key = _open_private_key(path, content, ask)
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path} is no Ed25519 key, and Flower takes no other; {_MAKE_ONE}")
    return Signer(key.public_key(), key.sign)


def sign_app(app: bytes, signer: Signer, clock: Callable[[], float] = time.time) -> dict[str, str]:
    """A bundle's signature as Flower hands it on: id of the key → JSON.

    Args:
        app: Flower's bundle.
        signer: of it.
        clock: seconds since 1970, of which Flower takes whole ones.

    Raises:
        ConfigError: if an agent does not sign.
    """
    from flwr.supercore.primitives.asymmetric_ed25519 import create_message_to_sign

    signed_at = int(clock())
    signature = signer.sign(create_message_to_sign(hashlib.sha256(app).digest(), signed_at))
    text = base64.urlsafe_b64encode(signature).rstrip(b"=").decode()
    return {key_id(signer.public_key): json.dumps({"signature": text, "signed_at": signed_at})}


def read_public_key(text: bytes, where: str) -> Ed25519PublicKey:
    """A public key of OpenSSH's, `ssh-ed25519 AAAA… comment`.

    Args:
        text: of it.
        where: it stands, for errors.

    Raises:
        ConfigError: if it is none, or of another kind.
    """
    try:
        key = load_ssh_public_key(text.strip())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{where} is no public key of OpenSSH's ({error}); take the line of a .pub file, "
            f"ssh-ed25519 AAAA…"
        ) from error
    kind = text.split()[0].decode()
    if kind != "ssh-ed25519" or not isinstance(key, Ed25519PublicKey):  # a token's signs otherwise
        raise ConfigError(
            f"{where} is a key of kind {kind}, and Flower takes ssh-ed25519 alone; {_MAKE_ONE}"
        )
    return key


def key_id(public_key: Ed25519PublicKey) -> str:
    """`SHA256:…`, as `ssh-keygen -l` shows it."""
    digest = hashlib.sha256(public_key_blob(public_key)).digest()
    return f"SHA256:{base64.b64encode(digest).rstrip(b'=').decode()}"


def public_key_blob(public_key: Ed25519PublicKey) -> bytes:
    """A public key as SSH writes it; RFC 8709."""
    _, text = public_key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split()
    return base64.b64decode(text)


def _open_private_key(path: Path, content: bytes, ask: Callable[[], str | None]) -> object:
    try:
        return load_ssh_private_key(content, None)
    except TypeError:  # that is how it says that a passphrase is wanted
        pass
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{path} is no private key of OpenSSH's ({error}); {_MAKE_ONE}"
        ) from error
    agent = f"or let an agent sign: ssh-add {path}, then --sign {path}.pub"
    passphrase = ask()
    if passphrase is None:
        raise ConfigError(
            f"{path} has a passphrase, and there is no terminal to ask for it; use one, {agent}"
        )
    try:
        return load_ssh_private_key(content, passphrase.encode())
    except UnsupportedAlgorithm as error:
        raise ConfigError(
            f"{path} has a passphrase, which takes a further package ({error}): pip install "
            f"bcrypt, {agent}"
        ) from error
    except ValueError as error:
        raise ConfigError(f"the passphrase does not open {path} ({error}); try again") from error
