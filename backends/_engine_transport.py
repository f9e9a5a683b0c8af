"""What the transports over an engine share, whichever it is.

A region stays registered when it is retired, for as long as a peer lives that was told of it: others' writes into it
end as they should, and a late one lands in memory that is still there. A peer is gone when its process has ended and
nothing that it sent is still on the way. Posts are carried out by threads that know nothing of the transport.
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
from tensorferry.backends._host import this_host
from tensorferry.backends._hostcopy import CLOSE_TIMEOUT_S, HostPeer, HostTransport
from tensorferry.core.errors import OutOfBounds, TransportError, Unsupported
from tensorferry.core.memory import Memory
from tensorferry.core.transport import Copy, Options, PeerState, Region, RemoteRegion

log = logging.getLogger("tensorferry.backends")


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

    def _withdraw(self, region: Region) -> None:
        self._retired[region.memory] = set(self._peers)

    def _let_go(self, instance: bytes) -> None:
        """A peer is over: unregister what was kept for it alone. What no peer was told of is kept until the end."""
        for memory, told in list(self._retired.items()):
            if instance in told:
                told.discard(instance)
                if not told and self._unregister(memory):
                    del self._retired[memory]

    # ---- peers -------------------------------------------------------------------------------------------

    def disconnect(self, peer: Any) -> None:
        self._check_process()
        self._check_peer(peer)
        if peer.connected:
            peer.connected = False
            self._peers.pop(peer.instance, None)
            if not self._closed:
                self._part(peer)
                self._let_go(peer.instance)

    def peer_state(self, peer: Any) -> PeerState:
        """GONE: the peer's process has ended and nothing that it sent is still to land here. UNKNOWN for peers of other
        hosts, always."""
        self._check_process()
        self._check_peer(peer)
        if peer.gone:
            return PeerState.GONE
        if peer.target.watch is None:
            return PeerState.UNKNOWN
        if not peer.target.ended():
            return PeerState.ALIVE
        if not peer.traceable or not self._settled(peer):
            return PeerState.UNKNOWN
        peer.gone = True
        if not self._closed:
            self._let_go(peer.instance)
        return PeerState.GONE

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


_employed: weakref.WeakKeyDictionary[Threads, str] = weakref.WeakKeyDictionary()


def _end_all() -> None:
    """At exit: no thread may be inside an engine when the interpreter goes, it would abort the process."""
    for threads, name in list(_employed.items()):
        if not threads.close(CLOSE_TIMEOUT_S):
            log.error("%s: the engine did not end within %g s of the exit", name, CLOSE_TIMEOUT_S)


atexit.register(_end_all)
