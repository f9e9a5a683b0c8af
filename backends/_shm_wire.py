"""What the shm transport says: the descriptor, and the few messages on its unix socket.

The socket is abstract (a name of the network namespace, no file), of kind SEQPACKET (a message is a
packet: no framing, and an oversized one is seen as such). Everything is bounded before it is looked at.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from typing import Annotated

import msgspec

from tensorferry.backends._descriptor import MAX_REGIONS, Natural, Token
from tensorferry.backends._host import Host

DESCRIPTOR_VERSION = 1
SOCKET_VERSION = 1
MAX_PACKET_BYTES = 4096
MAX_ASKED = 16
"""Regions in one request. The answers to it fit into a socket buffer, so that the one who gives never waits."""

Key = tuple[int, int]
"""(id, generation) of a region."""


class Descriptor(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    kind: str
    version: int
    instance: Token
    revision: Natural
    socket: Annotated[bytes, msgspec.Meta(min_length=1, max_length=100)]
    host: Host
    uid: Natural
    pid: Natural
    started: Natural
    regions: Annotated[list[tuple[Natural, Natural, Natural]], msgspec.Meta(max_length=MAX_REGIONS)]
    """(id, generation, bytes)"""


class _Message(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    pass


class Ask(_Message, frozen=True, tag="ask"):
    """Writer to owner, first and whenever more is needed. No regions: only to be told of the end."""

    version: int
    instance: Token
    """The owner's: who asks must have its descriptor."""
    regions: Annotated[list[tuple[Natural, Natural]], msgspec.Meta(max_length=MAX_ASKED)]


class Welcome(_Message, frozen=True, tag="welcome"):
    """Owner to writer, before the answers to an Ask."""

    instance: Token


class Give(_Message, frozen=True, tag="give"):
    """Owner to writer, with the region's memfd."""

    region: tuple[Natural, Natural]
    nbytes: Natural


class Refuse(_Message, frozen=True, tag="refuse"):
    """Owner to writer: no such live region."""

    region: tuple[Natural, Natural]


class Closed(_Message, frozen=True, tag="closed"):
    """To everybody connected: this instance is closed, and nothing that it ever posted can land any more."""

    instance: Token


Answer = Welcome | Give | Refuse | Closed

encode = msgspec.msgpack.Encoder().encode
decode_ask = msgspec.msgpack.Decoder(Ask).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode


def new_socket() -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.setblocking(False)
    return connection


def peer_uid(connection: socket.socket) -> int:
    """The effective user of the process at the other end, as the kernel noted it at connect or listen."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


def receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    """One packet and the file descriptors in it, which the caller has to close. Empty: the end.

    Raises BlockingIOError when there is none, ValueError for one that is too long.
    """
    room = socket.CMSG_SPACE(array.array("i").itemsize)  # one; the kernel closes those that do not fit
    data, ancillary, flags, _ = connection.recvmsg(MAX_PACKET_BYTES, room, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        for fd in fds:
            os.close(fd)
        raise ValueError("a packet longer than any of ours")
    return data, fds.tolist()
