"""What the transports over an engine share, whichever it is.

A region stays registered when it is retired, for as long as a peer lives that was told of it: others' writes into it
end as they should, and a late one lands in memory that is still there. That a peer was disconnected ends nothing of
this: it may not know, or have a write under way. So its process is watched on, and where no proof of its end is to be
had the region stays until the transport closes. A peer is gone when its process has ended and nothing that it sent is
still on the way. Posts are carried out by threads that know nothing of the transport.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import weakref
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from tensorferry.backends._engine_jobs import Job, Target
from tensorferry.backends._engine_thread import Bell
from tensorferry.backends._host import Host, this_host
from tensorferry.backends._hostcopy import CLOSE_TIMEOUT_S, HostPeer, HostTransport
from tensorferry.backends._process import ProcessWatch, watch_living
from tensorferry.core.errors import OutOfBounds, TransportError, Unsupported
from tensorferry.core.memory import Memory
from tensorferry.core.transport import Copy, Options, PeerState, Region, RemoteRegion

log = logging.getLogger("tensorferry.backends")

FOR_GOOD = b""
"""Stands for all peers that were disconnected and whose end cannot be proved."""


class Told(Protocol):
    """What a descriptor says of the peer's process."""

    @property
    def host(self) -> Host: ...

    @property
    def pid(self) -> int: ...

    @property
    def started(self) -> int: ...


class Threads(Protocol):
    """The threads of one transport, and the engine that is theirs: it ends with them."""

    bell: Bell

    def nudge(self) -> None:
        """Look again: something was cancelled."""

    def stop(self) -> None:
        """Ask them to end. From any thread, the garbage collector's too."""

    def close(self, timeout_s: float) -> bool:
        """`stop`, and wait for it. False: one does not come back from the engine."""


@dataclass(slots=True, eq=False)
class EnginePeer(HostPeer):
    """An engine of another process, or of this one."""

    target: Target = field(kw_only=True)
    traceable: bool = field(kw_only=True)
    """Its connections to us can be seen in the kernel's tables, or there are none."""
    addresses: dict[tuple[int, int], Any] = field(default_factory=dict)
    """Where each region begins, as the engine's requests name it."""
    gone: bool = False

    @property
    def provable(self) -> bool:
        """Its end can be proved, when it comes."""
        return self.traceable and self.target.watch is not None


J = TypeVar("J", bound=Job[Any, Any])
P = TypeVar("P", bound=EnginePeer)


