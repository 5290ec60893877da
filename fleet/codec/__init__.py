"""State or update ↔ bytes, with exact sizes; what was not sent, and who holds what."""

from fleet.codec.feedback import encode_with_feedback
from fleet.codec.names import parse_codec
from fleet.codec.payload import EncodedArrays, Payload, decode, encode, most_bytes
from fleet.codec.versions import (
    FULL_STATE,
    Download,
    UnknownVersion,
    Versions,
    follow,
    moved,
    version_of,
)

__all__ = [
    "FULL_STATE",
    "Download",
    "EncodedArrays",
    "Payload",
    "UnknownVersion",
    "Versions",
    "decode",
    "encode",
    "encode_with_feedback",
    "follow",
    "most_bytes",
    "moved",
    "parse_codec",
    "version_of",
]
