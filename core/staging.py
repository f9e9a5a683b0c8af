"""Staging: the sender's own memory for what cannot be written from where it lies.

Packed components always pass through it (one copy per run instead of one per component and block). Where the transport
reads registered memory alone (`registers_sources`), so do all rows: they are copied here, and this was registered once.

A stage is taken for a grant after the grant arrived, and given back when the write has drained: that is the caller's
duty, because only the caller knows. It is never held while waiting for anything else. So everything taken comes back,
free pieces that touch merge, and once all is back there is one free piece of `max_take` bytes: a caller who queues
first in, first out is served for any size up to that, whatever the order of what came before.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from tensorferry.core.carriers import Carriers
from tensorferry.core.errors import BadCall, ConfigError, TransportError
from tensorferry.core.layout import SlabPlan, align
from tensorferry.core.memory import Memory, host_memory
from tensorferry.core.transport import Region, Transport

ALIGNMENT = 64


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """`nbytes` bytes from `offset` in `local`, which is a Region where the transport asks for registered sources."""

    local: Region | Memory
    offset: int
    nbytes: int

    @property
    def holds_rows(self) -> bool:
        """All rows have to pass through, not the packed ones alone."""
        return isinstance(self.local, Region)

    @property
    def memory(self) -> Memory:
        return self.local.memory if isinstance(self.local, Region) else self.local

    def view(self) -> memoryview:
        return self.memory.view(self.offset, self.nbytes)


class Staging:
    """`nbytes` of staging, cut down to a multiple of 64 bytes. One thread only (the endpoint's I/O thread)."""

    def __init__(self, transport: Transport, nbytes: int) -> None:
        """Allocate, and register where the transport asks for it. Raises ConfigError for less than 64 bytes."""
        self.max_take = nbytes // ALIGNMENT * ALIGNMENT
        """The longest piece that can ever be taken."""
        if self.max_take < ALIGNMENT:
            raise ConfigError(f"staging of {nbytes} bytes holds nothing", hint=f"Give it at least {ALIGNMENT} bytes")
        self.holds_rows = transport.capabilities.registers_sources
        self._transport = transport
        self._local: Region | Memory
        if self.holds_rows:
            self._local = transport.register(transport.allocate(self.max_take))
        else:
            self._local = host_memory(self.max_take)
        self._free = [(0, self.max_take)]  # (start, stop), sorted; pieces never touch
        self._taken: dict[int, Stage] = {}
        self._closed = False

    @property
    def free_bytes(self) -> int:
        return sum(stop - start for start, stop in self._free)

    def max_blocks(self, plan: SlabPlan, names: tuple[str, ...]) -> int:
        """The longest run of blocks of the components `names` that one stage can hold, at most the slab's blocks.

        Raises ConfigError where not even one block fits: such a run could wait for ever.
        """
        needed = plan.stage_bytes(names, 1, rows=self.holds_rows)
        if needed > self.max_take:
            raise ConfigError(
                f"staging of {self.max_take} bytes is smaller than one block, which needs {needed}",
                hint="Raise the staging size, or lower block_size on both sides",
            )
        fits = plan.blocks if needed == 0 else min(plan.blocks, self.max_take // needed)
        # Rounding up to 64 bytes is per run, so a little more may fit than single blocks say.
        while fits < plan.blocks and plan.stage_bytes(names, fits + 1, rows=self.holds_rows) <= self.max_take:
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
        size = align(nbytes, ALIGNMENT)
        for place, (start, stop) in enumerate(self._free):
            if stop - start >= size:
                self._free[place : place + 1] = [(start + size, stop)] if start + size < stop else []
                stage = self._taken[start] = Stage(self._local, start, nbytes)
                return stage
        return None

    def give(self, stage: Stage) -> None:
        """Give a stage back, after the write that read it has drained. Raises BadCall for one that is not taken
        (given back before, or of another staging), and changes nothing."""
        if self._taken.get(stage.offset) is not stage:
            raise BadCall(f"the stage at {stage.offset} is not taken: it was given back before, or is another's")
        del self._taken[stage.offset]
        start, stop = stage.offset, stage.offset + align(stage.nbytes, ALIGNMENT)
        place = bisect_left(self._free, (start, stop))
        first, last = place, place
        if place < len(self._free) and self._free[place][0] == stop:
            stop, last = self._free[place][1], place + 1
        if place > 0 and self._free[place - 1][1] == start:
            start, first = self._free[place - 1][0], place - 1
        self._free[first:last] = [(start, stop)]

    def close(self) -> None:
        """Retire the registration. Stages that are still out stay readable: they hold their memory. Idempotent."""
        if not self._closed:
            self._closed = True
            if isinstance(self._local, Region):
                self._transport.retire(self._local)


class Stagings:
    """`nbytes` of staging for all transports that read any memory, and as much for each that reads registered memory
    alone."""

    def __init__(self, carriers: Carriers, nbytes: int) -> None:
        """A transport that will not take its staging is not used, unless it is the only one: then this raises what
        `register` does. Raises ConfigError as Staging does."""
        self._by_name: dict[str, Staging] = {}
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

    def max_blocks(self, plan: SlabPlan, names: tuple[str, ...]) -> int:
        """The longest run that every staging can hold: any of the transports may have to carry it. See Staging."""
        return min(staging.max_blocks(plan, names) for staging in self._by_name.values())

    @property
    def taken_bytes(self) -> int:
        return sum(s.max_take - s.free_bytes for s in {id(s): s for s in self._by_name.values()}.values())

    def close(self) -> None:
        for staging in self._by_name.values():
            staging.close()
