"""Transports that do what a test's script says: refuse, fail, lose sight of writes, or hold them back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from tensorferry.backends.memory import MemoryOptions, MemoryTransport
from tensorferry.backends.mooncake import MooncakeOptions, MooncakeTransport
from tensorferry.backends.nixl import NixlOptions, NixlTransport
from tensorferry.backends.shm import ShmOptions, ShmTransport
from tensorferry.backends.tcp import TcpOptions, TcpTransport
from tensorferry.core.errors import PeerUnreachable, TransportError
from tensorferry.core.transport import Copy, Status, Transport

WRITE = "write"  # as the real one
RAISE = "raise"  # post refuses: the session with the peer is not valid
BREAK = "break"  # post raises what no transport should
FAIL = "fail"  # FAILED: nothing placed, nothing can land
HOLD = "hold"  # PENDING until `let_go`; the bytes move then
LOSE = "lose"  # UNKNOWN, not drained until `let_go`; the bytes move then
MUTE = "mute"  # poll raises what no transport should, until `let_go`
TEAR = "tear"  # DONE, but the second half of every copy is not placed


@dataclass
class Scripted:
    what: str
    inner: int | None
    peer: Any
    copies: list[Copy]


class Faulty:
    """Mixed into a real transport. `script(n)` says what becomes of post number n (from 0)."""

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.script: Callable[[int], str] = lambda n: WRITE
        self.posts = 0
        self.bytes_posted = 0
        self.refuse_connections = 0
        self.held: list[Scripted] = []
        self._scripted: dict[int, Scripted] = {}
        self._numbers = count(1 << 40)

    def connect(self, descriptor: bytes) -> Any:
        if self.refuse_connections:
            self.refuse_connections -= 1
            raise PeerUnreachable("connection refused", transport="faulty")
        return super().connect(descriptor)  # type: ignore[misc]

    def post(self, peer: Any, copies: Sequence[Copy]) -> int:
        what = self.script(self.posts)
        self.posts += 1
        if what == RAISE:
            raise TransportError("the session with the peer is invalid")
        if what == BREAK:
            raise RuntimeError("a defect in the engine's binding")
        if what == TEAR:
            copies = [Copy(c.local, c.local_offset, c.remote, c.remote_offset, (c.nbytes + 1) // 2) for c in copies]
        inner = super().post(peer, copies) if what in (WRITE, TEAR) else None  # type: ignore[misc]
        self.bytes_posted += sum(c.nbytes for c in copies)
        handle = next(self._numbers)
        self._scripted[handle] = Scripted(what, inner, peer, list(copies))
        if what in (HOLD, LOSE, MUTE):
            self.held.append(self._scripted[handle])
        return handle

    def poll(self, handle: int) -> Status:
        one = self._scripted[handle]
        if one.inner is not None:
            status: Status = super().poll(one.inner)  # type: ignore[misc]
            return Status.UNKNOWN if one.what == LOSE else status
        if one.what == MUTE:
            raise RuntimeError("a defect in the engine's binding")
        return {FAIL: Status.FAILED, HOLD: Status.PENDING, LOSE: Status.UNKNOWN}[one.what]

    def drained(self, handle: int) -> bool:
        one = self._scripted.get(handle)
        if one is None:  # the real transport's own number: its `source_free` asks so
            return bool(super().drained(handle))  # type: ignore[misc]
        if one.inner is not None:
            return bool(super().drained(one.inner))  # type: ignore[misc]
        return one.what == FAIL

    def source_free(self, handle: int) -> bool:
        one = self._scripted[handle]
        if one.inner is not None:
            return bool(super().source_free(one.inner))  # type: ignore[misc]
        return one.what == FAIL

    def release(self, handle: int) -> None:
        one = self._scripted.pop(handle)
        if one.inner is not None:
            super().release(one.inner)  # type: ignore[misc]

    def let_go(self) -> None:
        """What was held back moves now, whoever has the memory by now (in the I/O thread)."""
        self.script = lambda n: WRITE
        held, self.held = self.held, []
        for one in held:
            try:
                one.inner = super().post(one.peer, one.copies)  # type: ignore[misc]
            except TransportError:
                one.what = FAIL  # the region is gone: nothing can land


class FaultyMemory(Faulty, MemoryTransport):
    def __init__(self) -> None:
        super().__init__(MemoryOptions())


class FaultyShm(Faulty, ShmTransport):
    def __init__(self) -> None:
        super().__init__(ShmOptions())


class FaultyMooncake(Faulty, MooncakeTransport):
    def __init__(self) -> None:
        super().__init__(MooncakeOptions())


class FaultyNixl(Faulty, NixlTransport):
    def __init__(self) -> None:
        super().__init__(NixlOptions(workers=1))


class FaultyTcp(Faulty, TcpTransport):
    def __init__(self) -> None:
        super().__init__(TcpOptions())


FAULTY: dict[str, type[FaultyMemory] | type[FaultyMooncake] | type[FaultyNixl] | type[FaultyShm] | type[FaultyTcp]] = {
    "memory": FaultyMemory,
    "mooncake": FaultyMooncake,
    "nixl": FaultyNixl,
    "shm": FaultyShm,
    "tcp": FaultyTcp,
}


def from_post(first: int, what: str, times: int = 1 << 60) -> Callable[[int], str]:
    """`what` for `times` posts from number `first` on, else WRITE."""
    return lambda n: what if first <= n < first + times else WRITE


def let_go(end: Any) -> None:
    transport: Transport = end.carriers.transports[0]
    assert isinstance(transport, Faulty)
    end._call(transport.let_go)
