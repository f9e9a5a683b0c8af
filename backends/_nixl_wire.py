"""What a nixl transport says of itself: the engine's own description of the agent, and what we need besides."""

from __future__ import annotations

import zlib
from typing import Annotated

import msgspec

from tensorferry.backends._descriptor import MAX_REGIONS, Natural, Token
from tensorferry.backends._host import Host

DESCRIPTOR_VERSION = 3
MAX_METADATA_BYTES = 64 * 1024
MAX_ADDRESSES = 64

Word = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


class Descriptor(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    kind: str
    version: int
    instance: Token
    revision: Natural
    agent: Word
    """The engine's name for this side: of this incarnation and no other."""
    backend: Word
    ways: Annotated[list[Word], msgspec.Meta(max_length=8)]
    """What data may take to it: of "rdma", "memcpy", "tcp"."""
    ports: Annotated[list[Annotated[int, msgspec.Meta(ge=0, le=65535)]], msgspec.Meta(max_length=256)]
    """On which it accepts the engine's TCP connections."""
    host: Host
    pid: Natural
    started: Natural
    doorstep: Natural
    """Where a byte may be written to learn whether it answers."""
    checksum: Natural
    """Of the metadata. The engine reads it in C++ and trusts it."""
    metadata: Annotated[bytes, msgspec.Meta(min_length=1, max_length=MAX_METADATA_BYTES)]
    addresses: Annotated[list[Natural], msgspec.Meta(max_length=MAX_REGIONS)]
    """Where each region begins, in the order of `regions`: the engine's requests need them."""
    regions: Annotated[list[tuple[Natural, Natural, Natural]], msgspec.Meta(max_length=MAX_REGIONS)]
    """(id, generation, bytes)"""
    gpus: Annotated[list[Annotated[int, msgspec.Meta(ge=-1, le=4095)]], msgspec.Meta(max_length=MAX_REGIONS)]
    """The number of the GPU that each region lies on, -1 for host memory, in the order of `regions`."""
    found_at: Annotated[list[Word], msgspec.Meta(max_length=MAX_ADDRESSES)]
    """Its host's addresses. With `ports` they tell the connections to it from those to others."""


encode = msgspec.msgpack.Encoder().encode


def checksum(metadata: bytes) -> int:
    return zlib.crc32(metadata)
