"""Broken in what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from broken.catalogue import broken
from tensorferry.backends._copier import Batch
from tensorferry.backends.memory import MemoryPeer, MemoryTransport
from tensorferry.core.errors import OutOfBounds
from tensorferry.core.memory import Memory
from tensorferry.core.transport import Capabilities, Copy, Region, RemoteRegion, Status


class Forgives(MemoryTransport):
    """Posts what `forgive` makes of a batch. Nothing left of it is DONE at once."""

    def post(self, peer: Any, copies: Sequence[Copy]) -> int:
        self._check_open()
        self._check_peer(peer)
        kept = self.forgive(peer, list(copies))
        if copies and not kept:
            handle = next(self._handles)
            self._batches[handle] = Batch((), ())
            self._batches[handle].status = Status.DONE
            return handle
        return super().post(peer, kept)

    def forgive(self, peer: Any, copies: list[Copy]) -> list[Copy]:
        raise NotImplementedError

    def size_of(self, peer: Any, remote: RemoteRegion) -> int:
        try:
            return self._target(peer, remote)[0]
        except OutOfBounds:
            return -1


@broken(
    {
        "BND-1": "4097. of a region of 4096 bytes was not refused",
        "BND-3": "was not refused",
        "BND-6": "one byte too far",
    }
)
class AllowsOneByteMore(Forgives):
    """Off by one at a region's end. (The byte goes nowhere: this process is to live on.)"""

    def forgive(self, peer: Any, copies: list[Copy]) -> list[Copy]:
        return [
            replace(c, nbytes=c.nbytes - 1)
            if c.nbytes > 1 and c.remote_offset + c.nbytes == self.size_of(peer, c.remote) + 1
            else c
            for c in copies
        ]


@broken({"BND-2": "was not refused", "BND-6": "a byte past its source was not refused"})
class ReadsOneByteMore(Forgives):
    def forgive(self, peer: Any, copies: list[Copy]) -> list[Copy]:
        return [
            replace(c, nbytes=c.nbytes - 1)
            if c.nbytes > 1 and c.local_offset + c.nbytes == _memory(c).nbytes + 1
            else c
            for c in copies
        ]


@broken({"BND-3": "was not refused"})
class WritesAcrossNeighbours(Forgives):
    """Looks at addresses, and finds both ends in memory that is registered."""

    def forgive(self, peer: Any, copies: list[Copy]) -> list[Copy]:
        return [piece for copy in copies for piece in self._split(peer, copy)]

    def _split(self, peer: Any, copy: Copy) -> list[Copy]:
        nbytes = self.size_of(peer, copy.remote)
        over = copy.remote_offset + copy.nbytes - nbytes
        if nbytes < 0 or not 0 < over < copy.nbytes or copy.remote_offset < 0:
            return [copy]
        here = peer.there.regions[copy.remote.id, copy.remote.generation].memory
        for region in list(peer.there.regions.values()):
            if region.memory.address == here.address + nbytes and over <= region.memory.nbytes:
                inside = copy.nbytes - over
                return [
                    replace(copy, nbytes=inside),
                    Copy(copy.local, copy.local_offset + inside, RemoteRegion(region.id, region.generation), 0, over),
                ]
        return [copy]


@broken(
    {
        "BND-4": "not there, was not refused",
        "BND-6": "unknown region was not refused",
        "BND-12": "to a region that is retired, .* was not placed",
        "ERR-8": "was not refused",
    }
)
class FindsARegionForEveryNumber(MemoryTransport):
    def _target(self, peer: Any, remote: RemoteRegion) -> tuple[int, Memory]:
        ids = [number for number, _ in peer.there.regions]
        if remote.id not in ids and ids and remote.generation <= max(g for _, g in peer.there.regions):
            remote = RemoteRegion(*next(iter(peer.there.regions)))
        return super()._target(peer, remote)


@broken(
    {"BND-5": "generation 2 of a region of generation 1", "BND-6": "another generation", "CON-4": "was not refused"}
)
class IgnoresTheGeneration(MemoryTransport):
    def _target(self, peer: Any, remote: RemoteRegion) -> tuple[int, Memory]:
        live = [key for key in peer.there.regions if key[0] == remote.id]
        return super()._target(peer, RemoteRegion(*live[0]) if live else remote)


@broken({"BND-6": "moved|touched|landed|wrote"})
class WritesWhatCameBeforeTheWrongOne(MemoryTransport):
    def post(self, peer: Any, copies: Sequence[Copy]) -> int:
        try:
            return super().post(peer, copies)
        except OutOfBounds:
            for n in range(len(copies) - 1, 0, -1):
                if self._good(peer, copies[:n]):
                    break
            raise

    def _good(self, peer: Any, copies: Sequence[Copy]) -> bool:
        try:
            super().post(peer, copies)
        except OutOfBounds:
            return False
        return True


@broken({"BND-7": "was not refused"})
class CutsLongBatches(Forgives):
    def forgive(self, peer: Any, copies: list[Copy]) -> list[Copy]:
        return copies[: self.capabilities.max_copies]


@broken({"BND-8": "was not refused"})
class SkipsNegativeLengths(Forgives):
    def forgive(self, peer: Any, copies: list[Copy]) -> list[Copy]:
        return [copy for copy in copies if copy.nbytes >= 0]


@broken({"XFR-15": "a copy of no bytes wrote"})
class TakesNoBytesForOne(Forgives):
    def forgive(self, peer: Any, copies: list[Copy]) -> list[Copy]:
        return [replace(c, nbytes=1) if not c.nbytes and c.remote_offset < 4096 else c for c in copies]


@broken({"BND-9": "was not refused"})
class ReadsAnyKind(Forgives):
    def forgive(self, peer: Any, copies: list[Copy]) -> list[Copy]:
        return [replace(c, local=replace(c.local, kind="cpu")) if isinstance(c.local, Memory) else c for c in copies]


@broken({"BND-10": "was not refused"})
class ReadsWhatIsRetired(Forgives):
    def forgive(self, peer: Any, copies: list[Copy]) -> list[Copy]:
        return [replace(c, local=c.local.memory) if isinstance(c.local, Region) else c for c in copies]


@broken({"BND-11": "was not refused"})
class ReadsWhatIsNotRegistered(MemoryTransport):
    capabilities: Capabilities = replace(MemoryTransport.capabilities, registers_sources=True)  # type: ignore[misc]


@broken({"BND-12": "DONE"})
class IsDoneWithWhatIsRetired(Forgives):
    """Knows the region from the descriptor; the owner has retired it; nobody minds."""

    def forgive(self, peer: Any, copies: list[Copy]) -> list[Copy]:
        gone = [key for key in peer.regions if key not in peer.there.regions]
        return [c for c in copies if not (peer.there.open and (c.remote.id, c.remote.generation) in gone)]


def _memory(copy: Copy) -> Memory:
    return copy.local.memory if isinstance(copy.local, Region) else copy.local


@broken({"BND-12": "copy 0 of 2, to a region that is retired, .* was not placed"})
class IsDoneThoughACopyFailed(MemoryTransport):
    """A copy before the last that cannot be placed any more is passed over: the last one's outcome is the batch's."""

    def post(self, peer: Any, copies: Sequence[Copy]) -> int:
        return super().post(peer, [c for c in copies[:-1] if not self._retired(peer, c.remote)] + list(copies[-1:]))

    def _retired(self, peer: Any, remote: RemoteRegion) -> bool:
        key = (remote.id, remote.generation)
        told = isinstance(peer, MemoryPeer) and key in peer.regions
        return told and key not in peer.there.regions
