"""Broken in moving bytes."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from broken.catalogue import broken
from tensorferry.backends._copier import Batch
from tensorferry.backends.memory import MemoryTransport
from tensorferry.conformance.fault_policy import Policy
from tensorferry.conformance.faults import FaultProxy
from tensorferry.core.errors import OutOfBounds, TransportError, Unsupported
from tensorferry.core.memory import Memory
from tensorferry.core.transport import Copy, Region, Status


class Bends(MemoryTransport):
    """Checks a batch as it should, and writes what `bend` makes of it: (target, offset, source address, bytes)."""

    def _start(self, peer: Any, batch: Batch, plan: list[tuple[Any, int, int, int]]) -> None:
        super()._start(peer, batch, self.bend(plan))

    def bend(self, plan: list[tuple[Any, int, int, int]]) -> list[tuple[Any, int, int, int]]:
        raise NotImplementedError


@broken({"XFR-1": "65537 bytes .* was not placed"})
class DropsTheLastByte(Bends):
    """Of lengths that are one more than its chunks."""

    def bend(self, plan: Any) -> Any:
        return [(to, at, source, n - (n == 65_537)) for to, at, source, n in plan]


@broken(
    {
        "XFR-2": "from local offset 1 are not",
        "XFR-4": "was not placed",
        "XFR-8": "placed",
        "XFR-12": "placed",
    },
    may={"VIS-1"},
)
class IgnoresLocalOffsets(MemoryTransport):
    """Of short copies it rounds them down to whole cache lines."""

    def _source(self, copy: Copy) -> Memory:
        memory = super()._source(copy)
        return replace(memory, address=memory.address - (copy.local_offset % 64 if copy.nbytes < 1 << 20 else 0))


@broken(
    {
        "XFR-3": "to remote offset 1 are not there",
        "XFR-5": "touched others",
        "XFR-7": "last byte",
        "ORD-2": "own bytes are not placed",
    }
)
class IgnoresRemoteOffsets(Bends):
    """The smallest of them: what is less than a cache line into a region counts as its beginning."""

    def bend(self, plan: Any) -> Any:
        return [(to, 0 if at < 64 and len(plan) == 1 else at, source, n) for to, at, source, n in plan]


@broken({"XFR-4": r"copy \d of the batch is there instead|was not placed", "XFR-8": "was not placed"})
class SwapsTwoCopies(Bends):
    def bend(self, plan: Any) -> Any:
        if len(plan) < 10:
            return plan
        (a, at_a, from_a, n_a), (b, at_b, from_b, n_b), *rest = plan
        return [(a, at_a, from_b, n_a), (b, at_b, from_a, n_b), *rest] if n_a == n_b else plan


@broken({"XFR-5": "touched others"})
class WritesWholeLines(Bends):
    """Of 63 bytes it makes a cache line."""

    def bend(self, plan: Any) -> Any:
        return [(to, at, source, n + (n == 63 and at + n < to.nbytes)) for to, at, source, n in plan]


@broken({"XFR-6": "the source .*was changed"})
class ClearsTheSource(MemoryTransport):
    def post(self, peer: Any, copies: Sequence[Copy]) -> int:
        handle = super().post(peer, copies)
        self._sources = getattr(self, "_sources", {})
        if len(copies) == 1 and copies[0].nbytes == 1 << 20:
            self._sources[handle] = self._source(copies[0])
        return handle

    def release(self, handle: int) -> None:
        super().release(handle)
        if handle in self._sources:
            self._sources.pop(handle).view()[0] ^= 1


@broken({"XFR-7": "last byte of a region of 100 bytes was refused"})
class CannotReachTheLastByte(MemoryTransport):
    def post(self, peer: Any, copies: Sequence[Copy]) -> int:
        for copy in copies:
            if copy.nbytes == 1 and copy.remote_offset:
                nbytes, _ = self._target(peer, copy.remote)
                if nbytes == 100 and copy.remote_offset == nbytes - 1:
                    raise OutOfBounds("past the end of the region", transport=self.name)
        return super().post(peer, copies)


@broken({"XFR-8": "batch of 1024 copies"})
class LosesTheThousandAndFirst(Bends):
    def bend(self, plan: Any) -> Any:
        return plan[:1000]


@broken({"XFR-9": "was not placed"})
class StopsAtItsPreferredSize(Bends):
    def bend(self, plan: Any) -> Any:
        most = self.capabilities.preferred_post_bytes
        return [(to, at, source, min(n, 2 * most) if n < 3 * most else n) for to, at, source, n in plan]


@broken({"XFR-10": "post waits for the bytes"})
class CopiesInPost(MemoryTransport):
    def post(self, peer: Any, copies: Sequence[Copy]) -> int:
        handle = super().post(peer, copies)
        if sum(copy.nbytes for copy in copies) > 16 << 20:
            _until(lambda: self.drained(handle), 5)
        return handle


@broken({"XFR-10": r"quickest of five posts of one byte took"})
class IsSlowToPost(MemoryTransport):
    def post(self, peer: Any, copies: Sequence[Copy]) -> int:
        handle = super().post(peer, copies)
        self._slow = getattr(self, "_slow", 0) + 1
        if self._slow <= 5 and copies[0].nbytes == 1 and self._target(peer, copies[0].remote)[0] == 64:
            time.sleep(0.25)
        return handle


@broken({"XFR-20": "poll waits for the bytes"})
class WaitsInPoll(MemoryTransport):
    def poll(self, handle: int) -> Status:
        batch = self._batch(handle)
        if len(batch.segments) > 3 and sum(n for *_, n in batch.segments) > 16 << 20:
            _until(lambda: batch.drained, 5)
        return super().poll(handle)


@broken(
    {
        "XFR-5": "touched others",
        "XFR-10": "post waits for the bytes",
        "XFR-11": "something landed after all posts were DONE",
        "FEN-4": "something landed after",
        "RES-3": "leaves? .* bytes behind",
    },
    may={"CON-3"},
)
class WritesTwice(FaultProxy):
    inner_type = MemoryTransport
    policy = Policy.scripted("again late=3")
    name, options_type = MemoryTransport.name, MemoryTransport.options_type
    capabilities = MemoryTransport.capabilities


@broken({"XFR-12": "Unsupported"})
class ReadsNoRegions(MemoryTransport):
    def _source(self, copy: Copy) -> Memory:
        memory = super()._source(copy)
        if isinstance(copy.local, Region):
            raise Unsupported("only plain memory is read", transport=self.name)
        return memory


@broken({"XFR-13": "the copy for region"})
class WritesToOneRegion(Bends):
    def bend(self, plan: Any) -> Any:
        return [(plan[0][0] if at + n <= plan[0][0].nbytes else to, at, source, n) for to, at, source, n in plan]


@broken({"XFR-14": "a post of no copies was not refused"})
class TakesNothing(MemoryTransport):
    def post(self, peer: Any, copies: Sequence[Copy]) -> int:
        if not copies and not self._closed:
            handle = next(self._handles)
            self._batches[handle] = Batch((), ())
            self._batches[handle].status = Status.DONE
            return handle
        return super().post(peer, copies)


@broken({"XFR-16": "of the same source"})
class ReadsASourceOnce(Bends):
    def bend(self, plan: Any) -> Any:
        return list({(source, n): (to, at, source, n) for to, at, source, n in reversed(plan)}.values())


@broken({"XFR-17": "does not have what was posted to it"})
class MixesUpPeers(Bends):
    """Knows a region by its number and generation, whoever has it."""

    def _target(self, peer: Any, remote: Any) -> Any:
        nbytes, memory = super()._target(peer, remote)
        for other in self._peers.values():
            region = other.there.regions.get((remote.id, remote.generation))
            if region is not None and region.memory.nbytes == nbytes and other.there is not self._me:
                return nbytes, region.memory
        return nbytes, memory

    def bend(self, plan: Any) -> Any:
        return plan


_joined: set[tuple[int, int]] = set()


@broken({"XFR-18": "the peer writes to us already"})
class WritesOneWay(MemoryTransport):
    """Whoever is connected to from there cannot write much to there."""

    def connect(self, descriptor: bytes) -> Any:
        peer = super().connect(descriptor)
        _joined.add((id(self._me), id(peer.there)))
        return peer

    def post(self, peer: Any, copies: Sequence[Copy]) -> int:
        if copies and copies[0].nbytes == 4 << 20 and (id(peer.there), id(self._me)) in _joined:
            raise TransportError("the peer writes to us already", transport=self.name)
        return super().post(peer, copies)


@broken({"XFR-19": "given twice"})
class HasFewHandles(MemoryTransport):
    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self._handles = itertools.cycle(range(1, 65))  # type: ignore[assignment]


@broken({"ORD-2": "own bytes are not placed"})
class LeavesOutWhatIsReplaced(MemoryTransport):
    """A post to bytes to which a newer one goes is not made: the newer replaces it, or so it thinks."""

    def _start(self, peer: Any, batch: Any, plan: list[tuple[Any, int, int, int]]) -> None:
        line = self._line = getattr(self, "_line", [])
        line.append((peer, batch, plan))
        timer = threading.Timer(0.004, self._next)
        timer.daemon = True
        timer.start()

    def _next(self) -> None:
        peer, batch, plan = self._line.pop(0)
        (memory, start, _, nbytes), newer = plan[0], [plan[0] for _, _, plan in list(self._line) if len(plan) == 1]
        replaced = any(m is memory and s < start + nbytes and start < s + n for m, s, _, n in newer)
        if len(plan) == 1 and nbytes == 1 << 18 and replaced:
            self._copier.finish(batch, Status.DONE)
        else:
            super()._start(peer, batch, plan)


@broken({"ORD-1": "do not stand there"})
class RemembersWhatItWrote(Bends):
    """And does not write it again."""

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self._wrote: set[Any] = set()

    def bend(self, plan: Any) -> Any:
        fresh = [step for step in plan if (id(step[0]), *step[1:]) not in self._wrote or step[3] != 100_000]
        self._wrote |= {(id(step[0]), *step[1:]) for step in plan}
        return fresh


def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.0005)
