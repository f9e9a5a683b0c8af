"""Broken in opening, closing, and memory."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from broken.catalogue import broken
from tensorferry.backends._copier import Batch
from tensorferry.backends.memory import MemoryOptions, MemoryTransport
from tensorferry.core.errors import BadCall, Unsupported
from tensorferry.core.memory import Memory
from tensorferry.core.transport import Options, Region, Status


@broken({"LIF-1": "ended .*FAILED"})
class FailsItsFirstWrite(MemoryTransport):
    def post(self, peer: Any, copies: Any) -> int:
        handle = super().post(peer, copies)
        self._first = getattr(self, "_first", handle if 1 < copies[0].nbytes < 8 else 0)
        return handle

    def poll(self, handle: int) -> Status:
        status = super().poll(handle)
        return Status.FAILED if handle == self._first and status is Status.DONE else status


@broken({"LIF-2": "second close raised .*already"})
class CannotCloseTwice(MemoryTransport):
    def close(self) -> None:
        if self._closed:
            raise BadCall("it is closed already", transport=self.name)
        super().close()


@broken({"LIF-3": r"close with 8 posts in flight took 1\d"})
class WaitsInClose(MemoryTransport):
    def close(self) -> None:
        if sum(not batch.drained for batch in self._batches.values()) > 6 and not _waited:
            _waited.append(True)
            time.sleep(10.2)
        super().close()


_waited: list[bool] = []


@broken({"LIF-4": "after close, handle .* still says .*PENDING"}, may={"ERR-1"})
class ForgetsItsHandlesInClose(MemoryTransport):
    def poll(self, handle: int) -> Status:
        status = super().poll(handle)
        return Status.PENDING if self._closed and status is Status.FAILED else status


@broken({"LIF-5": "allocate after close was not refused"})
class AllocatesAfterClose(MemoryTransport):
    def allocate(self, nbytes: int, kind: str = "cpu") -> Memory:
        closed, self._closed = self._closed, False
        try:
            return super().allocate(nbytes, kind)
        finally:
            self._closed = closed


@broken({"LIF-8": "options of another type.* was not refused"})
class TakesAnyOptions(MemoryTransport):
    def __init__(self, options: Options) -> None:
        super().__init__(MemoryOptions())


@broken({"LIF-6": "in a forked child, describe answered"})
class WorksInAFork(MemoryTransport):
    def _check_process(self) -> None:
        pass


_kept: list[MemoryTransport] = []


@broken({"LIF-7": "threads go on"})
class KeepsItselfAlive(MemoryTransport):
    def register(self, memory: Memory) -> Region:
        region = super().register(memory)
        if self not in _kept:
            _kept.append(self)
            self._copier.submit(Batch((), ()))  # whose thread runs from now on
        return region

    def close(self) -> None:
        super().close()
        if self in _kept:
            _kept.remove(self)


# ---- memory --------------------------------------------------------------------------------------------------


@broken({"REG-1": "not aligned to 64"})
class AllocatesOffTheLine(MemoryTransport):
    def allocate(self, nbytes: int, kind: str = "cpu") -> Memory:
        memory = super().allocate(nbytes + 8, kind)
        return replace(memory, address=memory.address + 8, nbytes=nbytes)


@broken({"REG-2": "answered with a region of"})
class RegistersWholeLinesOnly(MemoryTransport):
    def register(self, memory: Memory) -> Region:
        odd = memory.nbytes == 100_001
        return super().register(replace(memory, nbytes=100_000) if odd else memory)


@broken({"REG-3": "register of cuda memory was not refused"})
class RegistersAnyKind(MemoryTransport):
    def register(self, memory: Memory) -> Region:
        return super().register(replace(memory, kind="cpu"))


@broken({"REG-4": "second retire raised .*retired"})
class CannotRetireTwice(MemoryTransport):
    def retire(self, region: Region) -> None:
        if self._live.get(region.id) != region:
            raise BadCall("this region is retired", transport=self.name)
        super().retire(region)


@broken(
    {
        "REG-4": "is another transport's",
        "REG-5": "were given twice",
        "CON-4": "an older one names was not refused",
        "BND-5": "registered since, was not refused",
    }
)
class UsesOneGenerationForAll(MemoryTransport):
    def register(self, memory: Memory) -> Region:
        self._generation = 0
        return super().register(memory)


@broken({"REG-6": "a retired region's bytes changed"})
class WipesWhatIsRetired(MemoryTransport):
    def retire(self, region: Region) -> None:
        super().retire(region)
        if region.memory.nbytes == 1 << 16:
            region.memory.view()[:] = bytes(region.memory.nbytes)


@broken({"REG-7": "memory has to be aligned"})
class RegistersWholePagesOnly(MemoryTransport):
    def register(self, memory: Memory) -> Region:
        if memory.address % 64:
            raise Unsupported("memory has to be aligned", transport=self.name)
        return super().register(memory)


@broken({"REG-8": "register of others' memory was not refused"})
class RegistersWhatItDidNotAllocate(MemoryTransport):
    capabilities = replace(MemoryTransport.capabilities, allocates_targets=True)


@broken({"REG-9": "retire of another transport's region was not refused"})
class RetiresAnything(MemoryTransport):
    def retire(self, region: Region) -> None:
        self._check_open()
        if self._live.get(region.id) == region:
            super().retire(region)
