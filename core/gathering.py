"""How blocks become rows: made visible, verified, copied to their place, and freed when the copy is over."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from tensorferry.core import effects as fx
from tensorferry.core.buffers import Destination, Gathered, PoolBuffers
from tensorferry.core.copying import Reading, keep, outlive
from tensorferry.core.digest import block_seed, digest
from tensorferry.core.errors import DeviceError, FerryError, InternalError
from tensorferry.core.receiver import ReceiverMachine
from tensorferry.core.timing import Troubles
from tensorferry.core.transfer import Facts

log = logging.getLogger("tensorferry.receiver")


@dataclass(slots=True)
class Verifying:
    """Blocks whose bytes are on their way to where they can be hashed. `facts`: as they were when the blocks came."""

    xfer: int
    items: list[tuple[int, int, int]]
    facts: Facts
    destination: Destination
    reading: Reading

    @property
    def indices(self) -> list[int]:
        return [index for index, _, _ in self.items]


@dataclass(slots=True)
class Copying:
    """A gather that the device has not finished yet."""

    xfer: int
    indices: list[int]
    gathered: list[Gathered]
    destination: Destination


W = TypeVar("W", Verifying, Copying)


class Gatherer:
    """The gathers of one receiver. `do` carries out the effects of what the machine is told. The I/O thread's alone."""

    def __init__(
        self,
        buffers: PoolBuffers,
        machine: ReceiverMachine,
        do: Callable[[list[fx.Effect]], None],
        troubles: Troubles | None = None,
    ) -> None:
        self.destinations: dict[int, Destination] = {}  # by xfer, until the end
        self._buffers = buffers
        self._machine = machine
        self._do = do
        self._troubles = troubles or Troubles()
        self._verifying: deque[Verifying] = deque()  # both in the order in which the device was asked
        self._copying: deque[Copying] = deque()

    @property
    def busy(self) -> bool:
        return bool(self._verifying or self._copying)

    def gather(self, g: fx.Gather) -> None:
        """Whatever fails here is this transfer's end; its blocks go the way of a wrong digest, so that none is lost."""
        try:
            self._begin(g)
        except Exception as problem:  # noqa: BLE001 - logged there
            self._give_up(g.xfer, [index for index, _, _ in g.items], problem)
        self.finish()

    def _give_up(self, xfer: int, indices: list[int], problem: Exception) -> None:
        t = self._machine.transfers.get(xfer)
        room = t.room if t is not None else "that is over"
        if not isinstance(problem, DeviceError):
            log.error("gathering for room %s failed: %s", room, problem, exc_info=not isinstance(problem, FerryError))
        elif (more := self._troubles.worth_telling(problem.cause, time.monotonic())) is not None:  # every room meets it
            log.warning("gathering for room %s failed: %s%s", room, problem, more)
        pending = [index for index in indices if t is not None and index in t.gathering]
        error = problem if isinstance(problem, FerryError) else InternalError(f"gather failed: {problem!r}")
        self._do(self._machine.fail(xfer, error))
        if pending:
            self._do(self._machine.corrupt(xfer, pending))

    def _begin(self, g: fx.Gather) -> None:
        """Flush, verify, copy (INT-3). Blocks whose digest is right are gathered together where they lie together."""
        facts, destination = self._machine.transfers[g.xfer].facts, self.destinations[g.xfer]
        assert facts is not None
        for slab in {self._buffers.geometry.slab_of(block) for _, block, _ in g.items}:
            self._buffers.flush(slab)
        items = sorted(g.items)
        pairs = ((index, block) for index, block, _ in items)
        reading = self._buffers.read(pairs, facts.total, destination.names, facts.integrity)
        self._verifying.append(Verifying(g.xfer, items, facts, destination, reading))

    def _verify_and_copy(self, v: Verifying) -> None:
        good: list[tuple[int, int]] = []
        bad: list[int] = []
        for (index, block, said), content in zip(v.items, v.reading.blocks, strict=True):
            seed = block_seed(self._machine.inc, v.xfer, v.facts.content_id, index)
            if digest(content, seed, v.facts.integrity) == said:
                good.append((index, block))
            else:
                bad.append(index)
        copying = Copying(v.xfer, [index for index, _ in good], [], v.destination)
        total, names = v.facts.total, v.destination.names
        try:
            for first_index, first_block, count in self._together(good):
                copying.gathered.append(
                    self._buffers.gather_run(first_block, first_index, count, total, names, v.destination)
                )
            if bad:
                room = self._machine.transfers[v.xfer].room
                log.warning("room %d: blocks %s arrived with a wrong digest; they are sent again", room, bad)
                self._do(self._machine.corrupt(v.xfer, bad))
        except Exception:
            keep(copying.gathered)
            raise
        if good:
            self._copying.append(copying)

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
        """Go on where the device is done. Blocks are free when the copy is over, not when it was started (GR-7)."""
        while self._verifying and self._is_over(self._verifying, lambda v: v.reading.finished()):
            verified = self._verifying.popleft()
            try:
                self._verify_and_copy(verified)
            except Exception as problem:  # noqa: BLE001 - logged there
                self._give_up(verified.xfer, verified.indices, problem)
        while self._copying and self._is_over(self._copying, lambda c: all(g.finished() for g in c.gathered)):
            done = self._copying.popleft()
            self._do(self._machine.gathered(done.xfer, done.indices))

    def _is_over(self, line: deque[W], over: Callable[[W], bool]) -> bool:
        """The first in line is. What failed instead leaves the line and ends its transfer."""
        try:
            return over(line[0])
        except DeviceError as problem:
            failed = line.popleft()
            self._give_up(failed.xfer, failed.indices, problem)
            return False

    def close(self) -> None:
        """Nothing more is gathered. What the device still copies holds its memory until it is over."""
        outlive([*(v.reading for v in self._verifying), *(g for c in self._copying for g in c.gathered)])
        self._verifying.clear()
        self._copying.clear()
        self.destinations.clear()
