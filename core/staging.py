"""Staging: the sender's own memory for what cannot be written from where it lies.

Packed components always pass through it (one copy per run instead of one per component and block). Where the transport
reads registered memory alone (`registers_sources`), so do all rows: they are copied here, and this was registered once.
So do rows on a GPU that the transport cannot read from: they are copied to the host. Where it reads registered memory
of the GPU alone, they are copied to staging there, which is made when the first of them come.

A stage is taken for a grant after the grant arrived, and given back when the write has drained: that is the caller's
duty, because only the caller knows. It is never held while waiting for anything else. So everything taken comes back,
free pieces that touch merge, and once all is back there is one free piece of `max_take` bytes: a caller who queues
first in, first out is served for any size up to that, whatever the order of what came before. What a write of unknown
outcome may still read does not come back in time: `strand` puts fresh memory in its place.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from contextlib import ExitStack
from dataclasses import dataclass, field

from tensorferry.core.carriers import Carriers
from tensorferry.core.copying import HOST_DEVICE, Device, View
from tensorferry.core.errors import BadCall, ConfigError, FerryError, TransportError
from tensorferry.core.layout import SlabPlan, align
from tensorferry.core.memory import HOST, Memory, Place, host_memory
from tensorferry.core.transport import Region, Transport

log = logging.getLogger("tensorferry.sender")

ALIGNMENT = 64


STRANDED_SHARE = 0.5
"""When more than this share of the staging waits for writes of unknown outcome, fresh memory takes its place."""

MOST_ARENAS = 3
"""Fresh memory twice, as the receiver's `quarantine_quota` allows its lost peers twice the pool; then writes wait."""


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """`nbytes` bytes from `offset` in `local`, which is a Region where the transport asks for registered sources."""

    local: Region | Memory
    offset: int
    nbytes: int
    views: dict[Device, View] = field(default_factory=dict, repr=False)
    """Of the whole memory, for each device that was asked: shared by all stages of it."""

    @property
    def holds_rows(self) -> bool:
        """All rows have to pass through, not the packed ones alone."""
        return isinstance(self.local, Region)

    @property
    def memory(self) -> Memory:
        return self.local.memory if isinstance(self.local, Region) else self.local

    def view(self, device: Device = HOST_DEVICE) -> View:
        """Its bytes, as a device copies to and from them."""
        whole = self.views.get(device)
        if whole is None:
            whole = self.views[device] = device.view(device.pin(self.memory))
        return whole[self.offset : self.offset + self.nbytes]


class _Arena:
    """One piece of memory, and which parts of it are free."""

    def __init__(self, local: Region | Memory, nbytes: int) -> None:
        self.local = local
        self.nbytes = nbytes
        self.free = [(0, nbytes)]  # (start, stop), sorted; pieces never touch
        self.taken: dict[int, Stage] = {}
        self.stranded: set[int] = set()
        self.views: dict[Device, View] = {}

    @property
    def free_bytes(self) -> int:
        return sum(stop - start for start, stop in self.free)

    @property
    def stranded_bytes(self) -> int:
        return sum(align(self.taken[start].nbytes, ALIGNMENT) for start in self.stranded)

    def take(self, nbytes: int) -> Stage | None:
        size = align(nbytes, ALIGNMENT)
        for place, (start, stop) in enumerate(self.free):
            if stop - start >= size:
                self.free[place : place + 1] = [(start + size, stop)] if start + size < stop else []
                stage = self.taken[start] = Stage(self.local, start, nbytes, self.views)
                return stage
        return None

    def give(self, stage: Stage) -> None:
        del self.taken[stage.offset]
        self.stranded.discard(stage.offset)
        start, stop = stage.offset, stage.offset + align(stage.nbytes, ALIGNMENT)
        place = bisect_left(self.free, (start, stop))
        first, last = place, place
        if place < len(self.free) and self.free[place][0] == stop:
            stop, last = self.free[place][1], place + 1
        if place > 0 and self.free[place - 1][1] == start:
            start, first = self.free[place - 1][0], place - 1
        self.free[first:last] = [(start, stop)]


