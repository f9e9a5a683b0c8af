"""Frames: one message, bounded, versioned, checksummed. No pickle, no evaluation, no allocation by a peer's number.

    magic "TFry" (4) | frame version (1) | reserved 0 (3) | crc32 of the payload (4) | msgpack payload

`decode` raises BadFrame and nothing else; the control channel counts those by reason and goes on.
"""

from __future__ import annotations

import struct
import zlib

import msgspec

from tensorferry.core.messages import AnyMessage, Message

MAGIC = b"TFry"
FRAME_VERSION = 1
MAX_FRAME_BYTES = 1 << 20
"""The longest message is a Hello with 8 descriptors of 64 KiB and its regions: about 0.6 MiB."""

_HEAD = struct.Struct("<4sB3xI")
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


class BadFrame(ValueError):
    """`reason` is one of size, magic, version, checksum, content: a label for counters."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def encode(message: Message) -> bytes:
    """The frame of a message. Raises ValueError if it is longer than MAX_FRAME_BYTES."""
    payload = _encoder.encode(message)
    if len(payload) + _HEAD.size > MAX_FRAME_BYTES:
        raise ValueError(f"{type(message).__name__} of {len(payload)} bytes does not fit a frame")
    return _HEAD.pack(MAGIC, FRAME_VERSION, zlib.crc32(payload)) + payload


def decode(frame: bytes | memoryview) -> AnyMessage:
    """The message of a frame. Raises BadFrame for anything that `encode` could not have made."""
    if not _HEAD.size <= len(frame) <= MAX_FRAME_BYTES:
        raise BadFrame("size", f"{len(frame)} bytes")
    magic, version, crc = _HEAD.unpack_from(frame)
    if magic != MAGIC:
        raise BadFrame("magic", "not a tensorferry frame")
    if version != FRAME_VERSION or bytes(frame[5:8]) != b"\0\0\0":
        raise BadFrame("version", f"frame version {version}, this side speaks {FRAME_VERSION}")
    payload = memoryview(frame)[_HEAD.size :]
    if zlib.crc32(payload) != crc:
        raise BadFrame("checksum", "the payload is damaged")
    try:
        return _decoder.decode(payload)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as problem:
        raise BadFrame("content", str(problem)) from problem
