"""What a mooncake transport says of itself, and the one question that we ask engines ourselves.

The engine's own first contact has a time-out of 60 s and holds the lock that every other submit needs. So the same
question (the engine's metadata handshake: a length, a kind, JSON) is asked beforehand from Python, under a time-out of
ours. The answer also says which protocol the engine has really installed, which no call of its Python interface does.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from typing import Annotated

import msgspec

from tensorferry.backends._descriptor import MAX_REGIONS, Natural, Token
from tensorferry.backends._host import Host
from tensorferry.core.errors import PeerUnreachable

DESCRIPTOR_VERSION = 2
MAX_ANSWER_BYTES = 16 << 20
_METADATA = 1
_FRAME = struct.Struct("<QB")

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]


class Descriptor(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    kind: str
    version: int
    instance: Token
    revision: Natural
    address: Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
    """The host by which peers reach this engine."""
    port: Port
    """Of the engine's handshake; with the address it is the name of the session."""
    data_port: Port
    """Of the engine's TCP data connections; 0 over RDMA."""
    protocol: Annotated[str, msgspec.Meta(min_length=1, max_length=16)]
    host: Host
    pid: Natural
    started: Natural
    doorstep: Natural
    """Where its token can be read by way of the engine; 0 over RDMA."""
    token: Token
    """Of this engine and no other, not of one that gets its ports later."""
    addresses: Annotated[list[Natural], msgspec.Meta(max_length=MAX_REGIONS)]
    """Where each region begins, in the order of `regions`: the engine's requests need them."""
    regions: Annotated[list[tuple[Natural, Natural, Natural]], msgspec.Meta(max_length=MAX_REGIONS)]
    """(id, generation, bytes)"""


encode = msgspec.msgpack.Encoder().encode


class Answer(msgspec.Struct):
    """The part that we read of an engine's answer."""

    name: str = ""
    protocol: str = ""
    tcp_data_host: str = ""
    tcp_data_port: Port = 0

    @property
    def data_host(self) -> str:
        return self.tcp_data_host or self.name.rpartition(":")[0].strip("[]")


def session_name(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


Held = Callable[[socket.socket], None]


def dial(address: str, port: int, timeout_s: float, held: Held | None = None) -> socket.socket:
    """A connection; each of the host's addresses has `timeout_s` seconds to answer. Raises OSError.

    `held` is given each socket before it is connected, so that another thread can end the wait by a shutdown.
    """
    problem = OSError(f"{address} has no address")
    for family, kind, protocol, _, where in socket.getaddrinfo(address, port, type=socket.SOCK_STREAM):
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(timeout_s)
            if held is not None:
                held(connection)
            connection.connect(where)
        except OSError as error:
            connection.close()
            problem = error
        else:
            return connection
    raise problem


def ask(address: str, port: int, timeout_s: float, held: Held | None = None) -> Answer:
    """What the engine at `address`:`port` says of itself, within `timeout_s` seconds.

    `held`: as for `dial`. Raises PeerUnreachable.
    """
    deadline = time.monotonic() + timeout_s
    try:
        with dial(address, port, timeout_s, held) as connection:
            question = b"{}"
            connection.sendall(_FRAME.pack(len(question) + 1, _METADATA) + question)
            length, kind = _FRAME.unpack(_exactly(connection, _FRAME.size, deadline))
            if kind != _METADATA or not 1 < length <= MAX_ANSWER_BYTES:
                raise PeerUnreachable("what answers there is not a Mooncake engine that we know")
            answer = msgspec.json.decode(_exactly(connection, length - 1, deadline), type=Answer)
    except (OSError, msgspec.MsgspecError, ValueError) as error:
        what = "did not answer in time" if isinstance(error, TimeoutError) else f"does not answer: {error}"
        raise PeerUnreachable(f"the engine at {address}:{port} {what}") from error
    return answer


def _exactly(connection: socket.socket, nbytes: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < nbytes:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)
        piece = connection.recv(min(nbytes - len(data), 1 << 20))
        if not piece:
            raise ConnectionResetError("it hung up")
        data += piece
    return bytes(data)
