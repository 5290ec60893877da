"""State or delta ↔ bytes, with exact sizes."""

from fleet.codec.payload import CODECS, Payload, decode, encode

__all__ = ["CODECS", "Payload", "decode", "encode"]
