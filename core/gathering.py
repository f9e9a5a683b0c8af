"""How blocks become rows: made visible, verified, copied to their place, and freed when the copy is over."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from tensorferry.core import effects as fx
from tensorferry.core.buffers import Destination, Gathered, PoolBuffers
from tensorferry.core.digest import block_seed
from tensorferry.core.errors import FerryError, InternalError
from tensorferry.core.receiver import ReceiverMachine

log = logging.getLogger("tensorferry.receiver")


@dataclass(slots=True)
class Copying:
    """A gather that the device has not finished yet."""

    xfer: int
    indices: list[int]
    gathered: list[Gathered]
    destination: Destination


class Gatherer:
    """The gathers of one receiver. `do` carries out the effects of what the machine is told. The I/O thread's alone."""

    def __init__(
        self,
        buffers: PoolBuffers,
        machine: ReceiverMachine,
        do: Callable[[list[fx.Effect]], None],
    ) -> None:
        self.destinations: dict[int, Destination] = {}  # by xfer, until the end
        self._buffers = buffers
        self._machine = machine
        self._do = do
        self._copying: deque[Copying] = deque()

    @property
    def busy(self) -> bool:
        return bool(self._copying)

    def gather(self, g: fx.Gather) -> None:
        """Whatever fails here is this transfer's end; its blocks go the way of a wrong digest, so that none is lost."""
        try:
            self._verify_and_copy(g)
        except Exception as problem:
            log.exception("gathering for room %d failed", self._machine.transfers[g.xfer].room)
            pending = [index for index, _, _ in g.items if index in self._machine.transfers[g.xfer].gathering]
            error = problem if isinstance(problem, FerryError) else InternalError(f"gather failed: {problem!r}")
            self._do(self._machine.fail(g.xfer, error))
            if pending:
                self._do(self._machine.corrupt(g.xfer, pending))

    def _verify_and_copy(self, g: fx.Gather) -> None:
        """Flush, verify, copy (INT-3). Blocks whose digest is right are gathered together where they lie together."""
        t = self._machine.transfers[g.xfer]
        facts, destination = t.facts, self.destinations[g.xfer]
        assert facts is not None
        for slab in {self._buffers.geometry.slab_of(block) for _, block, _ in g.items}:
            self._buffers.flush(slab)
        names = destination.names
        good: list[tuple[int, int]] = []
        bad: list[int] = []
        for index, block, digest in sorted(g.items):
            seed = block_seed(self._machine.inc, g.xfer, facts.content_id, index)
            if self._buffers.digest(block, index, facts.total, names, seed, facts.integrity) == digest:
                good.append((index, block))
            else:
                bad.append(index)
        copying = Copying(g.xfer, [index for index, _ in good], [], destination)
        for first_index, first_block, count in self._together(good):
            copying.gathered.append(
                self._buffers.gather_run(first_block, first_index, count, facts.total, names, destination)
            )
        if bad:
            log.warning("room %d: blocks %s arrived with a wrong digest; they are sent again", t.room, bad)
            self._do(self._machine.corrupt(g.xfer, bad))
        if good:
            self._copying.append(copying)
            self.finish()

    def _together(self, pairs: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
        """(first index, first block, count) of runs that are adjacent on both sides and lie in one slab."""
        runs: list[tuple[int, int, int]] = []
        for index, block in pairs:
            if runs:
                first_index, first_block, count = runs[-1]
                same_slab = self._buffers.geometry.slab_of(first_block) == self._buffers.geometry.slab_of(block)
                if same_slab and (index, block) == (first_index + count, first_block + count):
                    runs[-1] = (first_index, first_block, count + 1)
                    continue
            runs.append((index, block, 1))
        return runs

    def finish(self) -> None:
        """Blocks are free when the copy is over, not when it was started (GR-7)."""
        while self._copying and all(g.finished() for g in self._copying[0].gathered):
            done = self._copying.popleft()
            self._do(self._machine.gathered(done.xfer, done.indices))
