import hashlib
import importlib.util
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.common.constant import ErrorCode
from flwr.common.serde import fab_from_proto, fab_to_proto
from flwr.proto.fab_pb2 import GetFabResponse
from flwr.supercore.fab import Fab
from flwr.supernode.cli.flower_supernode import (
    _try_obtain_trusted_entities,
    _validate_public_keys_ed25519,
)

from fleet.deploy.fleet_client import Apps
from fleet.deploy.signing import Signer, key_id, sign_app
from fleet.deploy.trust import read_trusted, refuse_by_name
from fleet.errors import ConfigError

APP = b"an app"
METADATA = {"run_id": 7, "group_id": "1", "message_type": "query", "message_id": "m"}
MESSAGE = SimpleNamespace(metadata=SimpleNamespace(**METADATA))
# The same in every process: tests are named after what they are given.
OPS, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2))


def public(key):
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def signed(key, app=APP):
    return sign_app(app, Signer(key.public_key(), key.sign))


def fab(verifications, content=APP):
    everything = {"valid_license": "Valid", **verifications}
    return Fab(hashlib.sha256(content).hexdigest(), content, everything)


class Accepted(Exception):
    """The app goes on to be run."""


class Device:
    """Flower's own main loop, up to where it has decided about an app.

    Args:
        trusted: name → public key.
        apps: folder of those that it keeps.
    """

    def __init__(self, trusted, apps=None):
        spec = importlib.util.find_spec("flwr.supernode.start_client_internal")
        self._loop = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self._loop)  # a copy of Flower's, to be changed
        self._loop.get_fused_config_from_fab = self._accept
        self._loop.Message = lambda error, reply_to: error
        self._loop._insert_message = lambda reply, state, store: self._replies.append(reply)
        self._replies = []
        self._trusted, self._apps = trusted, Apps(apps) if apps else None
        self.fetched = 0
        refuse_by_name(self._loop, self._apps)

    def refusal(self, sent):
        """The reason that the server is given for an app that it sends; None: it is run."""
        try:
            self._loop._pull_and_store_message(
                state=SimpleNamespace(get_run=lambda run_id: None),
                object_store=None,
                node_config={"name": "pi-02"},
                receive=lambda: (MESSAGE, None),
                get_run=lambda run_id: SimpleNamespace(fab_hash=sent.hash_str),
                get_fab=lambda fab_hash, run_id: self._get_fab(sent),
                pull_object=None,
                confirm_message_received=None,
                trusted_entities=self._trusted,
            )
        except Accepted:
            return None
        reply = self._replies.pop()
        assert reply.code == ErrorCode.INVALID_FAB
        return reply.reason

    def _get_fab(self, sent):
        """As the connection does, which keeps apps."""
        kept = self._apps and self._apps.find(sent.hash_str)
        if kept:
            return fab_from_proto(kept.fab)
        self.fetched += 1
        if self._apps:
            self._apps.keep(GetFabResponse(fab=fab_to_proto(sent)))
        return sent

    def _accept(self, *args):
        raise Accepted


def test_an_app_is_run_that_a_trusted_key_has_signed_whatever_its_name():
    for name in ("ops", "Anne of the office", key_id(OPS.public_key())):
        device = Device({"another": public(OTHER), name: public(OPS)})
        assert device.refusal(fab(signed(OPS))) is None
        assert device.refusal(fab(signed(OPS) | signed(Ed25519PrivateKey.generate()))) is None


def test_without_trusted_keys_every_app_is_run():
    assert Device(None).refusal(fab({})) is None


@pytest.mark.parametrize("signatures", [{}, signed(OPS), {"nobody": "{}"}])
def test_a_file_that_was_emptied_since_trusts_nobody(signatures):
    """Flower itself would then run every app."""
    assert "signed by nobody, and this" in Device({}).refusal(fab(signatures))


@pytest.mark.parametrize(
    ("sent", "signers"),
    [
        (fab({}), "nobody"),
        (fab(signed(OTHER)), key_id(OTHER.public_key())),
        (fab(signed(OPS), content=b"another app"), key_id(OPS.public_key())),
        (fab({"ops": signed(OPS).popitem()[1]}), "ops"),
        (fab({key_id(OPS.public_key()): signed(OTHER).popitem()[1]}), key_id(OPS.public_key())),
    ],
)
def test_any_other_is_refused_by_name_with_the_reason_and_the_log_says_so(sent, signers, caplog):
    reason = Device({"ops": public(OPS), "boss": public(OPS)}).refusal(sent)
    digest = hashlib.sha256(sent.content).hexdigest()
    assert reason == (
        f"client pi-02 runs only apps that are signed by ops or boss, and this one is signed by "
        f"{signers}; start the run with: fleet run --sign KEY, or add the signer's public key to "
        f"the device's --trusted-entities; its SHA-256 is {digest}"
    )
    assert reason.replace("client pi-02", "this device") in caplog.text


@pytest.mark.parametrize(
    "garbage",
    [
        "",
        "[]",
        "{}",
        "7",
        '{"signed_at": "x", "signature": "x"}',
        '{"signed_at": -1, "signature": ""}',
        '{"signed_at": 1, "signature": "ä"}',
        '{"signed_at": 1, "signature": "x"}',
        '{"signed_at": 1, "signature": 1}',
    ],
)
def test_what_is_no_signature_is_refused_and_does_not_end_the_loop(garbage):
    device = Device({"ops": public(OPS)})
    assert "this one is signed by SHA256:" in device.refusal(
        fab({key_id(OPS.public_key()): garbage})
    )


def test_a_kept_app_is_fetched_again_for_its_signature_and_then_no_more(tmp_path):
    unsigned, now_signed = fab({}), fab(signed(OPS))
    assert Device(None, tmp_path).refusal(unsigned) is None  # from before it trusted anyone
    device = Device({"ops": public(OPS)}, tmp_path)
    for sent, fetched in ((unsigned, 1), (now_signed, 2), (now_signed, 2)):
        assert (device.refusal(sent) is None) == (sent is now_signed)
        assert device.fetched == fetched


def test_trusted_keys_are_read_as_flower_reads_them(tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text(f"ops: {public(OPS)}\nboss: {public(OTHER)} boss@home\n")
    keys = read_trusted(path)
    assert keys == _try_obtain_trusted_entities(path)
    _validate_public_keys_ed25519(keys)
    assert keys == {"ops": public(OPS), "boss": f"{public(OTHER)} boss@home"}


P256 = ec.derive_private_key(7, ec.SECP256R1())


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "names no keys; write a line NAME: ssh-ed25519 AAAA… for each key"),
        ("{}", "names no keys"),
        (public(OPS), "names no keys"),
        ("- a\n- b", "names no keys"),
        ("a: [", "is not YAML"),
        ("\0", "is not YAML"),
        ("ops:", "'ops': None is not a name and a key as text"),
        ("7: x", "7: 'x' is not a name and a key as text"),
        (
            f"ops: {public(OPS)}\nboss: {public(OPS)}\nops: {public(OTHER)}",
            "names ops 2 times, and one key would count; give each key a name of its own",
        ),
        ("ops: ops.pub", "ops is no public key of OpenSSH's (Invalid line format); take the line"),
        (f"ops: {public(P256)}", "ops is a key of kind ecdsa-sha2-nistp256, and Flower takes"),
    ],
)
def test_a_file_that_holds_no_trusted_keys_is_refused(tmp_path, text, complaint):
    (tmp_path / "keys.yaml").write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_trusted(tmp_path / "keys.yaml")
    assert "keys.yaml" in str(refused.value) and complaint in str(refused.value)
