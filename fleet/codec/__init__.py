"""State or update ↔ bytes, with exact sizes; what was not sent, and who holds what."""

from fleet.codec.names import parse_codec
from fleet.codec.payload import EncodedArrays, Payload, decode, encode, most_bytes

__all__ = ["EncodedArrays", "Payload", "decode", "encode", "most_bytes", "parse_codec"]