class Staging:
    """`nbytes` of staging, cut down to a multiple of 64 bytes. One thread only (the endpoint's I/O thread)."""

    def __init__(self, transport: Transport, nbytes: int, place: Place = HOST) -> None:
        """Allocate, and register where the transport asks for it, as it has to for a `place` on a GPU. Raises
        ConfigError for less than 64 bytes."""
        self.max_take = nbytes // ALIGNMENT * ALIGNMENT
        """The longest piece that can ever be taken."""
        if self.max_take < ALIGNMENT:
            raise ConfigError(f"staging of {nbytes} bytes holds nothing", hint=f"Give it at least {ALIGNMENT} bytes")
        self.holds_rows = transport.capabilities.registers_sources
        self._transport = transport
        self._place = place
        # The last one is taken from. What need not be registered is made when something has to pass through it.
        self._arenas = [self._fresh()] if self.holds_rows else []
        self._closed = False

    @property
    def free_bytes(self) -> int:
        if not self._arenas:
            return 0 if self._closed else self.max_take
        return self._arenas[-1].free_bytes

    @property
    def taken_bytes(self) -> int:
        return sum(arena.nbytes - arena.free_bytes for arena in self._arenas)

    def max_blocks(self, plan: SlabPlan, names: tuple[str, ...], *, rows: bool = False) -> int:
        """The longest run of blocks of the components `names` that one stage can hold, at most the slab's blocks.
        `rows`: all rows pass through, whatever the transport could read in place.

        Raises ConfigError where not even one block fits: such a run could wait for ever.
        """
        rows = rows or self.holds_rows
        needed = plan.stage_bytes(names, 1, rows=rows)
        if needed > self.max_take:
            raise ConfigError(
                f"staging of {self.max_take} bytes is smaller than one block, which needs {needed}",
                hint="Raise the staging size, or lower block_size on both sides",
            )
        fits = plan.blocks if needed == 0 else min(plan.blocks, self.max_take // needed)
        # Rounding up to 64 bytes is per run, so a little more may fit than single blocks say.
        while fits < plan.blocks and plan.stage_bytes(names, fits + 1, rows=rows) <= self.max_take:
            fits += 1
        return fits

    def take(self, nbytes: int) -> Stage | None:
        """The lowest free piece that is long enough, or None: not now. Never blocks.

        Raises ConfigError for more than `max_take`, which would be refused for ever, BadCall for less than 1 byte or
        after `close`.
        """
        if self._closed or nbytes < 1:
            raise BadCall(f"cannot take {nbytes} bytes of {'closed ' if self._closed else ''}staging")
        if nbytes > self.max_take:
            raise ConfigError(
                f"{nbytes} bytes never fit into staging of {self.max_take}",
                hint="Raise the staging size, or write fewer blocks at once",
            )
        if not self._arenas:
            self._arenas.append(self._fresh())
        return self._arenas[-1].take(nbytes)

    def give(self, stage: Stage) -> None:
        """Give a stage back, after the write that read it has drained. Raises BadCall for one that is not taken
        (given back before, or of another staging), and changes nothing."""
        arena = self._arena_of(stage)
        arena.give(stage)
        if not arena.taken and (self._closed or arena is not self._arenas[-1]):
            self._arenas.remove(arena)
            if not self._closed:
                self._retire(arena)

    def strand(self, stage: Stage) -> None:
        """The write that reads this stage has an unknown outcome: nobody can say when it comes back, if ever.

        Where such stages hold most of the memory, fresh memory takes its place, so that a peer that was lost does not
        stop the others: the stranded stay as they are until they are given. Raises BadCall as `give` does.
        """
        arena = self._arena_of(stage)
        arena.stranded.add(stage.offset)
        if arena is self._arenas[-1] and arena.stranded_bytes > STRANDED_SHARE * arena.nbytes:
            if len(self._arenas) >= MOST_ARENAS:
                log.error("writes of unknown outcome hold %d times the staging: others wait for them", MOST_ARENAS)
                return
            try:
                self._arenas.append(self._fresh())
            except (FerryError, OSError) as problem:
                log.error("no fresh staging, others wait for writes of unknown outcome: %s", problem)

    def close(self) -> None:
        """Retire the registrations. Stages that are still out stay readable: they hold their memory. Idempotent."""
        if not self._closed:
            self._closed = True
            for arena in self._arenas:
                self._retire(arena)
            self._arenas = [arena for arena in self._arenas if arena.taken]  # the memory goes now, not with the cycle

    def _fresh(self) -> _Arena:
        if self.holds_rows:
            where = () if self._place == HOST else self._place
            return _Arena(self._transport.register(self._transport.allocate(self.max_take, *where)), self.max_take)
        return _Arena(host_memory(self.max_take), self.max_take)

    def _retire(self, arena: _Arena) -> None:
        if isinstance(arena.local, Region):
            self._transport.retire(arena.local)

    def _arena_of(self, stage: Stage) -> _Arena:
        for arena in self._arenas:
            if arena.taken.get(stage.offset) is stage:
                return arena
        raise BadCall(f"the stage at {stage.offset} is not taken: it was given back before, or is another's")


class Stagings:
    """`nbytes` of staging for all transports that read any memory, and as much for each that reads registered memory
    alone."""

    def __init__(self, carriers: Carriers, nbytes: int) -> None:
        """A transport that will not take its staging is not used, unless it is the only one: then this raises what
        `register` does. Raises ConfigError as Staging does."""
        self._by_name: dict[str, Staging] = {}
        self._nbytes = nbytes
        self._on_gpus: dict[tuple[str, Place], Staging | None] = {}  # None: it could not be had
        with ExitStack() as undo:
            undo.callback(self.close)
            self._open(carriers, nbytes)
            undo.pop_all()

    def _open(self, carriers: Carriers, nbytes: int) -> None:
        shared: Staging | None = None
        for transport in list(carriers.transports):
            if transport.capabilities.registers_sources:
                try:
                    self._by_name[transport.name] = Staging(transport, nbytes)
                except TransportError as problem:
                    if len(carriers.transports) == 1:
                        raise
                    carriers.reject(transport, f"it could not register {nbytes} bytes of staging: {problem}")
            else:
                shared = shared or Staging(transport, nbytes)
                self._by_name[transport.name] = shared

    def of(self, transport: Transport) -> Staging:
        return self._by_name[transport.name]

    def choose(self, transport: Transport, place: Place) -> tuple[Staging, bool]:
        """The staging for rows at `place`, and whether all of them pass through it."""
        host, capabilities = self._by_name[transport.name], transport.capabilities
        if place == HOST:
            return host, host.holds_rows
        if place.kind not in capabilities.memory_kinds:
            return host, True
        if not capabilities.registers_sources:
            return host, False
        return self._on_gpu(transport, place) or host, True

    def _on_gpu(self, transport: Transport, place: Place) -> Staging | None:
        key = transport.name, place
        if key not in self._on_gpus:
            try:
                self._on_gpus[key] = Staging(transport, self._nbytes, place)
            except FerryError as problem:
                log.warning("%s: no staging on %s, rows go through the host: %s", transport.name, place, problem)
                self._on_gpus[key] = None
        return self._on_gpus[key]

    def max_blocks(self, plan: SlabPlan, names: tuple[str, ...], *, rows: bool = False) -> int:
        """The longest run that every staging can hold: any of the transports may have to carry it. See Staging."""
        return min(staging.max_blocks(plan, names, rows=rows) for staging in self._by_name.values())

    @property
    def taken_bytes(self) -> int:
        return sum(staging.taken_bytes for staging in self._all())

    def close(self) -> None:
        for staging in self._all():
            staging.close()

    def _all(self) -> list[Staging]:
        """Each once: some transports share one."""
        there = [*self._by_name.values(), *(staging for staging in self._on_gpus.values() if staging is not None)]
        return list({id(staging): staging for staging in there}.values())
