"""Fault proxies whose script a test changes as it goes: what becomes of post number n, in the words of a Decision."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tensorferry.backends.memory import MemoryOptions, MemoryTransport
from tensorferry.backends.mooncake import MooncakeOptions, MooncakeTransport
from tensorferry.backends.nixl import NixlOptions, NixlTransport
from tensorferry.backends.shm import ShmOptions, ShmTransport
from tensorferry.backends.tcp import TcpOptions, TcpTransport
from tensorferry.conformance.fault_policy import Policy
from tensorferry.conformance.faults import FaultProxy, proxied

WRITE = "ok"  # as the real one
RAISE = "refuse"  # post refuses: the session with the peer is not valid
BREAK = "broken"  # post raises what no transport should
FAIL = "fails=0"  # FAILED: nothing placed, nothing can land
HOLD = "held"  # PENDING until `let_go`; the bytes move then
LOSE = "held unknown"  # UNKNOWN, not drained until `let_go`; the bytes move then
MUTE = "held mute"  # poll raises what no transport should, until `let_go`
TEAR = "torn"  # DONE, but the second half of every copy is not placed

Script = Callable[[int], str]


def _policy(posts: Script = lambda n: WRITE, connects: Script = lambda n: "ok") -> Policy:
    return Policy.scripted(posts, connects, holds=True)


FaultyMemory = proxied(MemoryTransport, _policy())
FaultyShm = proxied(ShmTransport, _policy())
FaultyTcp = proxied(TcpTransport, _policy())
FaultyMooncake = proxied(MooncakeTransport, _policy())
FaultyNixl = proxied(NixlTransport, _policy())

FAULTY: dict[str, Callable[[], FaultProxy]] = {
    "memory": partial(FaultyMemory, MemoryOptions()),
    "mooncake": partial(FaultyMooncake, MooncakeOptions()),
    "nixl": partial(FaultyNixl, NixlOptions(workers=1)),
    "shm": partial(FaultyShm, ShmOptions()),
    "tcp": partial(FaultyTcp, TcpOptions()),
}


def proxy(end: Any) -> FaultProxy:
    """The proxy that an endpoint writes through, or the proxy itself."""
    if isinstance(end, FaultProxy):
        return end
    found: FaultProxy = next(one for one in end.carriers.transports if isinstance(one, FaultProxy))
    return found


def script(end: Any, what: Script) -> None:
    """From now on: `what(n)` becomes of the endpoint's post number n, counted from its first."""
    proxy(end).follow(_policy(what))


def from_post(first: int, what: str, times: int = 1 << 60) -> Script:
    """`what` for `times` posts from number `first` on, else WRITE."""
    return lambda n: what if first <= n < first + times else WRITE


def refuse_connections(end: Any, times: int) -> None:
    """The next `times` calls of connect find nobody."""
    last = proxy(end).connects + times
    proxy(end).follow(_policy(connects=lambda n: "refuse" if n < last else "ok"))


def let_go(end: Any) -> None:
    """What was held back moves now, whoever has the memory by now (in the I/O thread); what comes next is written."""
    script(end, lambda n: WRITE)
    end._call(proxy(end).let_go)
