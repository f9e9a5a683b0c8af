"""The suite's hooks for the transports that come with tensorferry: --hooks own_hooks:Copying, :Tcp, :Mooncake, :Nixl.

Each is for every instance of its process at once: a check has no others.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from typing import Any

import msgspec

from tensorferry.backends import _copier, _tcp_link, _tcp_wire
from tensorferry.backends._own_sockets import own_sockets

_open = threading.Event()
_open.set()
_memmove = _copier.memmove
_transmit = _tcp_link.transmit
_begun: set[int] = set()
"""Connections on which something was sent since they are held."""


def _held_copy(*arguments: int) -> Any:
    _open.wait()
    return _memmove(*arguments)


def _held_bytes(connection: socket.socket, buffers: Sequence[memoryview | bytes]) -> int:
    """A part of a frame's header, so that a post has begun, and no more: as a socket whose buffer is full."""
    if _open.is_set():
        return _transmit(connection, buffers)
    if connection.fileno() in _begun:
        raise BlockingIOError
    _begun.add(connection.fileno())
    return _transmit(connection, [memoryview(buffers[0])[: _tcp_wire.FRAME_BYTES // 2]])


class Versioned:
    """A first-party descriptor is an array of a name, a version and the rest."""

    def other_version(self, descriptor: bytes) -> bytes:
        fields = msgspec.msgpack.decode(descriptor)
        fields[1] += 1
        return msgspec.msgpack.encode(fields)


class Held(Versioned):
    def hold(self, transport: Any) -> None:
        _begun.clear()
        _open.clear()
        _copier.memmove = _held_copy  # type: ignore[assignment]
        _tcp_link.transmit = _held_bytes

    def let_go(self, transport: Any) -> None:
        _open.set()


class Connected(Versioned):
    """Every TCP connection of this process breaks, those of an engine included, and new ones do until it is healed."""

    def __init__(self) -> None:
        self._healed = threading.Event()
        self._breaking = threading.Thread()

    def cut(self, transport: Any, peer: Any) -> None:
        self._healed.clear()
        _break()
        self._breaking = threading.Thread(target=self._go_on, daemon=True)
        self._breaking.start()

    def heal(self, transport: Any, peer: Any) -> None:
        self._healed.set()
        self._breaking.join()

    def _go_on(self) -> None:
        while not self._healed.wait(0.005):
            _break()


def _break() -> None:
    with own_sockets() as sockets:
        for one in sockets:
            if not one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                try:
                    one.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # it is not connected


class Copying(Held):
    """For `memory` and `shm`: they have no link."""


class Tcp(Held, Connected):
    """For `tcp`."""


class Mooncake(Connected):
    """For `mooncake` over TCP."""


class Nixl(Versioned):
    """For `nixl`, and for both engines over verbs, where a link is more than connections. An agent has connections to
    itself, too, without which it can register nothing: a link that is cut between hosts leaves them alone."""
