"""Broken in what poll, drained, release, cancel and flush say and do, and in the fences."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from correct import Flushing

from broken.catalogue import broken
from broken.pids import KnowsPids
from tensorferry.backends._copier import memmove
from tensorferry.backends.memory import MemoryTransport
from tensorferry.backends.shm import ShmTransport
from tensorferry.backends.tcp import TcpTransport
from tensorferry.core.errors import BadCall
from tensorferry.core.transport import Copy, Fence, PeerState, Region, Status


@broken({"VIS-1": "DONE was said before all was to be seen"})
class IsDoneTooEarly(MemoryTransport):
    """Long posts are DONE when they are posted, and copied a while after."""

    def _is_long(self, handle: int) -> bool:
        return handle in getattr(self, "_long", ())

    def post(self, peer: Any, copies: Sequence[Copy]) -> int:
        long = len(copies) == 2 and sum(copy.nbytes for copy in copies) == 2 << 20
        self._late = long
        handle = super().post(peer, copies)
        if long:
            self._long = {*getattr(self, "_long", ()), handle}
        return handle

    def _start(self, peer: Any, batch: Any, plan: Any) -> None:
        if self._late:
            timer = threading.Timer(0.2, super()._start, (peer, batch, plan))
            timer.daemon = True
            timer.start()
        else:
            super()._start(peer, batch, plan)

    def poll(self, handle: int) -> Status:
        status = super().poll(handle)
        return Status.DONE if self._is_long(handle) and status is Status.PENDING else status

    def release(self, handle: int) -> None:
        if self._is_long(handle):
            self._batch(handle)
            self._long.discard(handle)
            del self._batches[handle]
        else:
            super().release(handle)


@broken({"VIS-2": "DONE"}, may={"PEE-2", "PEE-4", "PEE-6"})
class IsDoneBeforeTheOtherProcessSeesIt(KnowsPids):
    """Between processes, the bytes come a while after DONE."""

    def _start(self, peer: Any, batch: Any, plan: Any) -> None:
        if self._pids[peer.instance] == self._pid:
            super()._start(peer, batch, plan)
            return
        timer = threading.Timer(0.5, super()._start, (peer, batch, plan))
        timer.daemon = True
        timer.start()
        self._early = {*getattr(self, "_early", set()), id(batch)}

    def poll(self, handle: int) -> Status:
        status = super().poll(handle)
        early = id(self._batches[handle]) in getattr(self, "_early", set())
        return Status.DONE if early and status is Status.PENDING else status


@broken({"VIS-3": "flush .*raised BadCall"})
class FlushesOnlyWhatWasWritten(MemoryTransport):
    capabilities = replace(MemoryTransport.capabilities, needs_flush=True)

    def flush(self, region: Region) -> None:
        self._check_open()
        view = region.memory.view()
        if len(view) == 1 << 20 and bytes(view) == bytes(view[:1]) * len(view):  # as the suite filled it
            raise BadCall("nothing was written to this region", transport=self.name)


@broken({"ERR-1": "was DONE, and .*PENDING", "CAN-2": "was DONE, and after a cancel it is"})
class ForgetsThatItWasDone(MemoryTransport):
    def poll(self, handle: int) -> Status:
        status = super().poll(handle)
        self._asked = getattr(self, "_asked", {})
        if status is Status.DONE:
            self._asked[handle] = self._asked.get(handle, 0) + 1
        return Status.PENDING if self._asked.get(handle) == 3 else status


@broken({"ERR-2": "is DONE and not drained", "CAN-2": "not drained"}, may={"RES-4"})
class IsDoneAndNotDrained(MemoryTransport):
    def drained(self, handle: int) -> bool:
        answer = super().drained(handle)
        self._told = getattr(self, "_told", set())
        first = handle not in self._told
        self._told.add(handle)
        return answer and not first

    def release(self, handle: int) -> None:
        super().release(handle)
        self._told = getattr(self, "_told", set()) - {handle}


# ERR-9 asks a third time only where a write ends between two of its questions.
@broken({"ERR-3": "was drained, and is not any more", "CAN-2": "not drained"}, may={"ERR-2", "ERR-9"})
class UndoesDrained(MemoryTransport):
    def drained(self, handle: int) -> bool:
        answer = super().drained(handle)
        self._times = getattr(self, "_times", {})
        self._times[handle] = self._times.get(handle, 0) + answer
        return answer and self._times[handle] != 3


@broken({"ERR-4": "released"})
class AnswersForReleasedHandles(MemoryTransport):
    def release(self, handle: int) -> None:
        super().release(handle)
        self._over = [*getattr(self, "_over", [])[-9:], handle]

    def poll(self, handle: int) -> Status:
        return Status.DONE if handle in getattr(self, "_over", []) else super().poll(handle)


@broken({"ERR-5": "release"})
class ReleasesWhatIsNotDrained(MemoryTransport):
    def release(self, handle: int) -> None:
        self._batch(handle)
        del self._batches[handle]


@broken({"ERR-6": "after a cancel, .* is DONE, and not all is placed", "CAN-1": "is DONE, and not all is placed"})
class CallsCancelledDone(MemoryTransport):
    """And with it, batches of which one copy was not made."""

    def poll(self, handle: int) -> Status:
        status = super().poll(handle)
        return Status.DONE if status is Status.FAILED and self._batches[handle].cancelled else status


@broken({"ERR-7": "landed", "FEN-4": "landed"})
class FailsAndWrites(MemoryTransport):
    """A cancelled post is FAILED at once, and its bytes land all the same."""

    def cancel(self, handle: int) -> None:
        self._batch(handle)
        self._ended = {*getattr(self, "_ended", set()), handle} if not super().drained(handle) else self._cut()

    def _cut(self) -> set[int]:
        return getattr(self, "_ended", set())

    def poll(self, handle: int) -> Status:
        status = super().poll(handle)
        return Status.FAILED if handle in self._cut() else status

    def drained(self, handle: int) -> bool:
        return super().drained(handle) or handle in self._cut()


# ---- fences --------------------------------------------------------------------------------------------------


@broken({"FEN-1": "landed"})
class RetiresWithoutWaiting(MemoryTransport):
    """Declares that retire is a fence. It is none."""

    capabilities = replace(MemoryTransport.capabilities, fences=MemoryTransport.capabilities.fences | {Fence.RETIRE})


@broken({"FEN-2": "after its link was cut, an UNKNOWN handle is not drained"})
class NeverDrainsTheUnknown(MemoryTransport):
    """What was under way when the link was cut is lost for good."""

    lost: frozenset[int] = frozenset()

    def cut(self) -> None:
        poll = super().poll
        self.lost |= {handle for handle in self._batches if poll(handle) is Status.PENDING}

    def poll(self, handle: int) -> Status:
        status = super().poll(handle)
        return Status.UNKNOWN if handle in self.lost else status

    def drained(self, handle: int) -> bool:
        return super().drained(handle) and handle not in self.lost


@broken({"FEN-4": "landed"}, may={"XFR-21"})
class SaysDrainedAtOnce(MemoryTransport):
    def drained(self, handle: int) -> bool:
        super().drained(handle)
        return True


@broken({"FEN-5": "says GONE of a peer that is open"})
class TakesSilenceForDeath(MemoryTransport):
    """GONE is whom nothing was posted to for a while."""

    def connect(self, descriptor: bytes) -> Any:
        peer = super().connect(descriptor)
        self._heard = {**getattr(self, "_heard", {}), peer.instance: time.monotonic()}
        return peer

    def peer_state(self, peer: Any) -> PeerState:
        state = super().peer_state(peer)
        return PeerState.GONE if time.monotonic() - self._heard[peer.instance] > 0.25 else state


@broken({"FEN-7": "GONE"}, may={"PEE-2", "PEE-3"})
class RaisesTheDead(ShmTransport):
    def peer_state(self, peer: Any) -> PeerState:
        state = super().peer_state(peer)
        self._gone = getattr(self, "_gone", 0) + (state is PeerState.GONE)
        return PeerState.UNKNOWN if state is PeerState.GONE and self._gone % 2 == 0 else state


# ---- cancel --------------------------------------------------------------------------------------------------


@broken({"CAN-1": "still|did not end|PENDING"}, may={"ERR-1"})
class NeverEndsTheCancelled(MemoryTransport):
    def poll(self, handle: int) -> Status:
        status = super().poll(handle)
        return Status.PENDING if self._batches[handle].cancelled and status is Status.FAILED else status


@broken({"CAN-2": "DONE"})
class CancelsTheEnded(MemoryTransport):
    def cancel(self, handle: int) -> None:
        super().cancel(handle)
        self._batches[handle].status = Status.FAILED


@broken({"CAN-3": "was not refused"})
class CancelsAnything(MemoryTransport):
    def cancel(self, handle: int) -> None:
        if handle in self._batches:
            super().cancel(handle)


@broken({"CAN-4": "others|another|DONE|FAILED"})
class CancelsAll(MemoryTransport):
    def cancel(self, handle: int) -> None:
        super().cancel(handle)
        for batch in self._batches.values():
            batch.cancelled = True


# ---- threads and waking --------------------------------------------------------------------------------------


@broken({"THR-1": "thread"})
class LosesTrackOfThreads(MemoryTransport):
    """Declares that it may be called from several threads, and gives two of them the same handle."""

    capabilities = replace(MemoryTransport.capabilities, thread_safe=True)

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self._next = 0

    def post(self, peer: Any, copies: Sequence[Copy]) -> int:
        number = self._next
        real = super().post(peer, copies)
        time.sleep(0.0005)
        self._next = number + 1
        self._batches[-number - 1] = self._batches.pop(real)
        time.sleep(0.0005)
        return -number - 1


@broken({"WAK-1": "nobody was woken", "WAK-2": "nobody was woken"})
class NeverWakes(MemoryTransport):
    def on_progress(self, wake: Callable[[], None]) -> None:
        self._check_open()


@broken({"WAK-1": "nobody was woken", "WAK-2": "nobody was woken"})
class LosesWakes(MemoryTransport):
    """Of those that come close together it passes on the first."""

    def on_progress(self, wake: Callable[[], None]) -> None:
        last = [0.0]

        def some() -> None:
            now = time.monotonic()
            if now - last[0] > 0.3:
                last[0] = now
                wake()

        super().on_progress(some)


@broken({"WAK-2": "after a close of the target's owner, . posts are FAILED and nobody was woken"})
class WakesForSuccessAlone(MemoryTransport):
    _wakes = False

    def on_progress(self, wake: Callable[[], None]) -> None:
        def some() -> None:
            if not any(batch.status is Status.FAILED for batch in list(self._batches.values())):
                wake()

        self._wakes = True
        super().on_progress(some)

    def _start(self, peer: Any, batch: Any, plan: Any) -> None:
        if self._wakes and len(plan) == 2:  # these are to be on their way when their target is closed
            timer = threading.Timer(0.5, super()._start, (peer, batch, plan))
            timer.daemon = True
            timer.start()
        else:
            super()._start(peer, batch, plan)


@broken({"WAK-5": "while the wake function runs, post waits"})
class WakesUnderItsLock(MemoryTransport):
    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self._mine = threading.Lock()

    def on_progress(self, wake: Callable[[], None]) -> None:
        def locked() -> None:
            with self._mine:
                wake()

        super().on_progress(locked)

    def post(self, peer: Any, copies: Sequence[Copy]) -> int:
        with self._mine:
            return super().post(peer, copies)


@broken({"WAK-3": "still|ended|PENDING|FAILED|raise"})
class StopsWhenWakingFails(MemoryTransport):
    def on_progress(self, wake: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                wake()
            except Exception:
                self._copier.stop()
                raise

        super().on_progress(guarded)


@broken({"WAK-4": "after close"})
class WakesAfterClose(MemoryTransport):
    def on_progress(self, wake: Callable[[], None]) -> None:
        super().on_progress(wake)
        self._wake = wake

    def close(self) -> None:
        super().close()
        timer = threading.Timer(0.05, getattr(self, "_wake", int))
        timer.daemon = True
        timer.start()


# ---- the source ----------------------------------------------------------------------------------------------


@broken({"ERR-9": "source_free was True, and is not any more"}, may={"XFR-21"})
class ReadsItsSourceAgain(MemoryTransport):
    """Says that the source is free, and not, by turns."""

    def source_free(self, handle: int) -> bool:
        self._free = {**getattr(self, "_free", {}), handle: getattr(self, "_free", {}).get(handle, 0) + 1}
        return super().source_free(handle) or self._free[handle] == 1


@broken({"ERR-9": "its source is not free"}, may={"XFR-21"})
class NeverFreesItsSource(MemoryTransport):
    def source_free(self, handle: int) -> bool:
        super().source_free(handle)
        return False


@broken({"XFR-21": "was read after source_free had answered True"})
class FreesItsSourceTooEarly(MemoryTransport):
    """As soon as it is posted; it is read a little later."""

    def _start(self, peer: Any, batch: Any, plan: Any) -> None:
        timer = threading.Timer(0.003, super()._start, (peer, batch, plan))
        timer.daemon = True
        timer.start()

    def source_free(self, handle: int) -> bool:
        super().source_free(handle)
        return True


@broken({"XFR-21": "was read after it was DONE"})
class ReadsWhenItIsFlushed(Flushing):
    """DONE is a promise: the bytes are fetched by the flush."""

    def _fetch(self, placed: tuple[Any, ...], live: Region) -> None:
        _, offset, nbytes, source = placed
        memmove(live.memory.address + offset, source, nbytes)


@broken({"ERR-5": "posts to a stopped process, release took .* that are not drained"})
class ReleasesTheUnknown(TcpTransport):
    def release(self, handle: int) -> None:
        if self.poll(handle) is not Status.UNKNOWN:
            super().release(handle)


@broken({"FEN-4": "was drained.* landed when the process went on|when its handle was drained"})
class DrainsTheUnknown(TcpTransport):
    def drained(self, handle: int) -> bool:
        return super().drained(handle) or self.poll(handle) is Status.UNKNOWN


@broken({"FEN-5": "of a peer that we have only disconnected"})
class BuriesWhatItForgets(MemoryTransport):
    def peer_state(self, peer: Any) -> PeerState:
        state = super().peer_state(peer)
        return state if peer.connected else PeerState.GONE
