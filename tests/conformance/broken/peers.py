"""Broken in what happens when a peer ends, stops or is cut off. On `shm`: a peer has to be a process to end as one."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

from broken.catalogue import broken
from broken.pids import KnowsPids, stopped
from tensorferry.backends._copier import Batch
from tensorferry.backends.memory import MemoryTransport
from tensorferry.backends.shm import ShmTransport
from tensorferry.core.transport import Copy, PeerState, Status


def gone(transport: ShmTransport, peer: Any) -> bool:
    return ShmTransport.peer_state(transport, peer) is PeerState.GONE


@broken({"FEN-3": "not GONE", "PEE-1": "still says ALIVE"})
class NeverNoticesDeath(ShmTransport):
    def peer_state(self, peer: Any) -> PeerState:
        state = super().peer_state(peer)
        return PeerState.ALIVE if state is PeerState.GONE and not peer.link.closed else state


@broken({"FEN-5": "GONE of a peer that is stopped"})
class BuriesTheStopped(KnowsPids):
    """A process that is stopped is dead to it."""

    def peer_state(self, peer: Any) -> PeerState:
        state = super().peer_state(peer)
        return PeerState.GONE if stopped(self._pids[peer.instance]) else state


@broken({"PEE-2": "DONE", "PEE-3": "DONE"})
class WritesToTheDead(ShmTransport):
    """A post to a process that has ended is DONE: its memory is still mapped here."""

    def post(self, peer: Any, copies: Sequence[Copy]) -> int:
        self._check_open()
        self._check_peer(peer)
        if copies and peer.connected and gone(self, peer):
            handle = next(self._handles)
            self._batches[handle] = Batch((), ())
            self._batches[handle].status = Status.DONE
            return handle
        return super().post(peer, copies)


@broken({"PEE-3": "says GONE, and a post to the peer ended DONE", "PEE-7": "was not placed"})
class WritesToTheClosed(MemoryTransport):
    def post(self, peer: Any, copies: Sequence[Copy]) -> int:
        self._check_open()
        self._check_peer(peer)
        if copies and peer.connected and not peer.there.open:
            handle = next(self._handles)
            self._batches[handle] = Batch((), ())
            self._batches[handle].status = Status.DONE
            return handle
        return super().post(peer, copies)


@broken({"PEE-4": "FAILED"})
class StopsWithItsPeers(ShmTransport):
    """One dead peer, and what is posted to others fails."""

    def _start(self, peer: Any, batch: Any, plan: Any) -> None:
        dead = any(gone(self, other) for other in self._peers.values())
        alive = any(not gone(self, other) for other in self._peers.values() if other is not peer)
        if dead and alive:
            self._copier.finish(batch, Status.FAILED)
        else:
            super()._start(peer, batch, plan)


@broken({"PEE-5": "took"})
class WaitsForTheStopped(KnowsPids):
    def disconnect(self, peer: Any) -> None:
        if peer.connected and stopped(self._pids[peer.instance]):
            time.sleep(5.5)
        super().disconnect(peer)


@broken({"FEN-6": "something landed after peer_state had said"})
class DeliversForTheDead(ShmTransport):
    """What it had taken in for a peer it writes out after it has said that the peer is gone."""

    def peer_state(self, peer: Any) -> PeerState:
        state = super().peer_state(peer)
        late = [region.memory for region in self._live.values() if region.memory.nbytes == 8 << 20]
        if state is PeerState.GONE and late and not peer.link.closed:
            timer = threading.Timer(0.02, late[0].view().__setitem__, (0, 1))
            timer.daemon = True
            timer.start()
        return state


@broken({"PEE-6": "while its peer was stopped, and DONE afterwards"})
class GivesUpOnTheStopped(KnowsPids):
    """A time-out runs while the peer is stopped, and is forgotten when it goes on."""

    def post(self, peer: Any, copies: Sequence[Copy]) -> int:
        handle = super().post(peer, copies)
        self._whose = {**getattr(self, "_whose", {}), handle: self._pids[peer.instance]}
        return handle

    def poll(self, handle: int) -> Status:
        status = super().poll(handle)
        many = len(self._batches) == 24  # one look at the process for each of many polls is slow
        return Status.FAILED if many and stopped(self._whose[handle]) else status


@broken({"PEE-8": "DONE"})
class CompletesWhatWasLost(MemoryTransport):
    """What is posted while the link is cut goes nowhere, and is DONE when the link comes back."""

    is_cut = False

    def post(self, peer: Any, copies: Sequence[Copy]) -> int:
        if not self.is_cut:
            return super().post(peer, copies)
        handle = next(self._handles)
        self._batches[handle] = Batch((), ())
        return handle

    def cut(self) -> None:
        self.is_cut = True

    def heal(self) -> None:
        self.is_cut = False
        for batch in self._batches.values():
            if batch.status is Status.PENDING and not batch.segments:
                batch.status = Status.DONE
