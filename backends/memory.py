"""The `memory` transport: between two endpoints of one process. The reference, and what simulations run on.

Every live instance stands in a table of this module under a random id, which is what its descriptor
names. A writer holds the target's memory only as long as a batch of its own is on the way, and enters
the target's gate for each chunk, so that the target's `close` is an end to every write: after it nothing
lands any more.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
import weakref
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tensorferry.backends._copier import Batch
from tensorferry.backends._descriptor import Natural, Token, decode
from tensorferry.backends._hostcopy import CLOSE_TIMEOUT_S, HostCopyTransport, HostPeer
from tensorferry.core.errors import (
    OutOfBounds,
    PeerUnreachable,
    TransportError,
    TransportMismatch,
)
from tensorferry.core.memory import Memory
from tensorferry.core.transport import (
    Capabilities,
    Fence,
    Options,
    PeerState,
    Probe,
    Readiness,
    Region,
    RemoteRegion,
)

log = logging.getLogger("tensorferry.backends.memory")

DESCRIPTOR_VERSION = 1


class MemoryOptions(Options, frozen=True):
    """The memory transport has no options."""


class _Descriptor(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    kind: str
    version: int
    process: Token
    instance: Token
    revision: Natural
    regions: list[tuple[Natural, Natural, Natural]]


class _Instance:
    """What peers in this process see of a transport: its live regions, and whether it still takes and
    makes writes."""

    def __init__(self) -> None:
        self.id = secrets.token_bytes(16)
        self.regions: dict[tuple[int, int], Region] = {}
        self.ended = False  # closed, and nothing that it posted can land any more
        self._open = True
        self._inside = 0
        self._condition = threading.Condition()

    @property
    def open(self) -> bool:
        return self._open

    def enter(self) -> bool:
        """A writer asks to copy one chunk into our memory."""
        with self._condition:
            self._inside += self._open
            return self._open

    def leave(self) -> None:
        with self._condition:
            self._inside -= 1
            if not self._inside:
                self._condition.notify_all()

    def shut(self, timeout_s: float) -> None:
        """Let no writer in any more and wait for those inside: each stays for one chunk."""
        deadline = time.monotonic() + timeout_s
        with self._condition:
            self._open = False
            self.regions.clear()
            while self._inside and (left := deadline - time.monotonic()) > 0:
                self._condition.wait(left)
            if self._inside:
                log.error("memory: a peer's copy did not end within %g s; it may still land", timeout_s)


_instances: weakref.WeakValueDictionary[bytes, _Instance] = weakref.WeakValueDictionary()
_process: tuple[int, bytes] = (0, b"")
_lock = threading.Lock()


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()  # who held the old one may not exist here


os.register_at_fork(after_in_child=_after_fork_in_child)


def _process_id() -> bytes:
    """Random, and another one in a forked child: what makes "the same process" provable."""
    global _process
    with _lock:
        if _process[0] != os.getpid():
            _process = (os.getpid(), secrets.token_bytes(16))
        return _process[1]


@dataclass(slots=True, eq=False)
class MemoryPeer(HostPeer):
    """Another memory transport of this process."""

    there: _Instance = field(kw_only=True)


class MemoryTransport(HostCopyTransport):
    """Copies between two endpoints of one process, on a thread of the writer."""

    name = "memory"
    options_type = MemoryOptions
    capabilities = Capabilities(
        same_host_only=True,
        registers_sources=False,
        cancellable=True,
        notices_dead_peer=True,
        fences=frozenset({Fence.DRAIN, Fence.PEER_GONE}),
        wakes=True,
    )

    @classmethod
    def probe(cls) -> Probe:
        return Probe(Readiness.READY, "works between two endpoints of one process, and nowhere else", path="memcpy")

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._process = _process_id()
        self._me = _Instance()
        self._peers: dict[bytes, MemoryPeer] = {}
        with _lock:
            _instances[self._me.id] = self._me

    def _publish(self, region: Region) -> None:
        self._me.regions[region.id, region.generation] = region

    def _withdraw(self, region: Region) -> None:
        self._me.regions.pop((region.id, region.generation), None)

    def describe(self) -> bytes:
        self._check_open()
        regions = [(r.id, r.generation, r.memory.nbytes) for r in self._live.values()]
        return msgspec.msgpack.encode(
            _Descriptor(self.name, DESCRIPTOR_VERSION, self._process, self._me.id, self._revision, regions)
        )

    def connect(self, descriptor: bytes) -> MemoryPeer:
        self._check_open()
        told = decode(descriptor, self.name, DESCRIPTOR_VERSION, _Descriptor)
        if told.process != self._process:
            raise TransportMismatch(
                "the memory transport joins endpoints of one process, and the peer is in another",
                hint="Use shm (same host) or a network transport on both sides",
                transport=self.name,
            )
        with _lock:
            there = _instances.get(told.instance)
        if there is None or not there.open:
            raise PeerUnreachable("the peer's memory transport is closed", transport=self.name)
        peer = self._peers.get(told.instance)
        if peer is None:
            peer = self._peers[told.instance] = MemoryPeer(self._home, told.instance, there=there)
        peer.learn(told.revision, told.regions)
        return peer

    def disconnect(self, peer: Any) -> None:
        self._check_process()
        self._check_peer(peer)
        if peer.connected:
            peer.connected = False
            self._peers.pop(peer.instance, None)

    def peer_state(self, peer: Any) -> PeerState:
        self._check_process()
        self._check_peer(peer)
        there: _Instance = peer.there
        if there.ended:
            return PeerState.GONE
        return PeerState.ALIVE if there.id in _instances else PeerState.UNKNOWN

    def _target(self, peer: HostPeer, remote: RemoteRegion) -> tuple[int, Memory]:
        assert isinstance(peer, MemoryPeer)
        if not peer.there.open:
            raise TransportError("the peer's memory transport is closed", transport=self.name)
        key = (remote.id, remote.generation)
        region = peer.there.regions.get(key)
        if key not in peer.regions or region is None:
            raise OutOfBounds(
                f"the peer has no live region {remote.id} of generation {remote.generation}",
                transport=self.name,
            )
        return region.memory.nbytes, region.memory

    def _start(self, peer: HostPeer, batch: Batch, plan: list[tuple[Any, int, int, int]]) -> None:
        assert isinstance(peer, MemoryPeer)
        batch.segments = [(memory.address + offset, source, nbytes) for memory, offset, source, nbytes in plan]
        batch.keep = [*batch.keep, *{id(memory): memory for memory, *_ in plan}.values()]
        batch.gate = peer.there
        self._copier.submit(batch)

    def _close(self, drained: bool) -> None:
        self._me.shut(CLOSE_TIMEOUT_S)
        self._me.ended = drained
        with _lock:
            _instances.pop(self._me.id, None)
        self._peers.clear()
