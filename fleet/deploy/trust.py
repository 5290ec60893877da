"""Whose apps a device runs, and how it says that it does not run one.

Flower's SuperNode does the refusing. It looks keys up by an id that a signature names;
here that is the key's fingerprint, whatever its owner is called in the device's file.
It says neither which device refuses nor why, and an app that was kept from before comes
with the signatures that it had then: both are mended here.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fleet.deploy import private_files
from fleet.deploy.signing import key_id, read_public_key
from fleet.errors import ConfigError

if TYPE_CHECKING:
    from fleet.deploy.fleet_client import Apps

REFUSES = "runs only apps that are signed by"

_MOST_BYTES = 2**20

_log = logging.getLogger("flwr")


def read_trusted(path: Path) -> dict[str, str]:
    """Name → public key, of a file of trusted keys.

    Raises:
        ConfigError: if there is none, it names nobody, or a key is not OpenSSH's Ed25519.
    """
    import yaml

    way_out = "write a line NAME: ssh-ed25519 AAAA… for each key"
    content = private_files.read(path, "file of trusted keys", way_out, _MOST_BYTES)
    try:
        keys = yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise ConfigError(f"--trusted-entities {path} is not YAML ({error}); {way_out}") from error
    if not isinstance(keys, dict) or not keys:
        raise ConfigError(f"--trusted-entities {path} names no keys; {way_out}")
    names = Counter(name.value for name, _ in yaml.compose(content, yaml.SafeLoader).value)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ConfigError(
            f"--trusted-entities {path} names {twice[0]} {names[twice[0]]} times, and one key "
            f"would count; give each key a name of its own"
        )
    for name, key in keys.items():
        if not isinstance(name, str) or not isinstance(key, str):
            raise ConfigError(
                f"--trusted-entities {path}: {name!r}: {key!r} is not a name and a key as text; "
                f"{way_out}"
            )
        read_public_key(key.encode(), f"--trusted-entities {path}: {name}")
    return keys


def refuse_by_name(loop: ModuleType, apps: "Apps | None") -> None:
    """Let a SuperNode that refuses an app say which device it is of, and why.

    Args:
        loop: `flwr.supernode.start_client_internal`, which does the refusing.
        apps: that the device keeps; one whose signatures do not do is fetched again.
    """
    from flwr.app import Error

    pull, verify, code = (
        loop._pull_and_store_message,
        loop._verify_fab,
        loop.FAB_VERIFICATION_ERROR.code,
    )

    def verify_any(fab: Any, trusted: Mapping[str, str]) -> bool:
        try:
            return verify(fab, trusted)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            return False  # what is no signature: Flower's own loop would end of it

    def pull_trusted(
        *, get_fab: Any, node_config: Any, trusted_entities: dict[str, str] | None, **others: Any
    ) -> Any:
        trusted = None if trusted_entities is None else _by_id(trusted_entities)

        def get_verified(fab_hash: str, run_id: int) -> Any:
            kept = apps.find(fab_hash) if apps and trusted else None
            if kept is not None and not verify_any(kept.fab, trusted):
                apps.forget(fab_hash)
            fab = get_fab(fab_hash, run_id)
            digest = hashlib.sha256(fab.content).hexdigest()
            if trusted and verify_any(fab, trusted):
                _log.info("the app of run %d, SHA-256 %s, has a trusted signature", run_id, digest)
            elif trusted:
                reason = f"{_reason(trusted_entities, fab.verifications)}; its SHA-256 is {digest}"
                _log.error("this device %s", reason)
                loop.FAB_VERIFICATION_ERROR = Error(code, f"client {node_config['name']} {reason}")
            return fab

        return pull(
            get_fab=get_verified, node_config=node_config, trusted_entities=trusted, **others
        )

    loop._verify_fab = verify_any
    loop._pull_and_store_message = pull_trusted


def _by_id(trusted: Mapping[str, str]) -> dict[str, str]:
    keys = {key_id(read_public_key(key.encode(), name)): key for name, key in trusted.items()}
    # Of a file that was emptied since: Flower takes nobody for everybody.
    return keys or {"nobody": ""}


def _reason(trusted: Mapping[str, str], verifications: Mapping[str, str]) -> str:
    signers = ", ".join(sorted(set(verifications) - {"valid_license"})) or "nobody"
    names = " or ".join(map(str, trusted)) or "nobody"
    return (
        f"{REFUSES} {names}, and this one is signed by {signers}; start the run with: fleet run "
        f"--sign KEY, or add the signer's public key to the device's --trusted-entities"
    )
