"""What the tcp transport says: the descriptor, and the fixed headers on its connections.

The writer dials, the owner of the memory listens. The writer says HELLO once and then frames; the owner says
nothing but replies of one fixed length. Everything is little endian and is bounded before it is used.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Annotated, NamedTuple

import msgspec

from tensorferry.backends._descriptor import MAX_REGIONS, Natural, Token
from tensorferry.backends._host import Host

DESCRIPTOR_VERSION = 1
WIRE_VERSION = 1
MAX_ADDRESSES = 32

MAGIC = b"tnsrfrry"
_FRAME_MAGIC = 0x5446
_REPLY_MAGIC = 0x5452

MAX_PIECE_BYTES = 64 << 20
"""Longest payload of one frame. What is refused is read and thrown away, so it has to be bounded."""

_HELLO = struct.Struct("<8sHHI16s16sQ")
_FRAME = struct.Struct("<HBBIQQQQQ")
_REPLY = struct.Struct("<HBBIQ16s")
HELLO_BYTES, FRAME_BYTES, REPLY_BYTES = _HELLO.size, _FRAME.size, _REPLY.size


class Descriptor(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    kind: str
    version: int
    instance: Token
    revision: Natural
    token: Token
    """Secret: who presents it may write to our regions."""
    host: Host
    pid: Natural
    started: Natural
    addresses: Annotated[
        list[Annotated[str, msgspec.Meta(min_length=2, max_length=64)]],
        msgspec.Meta(min_length=1, max_length=MAX_ADDRESSES),
    ]
    """Where we listen, best first; loopback ones mean something only in our own network namespace."""
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    regions: Annotated[list[tuple[Natural, Natural, Natural]], msgspec.Meta(max_length=MAX_REGIONS)]
    """(id, generation, bytes)"""


class Hello(NamedTuple):
    """First word of a writer on a connection: the owner's token, who it is, which of its links this is."""

    token: bytes
    instance: bytes
    link: int
    incarnation: int
    """Counts the connections of one link. A later one ends the earlier."""


class Kind(IntEnum):
    PIECE = 1  # a header and `length` bytes for (region, generation) at `offset`
    ABORT = 2  # no more pieces of this part will come


LAST = 1
"""Flag of a frame: the part is complete, and its outcome is to be answered."""


class Frame(NamedTuple):
    kind: int
    last: bool
    part: int
    region: int
    generation: int
    offset: int
    length: int


class Word(IntEnum):
    WELCOME = 1  # nothing that came over earlier connections of this link can land any more
    PLACED = 2  # every byte of every piece of this part is in its place
    REFUSED = 3  # not all of it is, and no more will come to be
    CLOSED = 4  # the owner has closed with nothing of its own on the way; what it has not answered is not placed


class Reply(NamedTuple):
    word: int
    part: int
    instance: bytes
    """The owner's."""


def pack_hello(hello: Hello) -> bytes:
    return _HELLO.pack(MAGIC, WIRE_VERSION, 0, hello.link, hello.token, hello.instance, hello.incarnation)


def unpack_hello(data: bytes | bytearray) -> Hello:
    """Raises ValueError for anything that is not one."""
    magic, version, zero, link, token, instance, incarnation = _HELLO.unpack(data)
    if magic != MAGIC or version != WIRE_VERSION or zero:
        raise ValueError("not a greeting of ours")
    return Hello(token, instance, link, incarnation)


def pack_frame(frame: Frame) -> bytes:
    kind, last, part, region, generation, offset, length = frame
    return _FRAME.pack(_FRAME_MAGIC, kind, LAST * last, 0, part, region, generation, offset, length)


def unpack_frame(data: bytes | bytearray) -> Frame:
    """Raises ValueError for anything that is not one, or is too long."""
    magic, kind, flags, zero, part, region, generation, offset, length = _FRAME.unpack(data)
    if magic != _FRAME_MAGIC or zero or flags & ~LAST:
        raise ValueError("not a frame of ours")
    if kind == Kind.PIECE:
        if not 0 < length <= MAX_PIECE_BYTES:
            raise ValueError(f"a frame of {length} bytes")
    elif kind != Kind.ABORT or length or not flags:
        raise ValueError(f"a frame of kind {kind}")
    return Frame(kind, bool(flags), part, region, generation, offset, length)


def pack_reply(word: Word, part: int, instance: bytes) -> bytes:
    return _REPLY.pack(_REPLY_MAGIC, word, 0, 0, part, instance)


def unpack_reply(data: bytes | bytearray | memoryview) -> Reply:
    """Raises ValueError for anything that is not one."""
    magic, word, flags, zero, part, instance = _REPLY.unpack(data)
    if magic != _REPLY_MAGIC or flags or zero:
        raise ValueError("not a reply of ours")
    return Reply(Word(word), part, instance)
