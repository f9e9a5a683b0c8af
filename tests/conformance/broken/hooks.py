"""The suite's hooks for transports that copy with a thread of their own: holding copies back, another version."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import msgspec

from tensorferry.backends import _copier

_move = _copier.memmove
_open = threading.Event()
_open.set()


def _held(*arguments: int) -> Any:
    _open.wait()
    return _move(*arguments)


class Hooks:
    """Writes of every instance of this process are held at once: a check has no others."""

    def hold(self, transport: Any) -> None:
        _open.clear()
        _copier.memmove = _held  # type: ignore[assignment]

    def let_go(self, transport: Any) -> None:
        _open.set()

    def cut(self, transport: Any, peer: Any) -> None:
        if hasattr(transport, "cut"):
            transport.cut()

    def heal(self, transport: Any, peer: Any) -> None:
        if hasattr(transport, "heal"):
            transport.heal()

    def other_version(self, descriptor: bytes) -> bytes:
        pickled = descriptor.startswith(b"\x80\x04")  # by the broken transport that does
        fields = msgspec.msgpack.decode(pickle.loads(descriptor) if pickled else descriptor)  # noqa: S301
        fields[1] += 1
        encoded = msgspec.msgpack.encode(fields)
        return pickle.dumps(encoded) if pickled else encoded
