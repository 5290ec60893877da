"""Signatures by an SSH agent, which holds keys that never come to this machine.

Source: Miller, SSH Agent Protocol, draft-ietf-sshm-ssh-agent, section 3.6; RFC 8709.
"""

import os
import socket
import struct

from fleet.errors import ConfigError

_SIGN_REQUEST, _SIGN_RESPONSE = 13, 14
_SECONDS = 60.0  # it may ask somebody first
_MOST_BYTES = 256 * 1024  # as OpenSSH's own


def sign(public_key: bytes, message: bytes) -> bytes:
    """The agent's signature of a message; an Ed25519 key signs it as it is.

    Args:
        public_key: whose private one is to sign, as SSH writes it.
        message: any bytes.

    Returns:
        64 bytes.

    Raises:
        ConfigError: if there is no agent, or it does not sign.
    """
    way_out = "add the key with ssh-add, and come from another machine with ssh -A"
    address = os.environ.get("SSH_AUTH_SOCK")
    if not address:
        raise ConfigError(f"no SSH agent is there to sign (SSH_AUTH_SOCK is not set); {way_out}")
    try:
        with socket.socket(socket.AF_UNIX) as agent:
            agent.settimeout(_SECONDS)
            agent.connect(address)
            request = bytes([_SIGN_REQUEST]) + _string(public_key) + _string(message) + bytes(4)
            agent.sendall(_string(request))
            answer = _read_string(agent)
    except (OSError, struct.error) as error:
        raise ConfigError(f"the SSH agent at {address} does not answer ({error}); {way_out}") from (
            error
        )
    if answer[:1] != bytes([_SIGN_RESPONSE]):
        raise ConfigError(f"the SSH agent does not have this key, or does not sign; {way_out}")
    return answer[-64:]  # after the lengths and the kind, which are the key's


def _string(content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + content


def _read_string(agent: socket.socket) -> bytes:
    with agent.makefile("rb") as stream:
        (nbytes,) = struct.unpack(">I", stream.read(4))
        if nbytes > _MOST_BYTES:
            raise OSError(f"an answer of {nbytes} bytes")
        return stream.read(nbytes)
