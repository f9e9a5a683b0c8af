"""Transports that are right, each in another way than the first-party ones: the suite has to pass them."""

from __future__ import annotations

import importlib.util
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any

from tensorferry.backends._copier import memmove
from tensorferry.backends.memory import MemoryTransport
from tensorferry.core.errors import TransportUnavailable, Unsupported
from tensorferry.core.memory import Memory, host_memory
from tensorferry.core.transport import (
    Capabilities,
    Copy,
    PeerState,
    Probe,
    Readiness,
    Region,
    Status,
    Transport,
)

FULL = MemoryTransport.capabilities


class Plain(MemoryTransport):
    """Declares nothing that it need not."""

    name = "plain"
    contract_version = 1
    capabilities = Capabilities(same_host_only=True, registers_sources=True, max_copies=16, preferred_post_bytes=4096)

    def post(self, peer: Any, copies: Sequence[Copy]) -> int:
        if any(isinstance(copy.local, Memory) for copy in copies):
            raise Unsupported("the source has to be registered", transport=self.name)
        return super().post(peer, copies)

    def peer_state(self, peer: Any) -> PeerState:
        super().peer_state(peer)
        return PeerState.UNKNOWN

    def cancel(self, handle: int) -> None:
        Transport.cancel(self, handle)

    def on_progress(self, wake: Callable[[], None]) -> None:
        Transport.on_progress(self, wake)


_ends: weakref.WeakValueDictionary[bytes, Flushing] = weakref.WeakValueDictionary()


class Flushing(MemoryTransport):
    """What is placed is to be seen after `flush` of its region alone."""

    name = "flushing"
    contract_version = 1
    capabilities = replace(FULL, needs_flush=True, registers_sources=True)

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self._shadows: dict[tuple[int, int], Memory] = {}
        self._placed: list[tuple[tuple[int, int], int, int, int]] = []
        self._flying: dict[int, tuple[Any, Sequence[Copy]]] = {}
        _ends[self._me.id] = self

    def _publish(self, region: Region) -> None:
        key = (region.id, region.generation)
        shadow = self._shadows[key] = host_memory(region.memory.nbytes)
        super()._publish(Region(region.id, region.generation, shadow))

    def post(self, peer: Any, copies: Sequence[Copy]) -> int:
        if any(isinstance(copy.local, Memory) for copy in copies):
            raise Unsupported("the source has to be registered", transport=self.name)
        handle = super().post(peer, copies)
        self._flying[handle] = (peer, copies)
        return handle

    def poll(self, handle: int) -> Status:
        status = super().poll(handle)
        if status is Status.DONE and handle in self._flying:
            peer, copies = self._flying.pop(handle)
            owner = _ends.get(peer.instance)
            for copy in copies if owner is not None else ():
                key = (copy.remote.id, copy.remote.generation)
                assert isinstance(copy.local, Region)
                source = copy.local.memory.address + copy.local_offset
                owner._placed.append((key, copy.remote_offset, copy.nbytes, source))
        return status

    def flush(self, region: Region) -> None:
        here = (region.id, region.generation)
        live = self._live.get(region.id)
        mine = [placed for placed in self._placed if placed[0] == here]
        self._placed = [placed for placed in self._placed if placed[0] != here]
        for placed in mine if live is not None and live.generation == region.generation else ():
            self._fetch(placed, live)

    def _fetch(self, placed: tuple[tuple[int, int], int, int, int], live: Region) -> None:
        key, offset, nbytes, _ = placed
        memmove(live.memory.address + offset, self._shadows[key].address + offset, nbytes)


class Polled(MemoryTransport):
    """Has no thread: bytes move while somebody asks."""

    name = "polled"
    contract_version = 1
    capabilities = replace(FULL, wakes=False, fences=frozenset(), notices_dead_peer=False)
    step = 1 << 20

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self._line: list[tuple[Any, list[tuple[int, int, int]]]] = []

    def _start(self, peer: Any, batch: Any, plan: list[tuple[Any, int, int, int]]) -> None:
        batch.keep = [*batch.keep, *(memory for memory, *_ in plan)]
        batch.gate = peer.there
        pieces = []
        for memory, offset, source, nbytes in plan:
            for start in range(0, nbytes, self.step):
                size = min(self.step, nbytes - start)
                pieces.append((memory.address + offset + start, source + start, size))
        self._line.append((batch, pieces))

    def _advance(self) -> None:
        if not self._line or self._closed:
            return
        batch, pieces = self._line[0]
        over = batch.cancelled or not batch.gate.enter()
        if not over:
            try:
                memmove(*pieces.pop(0))
            finally:
                batch.gate.leave()
        if over or not pieces:
            self._line.pop(0)
            self._copier.finish(batch, Status.FAILED if over else Status.DONE)

    def poll(self, handle: int) -> Status:
        self._advance()
        return super().poll(handle)

    def drained(self, handle: int) -> bool:
        self._advance()
        return super().drained(handle)

    def on_progress(self, wake: Callable[[], None]) -> None:
        Transport.on_progress(self, wake)

    def peer_state(self, peer: Any) -> PeerState:
        super().peer_state(peer)
        return PeerState.ALIVE if peer.there.open else PeerState.UNKNOWN


def _locked(verb: str) -> Any:
    inner = getattr(MemoryTransport, verb)

    @wraps(inner)
    def call(self: Any, *arguments: Any) -> Any:
        with self._verbs:
            return inner(self, *arguments)

    return call


class Locked(MemoryTransport):
    """Every verb from any thread."""

    name = "locked"
    contract_version = 1
    capabilities = replace(FULL, thread_safe=True)

    def __init__(self, options: Any) -> None:
        self._verbs = threading.RLock()
        super().__init__(options)

    register, retire, describe = _locked("register"), _locked("retire"), _locked("describe")
    connect, disconnect = _locked("connect"), _locked("disconnect")
    post, poll, drained, release = _locked("post"), _locked("poll"), _locked("drained"), _locked("release")


class Engined(MemoryTransport):
    """Loads an engine, and knows what to say where it is not there."""

    name = "engined"
    contract_version = 1

    @classmethod
    def probe(cls) -> Probe:
        if importlib.util.find_spec("an_engine") is None:
            return Probe(Readiness.UNAVAILABLE, "the engine is not installed", "pip install an-engine")
        return Probe(Readiness.READY, "the engine is there", path="memcpy")

    def __init__(self, options: Any) -> None:
        try:
            import an_engine
        except ImportError as error:
            raise TransportUnavailable("the engine is not installed", transport=self.name) from error
        super().__init__(options)
        self._engine = an_engine


class Learning(MemoryTransport):
    """What became of a write is not known for a while, and then it is."""

    name = "learning"
    contract_version = 1

    def poll(self, handle: int) -> Status:
        status = super().poll(handle)
        if status is Status.FAILED and self._batch(handle).cancelled:
            seen = self._seen = {**getattr(self, "_seen", {}), handle: getattr(self, "_seen", {}).get(handle, 0) + 1}
            return status if seen[handle] > 2 else Status.UNKNOWN
        return status


CORRECT = (Plain, Flushing, Polled, Locked, Engined, Learning)