class EngineTransport(HostTransport[J], Generic[J, P]):
    """Base of the transports over an engine. Not a transport by itself."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._instance = secrets.token_bytes(16)
        self._host = this_host()
        self._peers: dict[bytes, P] = {}
        self._retired: dict[Memory, set[bytes]] = {}  # still registered, and whom that is for
        self._left: dict[Memory, set[bytes]] = {}  # of live regions: who was told of them and has been disconnected
        self._parted: dict[bytes, P] = {}  # who was disconnected while it knew a region, and is not gone yet
        self._watches: weakref.WeakValueDictionary[tuple[int, int], ProcessWatch] = weakref.WeakValueDictionary()

    def _employ(self, threads: Threads) -> None:
        """From the constructor. The threads do not know the transport, so that one that is dropped without close() is
        noticed, and ends."""
        self._threads = threads
        weakref.finalize(self, threads.stop).atexit = False
        _employed[threads] = self.name

    # ---- what differs ------------------------------------------------------------------------------------

    @abstractmethod
    def _unregister(self, memory: Memory) -> bool:
        """Nobody can write to it any more. False: not now."""

    @abstractmethod
    def _settled(self, peer: P) -> bool:
        """Nothing that this peer, whose process has ended, has sent is still to land here."""

    def _part(self, peer: P) -> None:
        """It was disconnected."""

    def _closing(self) -> None:
        """The threads have ended, or do not come back; regions and peers are forgotten next."""

    # ---- our memory --------------------------------------------------------------------------------------

    def register(self, memory: Memory) -> Region:
        self._check_open()
        self._bury()
        told = self._retired.get(memory, set())
        region = super().register(memory)
        if left := told - self._peers.keys():  # it was retired, and they know it still
            self._left.setdefault(memory, set()).update(left)
        return region

    def _withdraw(self, region: Region) -> None:
        known = {instance for instance, peer in self._peers.items() if not peer.gone}
        known |= self._left.pop(region.memory, set()) | self._retired.get(region.memory, set())
        self._retired[region.memory] = known
        self._bury()

    def _let_go(self, instance: bytes) -> None:
        """A peer is over: unregister what was kept for it alone. What no peer was told of is kept until the end."""
        self._parted.pop(instance, None)
        for memory, left in list(self._left.items()):
            left.discard(instance)
            if not left:
                del self._left[memory]
        for memory, told in list(self._retired.items()):
            if instance in told:
                told.discard(instance)
                if not told and self._unregister(memory):
                    del self._retired[memory]

    def _bury(self) -> None:
        """Let go of what was kept for peers that were disconnected and are gone by now."""
        for peer in list(self._parted.values()):
            self._is_gone(peer)

    # ---- peers -------------------------------------------------------------------------------------------

    def _watch(self, told: Told) -> ProcessWatch | None:
        """A watch on a peer's process, where it is seen here alive. All instances of a process share it: it is an open
        file, and peers come and go."""
        if not self._host.shares_pids(told.host):
            return None
        watch = self._watches.get((told.pid, told.started))
        if watch is None or watch.ended():
            watch = watch_living(told.pid, told.started)
            if watch is not None:
                self._watches[told.pid, told.started] = watch
        return watch

    def disconnect(self, peer: Any) -> None:
        self._check_process()
        self._check_peer(peer)
        if peer.connected:
            peer.connected = False
            self._peers.pop(peer.instance, None)
            if not self._closed:
                self._part(peer)
                self._remember(peer)
                self._bury()

    def _remember(self, peer: P) -> None:
        """A peer that was disconnected: nobody but its end keeps it from writing to what it knows."""
        if self._is_gone(peer):
            return
        mark = peer.instance if peer.provable else FOR_GOOD
        for region in self._live.values():
            self._left.setdefault(region.memory, set()).add(mark)
        for told in self._retired.values():
            if peer.instance in told:
                told.remove(peer.instance)
                told.add(mark)
        if peer.provable and any(mark in told for told in (*self._left.values(), *self._retired.values())):
            self._parted.setdefault(peer.instance, peer)

    def peer_state(self, peer: Any) -> PeerState:
        """GONE: the peer's process has ended and nothing that it sent is still to land here. UNKNOWN for peers of other
        hosts, always."""
        self._check_process()
        self._check_peer(peer)
        if not self._closed:
            self._bury()
        if self._is_gone(peer):
            return PeerState.GONE
        if peer.target.watch is None or peer.target.ended():
            return PeerState.UNKNOWN
        return PeerState.ALIVE

    def _is_gone(self, peer: P) -> bool:
        """It is proved. What was kept for it alone is then let go of."""
        if not peer.gone and peer.provable and peer.target.ended() and self._settled(peer):
            peer.gone = True
            if not self._closed:
                self._let_go(peer.instance)
        return peer.gone

    # ---- writing -----------------------------------------------------------------------------------------

    def _source(self, copy: Copy) -> Memory:
        if not isinstance(copy.local, Region) and copy.local.kind in self.capabilities.memory_kinds:
            raise Unsupported("the local side of a copy has to lie in a registered region", transport=self.name)
        return super()._source(copy)

    def _target(self, peer: HostPeer, remote: RemoteRegion) -> tuple[int, object]:
        assert isinstance(peer, EnginePeer)
        if peer.target.ended():
            raise TransportError("the peer's process has ended", transport=self.name)
        key = (remote.id, remote.generation)
        nbytes = peer.regions.get(key)
        if nbytes is None:
            raise OutOfBounds(
                f"the peer has no live region {remote.id} of generation {remote.generation}", transport=self.name
            )
        return nbytes, peer.addresses[key]

    def on_progress(self, wake: Callable[[], None]) -> None:
        self._check_open()
        self._threads.bell.wake = wake

    def cancel(self, handle: int) -> None:
        """What is not submitted yet never will be; what is, ends as it does."""
        super().cancel(handle)
        self._threads.nudge()

    # ---- the end -----------------------------------------------------------------------------------------

    def close(self) -> None:
        """Submit no more, wait half a second for what is under way, end the engine.

        A handle can be polled afterwards: DONE; FAILED, where some of it was never submitted; UNKNOWN, where the engine
        ended before it.
        """
        if self._closed or os.getpid() != self._pid:  # a forked child has neither the threads nor the right
            return
        self._closed = True
        if not self._threads.close(CLOSE_TIMEOUT_S):
            log.error("%s: the engine did not end within %g s; its memory stays mapped", self.name, CLOSE_TIMEOUT_S)
        self._closing()
        self._live.clear()
        self._peers.clear()
        self._retired.clear()
        self._left.clear()
        self._parted.clear()


_employed: weakref.WeakKeyDictionary[Threads, str] = weakref.WeakKeyDictionary()


def _end_all() -> None:
    """At exit: no thread may be inside an engine when the interpreter goes, it would abort the process."""
    for threads, name in list(_employed.items()):
        if not threads.close(CLOSE_TIMEOUT_S):
            log.error("%s: the engine did not end within %g s of the exit", name, CLOSE_TIMEOUT_S)


atexit.register(_end_all)
