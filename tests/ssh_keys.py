"""Keys as a user makes them, and what Flower's SuperNode says of a signature."""

import hashlib
import subprocess
from collections.abc import Mapping
from pathlib import Path

from flwr.supercore.fab import Fab
from flwr.supernode.start_client_internal import _verify_fab


def make_key(path: Path, kind: str = "ed25519", passphrase: str = "") -> Path:
    """A new private key, its public one beside it."""
    command = ["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", "ops at home", "-f", path]
    subprocess.run(command, check=True)
    return path


def public(path: Path) -> str:
    """The public key beside a private one, without its comment."""
    return " ".join(Path(f"{path}.pub").read_text().split()[:2])


def fingerprint(path: Path) -> str:
    """Of a key, as OpenSSH shows it."""
    shown = subprocess.run(["ssh-keygen", "-l", "-f", path], capture_output=True, check=True)
    return shown.stdout.split()[1].decode()


def verified(app: bytes, signatures: Mapping[str, str], trusted: dict[str, str]) -> bool:
    """Whether Flower runs an app on a device that trusts keys, id → public key."""
    verifications = {"valid_license": "Valid", **signatures}
    return _verify_fab(Fab(hashlib.sha256(app).hexdigest(), app, verifications), trusted)
