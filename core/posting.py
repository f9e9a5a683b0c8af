"""How grants become posts: cut, staged, hashed, handed to the transport, watched to their end.

A receiver that takes nothing holds up no other, an error is the error of the write that it met, and staging is taken
when a post can start and given back when it has drained.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from tensorferry.core import effects as fx
from tensorferry.core.carriers import Carriers, Reach
from tensorferry.core.digest import block_seed, digest
from tensorferry.core.errors import FerryError, OutOfBounds, TransportError, UnknownInFlight
from tensorferry.core.layout import Geometry, Layout, SlabPlan, slab_plan
from tensorferry.core.memory import Memory, copy_bytes, host_memory
from tensorferry.core.sender import SenderMachine
from tensorferry.core.source import Source, write_plan
from tensorferry.core.staging import Stage, Stagings
from tensorferry.core.transport import Copy, RemoteRegion, Status, Transport

log = logging.getLogger("tensorferry.sender")

FALL_BACK_AFTER = 3
"""Fresh starts in a row that a transport may cost before the next one carries. One bad write says little, and what was
under way together with it says nothing more; the transfer has `max_bumps` fresh starts for all of them."""

MOST_POSTS = 8
"""Posts under way to one receiver. More keep no transport busier, and a revoked grant's unposted rest costs nothing."""


@dataclass(slots=True)
class Part:
    """A piece of a grant that fits one post: `count` blocks from `index`, into adjacent blocks of one slab."""

    write: fx.PostWrite
    index: int
    block: int
    count: int
    generation: int

    @property
    def indices(self) -> range:
        return range(self.index, self.index + self.count)


class Outcome(Enum):
    POSTED = "posted"
    OVER = "over"  # refused, or not wanted any more
    NO_STAGE = "no stage"  # has to wait for staging


@dataclass(slots=True)
class Posted:
    part: Part
    transport: Transport
    handle: int
    stage: Stage | None
    read: bool  # the caller's rows are not read any more: they were copied to the stage, or sent
    digests: dict[int, int]
    unknown: bool = False
    mute: bool = False  # its transport cannot say whether the source is free, and that was logged


@dataclass(slots=True)
class Target:
    """A receiver as the transports know it. `generations`: of its slabs, as its newest Hello says."""

    reach: Reach
    geometry: Geometry
    generations: list[int]


class Poster:
    """The posts of one sender. `do` carries out the effects of what the machine is told. The I/O thread's alone."""

    def __init__(
        self,
        layout: Layout,
        carriers: Carriers,
        machine: SenderMachine,
        do: Callable[[list[fx.Effect]], None],
        *,
        staging: Stagings,
        block_size: int,
        integrity: str,
    ) -> None:
        self.sources: dict[int, Source] = {}  # by serial, until nothing reads them
        self.targets: dict[int, Target] = {}  # by receiver incarnation
        self.staging = staging
        self._layout = layout
        self._carriers = carriers
        self._machine = machine
        self._do = do
        self._block_size = block_size
        self._integrity = integrity
        self._lines: dict[int, deque[Part]] = {}  # by receiver: not posted yet
        self._posted: dict[int, Posted] = {}  # in the order of posting
        self._posts = 0
        self._over: set[int] = set()  # serials of transfers that have ended, as long as their rows are held

    def _plan(self, receiver: int, block: int) -> SlabPlan:
        geometry = self.targets[receiver].geometry
        return slab_plan(self._layout, geometry, geometry.slab_of(block))

    def put(self, write: fx.PostWrite) -> None:
        """Cut a grant into posts: large enough for the engine's best rate, small enough to overlap with the gather."""
        source = self.sources[write.serial]
        block_bytes = self._block_size * sum(self._layout[name].token_bytes for name in source.names)
        lane = self.targets[write.receiver].reach.lane
        preferred = max(1, lane.transport.capabilities.preferred_post_bytes // max(1, block_bytes))
        line = self._lines.setdefault(write.receiver, deque())
        for index, block, count, generation in write.runs:
            step = min(preferred, self.staging.max_blocks(self._plan(write.receiver, block), source.names))
            for k in range(0, count, step):
                line.append(Part(write, index + k, block + k, min(step, count - k), generation))

    def end(self, serial: int) -> None:
        """The transfer is over for its caller: let its rows go, at once or when the last write has read them. A write
        that never drains must not pin them."""
        if serial in self.sources:
            self._over.add(serial)
            self._let_go(serial)

    def abandon(self, receiver: int) -> bool:
        """Wait no more for writes to a receiver that was lost. False where one of them may still read memory of ours,
        or is not known to be lost."""
        mine = {number: p for number, p in self._posted.items() if p.part.write.receiver == receiver}
        if receiver in self._lines or any(not (p.unknown and p.read and p.stage is None) for p in mine.values()):
            return False
        for number in mine:
            del self._posted[number]
        return True

    def release(self, serial: int) -> None:
        """Every write of it is drained."""
        self._over.discard(serial)
        self.sources.pop(serial).release()

    def _let_go(self, serial: int) -> None:
        if serial in self._over and not self._reads(serial):
            self.sources[serial].release()

    def _reads(self, serial: int) -> bool:
        """Rows of this transfer are being read, or will be."""
        waiting = any(part.write.serial == serial for line in self._lines.values() for part in line)
        return waiting or any(
            posted.part.write.serial == serial and not posted.read for posted in self._posted.values()
        )

    @property
    def busy(self) -> bool:
        """A post is under way, its outcome unknown, or waits for its turn."""
        return bool(self._posted or self._lines)

    def progress(self) -> bool:
        """Report what has finished, then post what is in line. True while something is under way."""
        for number, posted in list(self._posted.items()):
            self._look(number, posted)
        self._post_all()
        return bool(self._posted)

    def _post_all(self) -> None:
        """Post what is in line, one part of each receiver in turn: a receiver that takes nothing holds up no other."""
        under_way = Counter(p.part.write.receiver for p in self._posted.values() if not p.unknown)
        ready = deque(receiver for receiver, line in self._lines.items() if line)
        while ready:
            receiver = ready.popleft()
            line = self._lines[receiver]
            if under_way[receiver] >= MOST_POSTS:
                continue
            outcome = self._post(line[0])
            if outcome is Outcome.NO_STAGE:
                return  # first come, first served: nobody else may take what this one waits for (R3)
            line.popleft()
            under_way[receiver] += outcome is Outcome.POSTED
            if line:
                ready.append(receiver)
        for receiver in [receiver for receiver, line in self._lines.items() if not line]:
            del self._lines[receiver]

    def _post(self, part: Part) -> Outcome:
        write = part.write
        if not self._machine.wants(write.write):  # revoked before it was posted: it never will be
            self._do(self._machine.write_drained(write.write, set(part.indices)))
            return Outcome.OVER
        stage: Stage | None = None
        target = self.targets.get(write.receiver)
        try:
            if target is None:
                raise TransportError("the receiver cannot be reached any more")
            source, lane = self.sources[write.serial], target.reach.lane
            if lane.barred is not None:
                raise lane.barred
            transport, staging = lane.transport, self.staging.of(lane.transport)
            plan = self._plan(write.receiver, part.block)
            needed = plan.stage_bytes(source.names, part.count, rows=staging.holds_rows)
            if needed:
                stage = staging.take(needed)
                if stage is None:
                    return Outcome.NO_STAGE
            slab = target.geometry.slab_of(part.block)
            inside = part.block - target.geometry.slab_blocks(slab).start
            if target.generations[slab] != part.generation:
                raise OutOfBounds(f"slab {slab} of the receiver has other memory by now")
            remote = RemoteRegion(*lane.regions[slab])
            copies = [
                Copy(c.local, c.local_offset, remote, c.slab_offset, c.nbytes)
                for c in write_plan(source, plan, part.index, inside, part.count, stage)
            ]
            if len(copies) > transport.capabilities.max_copies:
                copies = joined(copies)
            digests = {index: self._digest(source, write, index) for index in part.indices}
            handle = transport.post(lane.peer, copies)
        except Exception as problem:  # noqa: BLE001 - refused before any byte moved; it is this write's error and nobody else's
            if stage is not None:
                staging.give(stage)
            log.log(logging.DEBUG if isinstance(problem, FerryError) else logging.ERROR, "post refused: %r", problem)
            error = problem if isinstance(problem, TransportError) else TransportError(f"a post was refused: {problem}")
            if target is not None and not isinstance(problem, OutOfBounds):  # which is about the place, not the way
                self._went_wrong(write, self._posts + 1, target.reach.lane.transport, str(error.cause))
            self._do(self._machine.write_failed(write.write, set(part.indices), error))
            return Outcome.OVER
        self._posts += 1
        self._posted[self._posts] = Posted(
            part, transport, handle, stage, stage is not None and stage.holds_rows, digests
        )
        return Outcome.POSTED

    def _went_wrong(self, write: fx.PostWrite, number: int, transport: Transport, reason: str) -> None:
        """Count a failure of the transport in use; after a few in a row, the next one carries (a new epoch begins
        anyway, and what the old one may still write is fenced like any lost write)."""
        receiver = write.receiver
        target = self.targets.get(receiver)
        if target is None or target.reach.lane.transport is not transport:
            return  # it carries no more
        upto, epoch = target.reach.covered
        if number <= upto or epoch == write.write[1:3]:
            return  # it was under way, or in line, when the last failure was counted
        target.reach.covered = self._posts, write.write[1:3]
        target.reach.failures += 1
        if target.reach.failures < FALL_BACK_AFTER or not target.reach.fall_back(reason):
            return
        carries = target.reach.lane.transport.name
        log.warning("%s failed %d times in a row (%s); %s carries", transport.name, FALL_BACK_AFTER, reason, carries)
        self._do(self._machine.connected(receiver, None, via=carries))

    def _went_another_way(self, target: Target, posted: Posted) -> bool:
        """Under `require` a write that did ends its transfer, is not reported as done, and its way is used no more."""
        reach, write = target.reach, posted.part.write
        lane = reach.lane_of(posted.transport.name)
        error = None if lane is None else reach.check(lane, self._carriers.require)
        if error is None:
            return False
        self._do(self._machine.cancel(write.serial, error))
        self._do(self._machine.write_failed(write.write, set(posted.part.indices), error))
        left = error if reach.lane.barred is not None else None
        self._do(self._machine.connected(write.receiver, left, via=reach.lane.transport.name))
        return True

    def _digest(self, source: Source, write: fx.PostWrite, index: int) -> int:
        seed = block_seed(write.receiver, write.xfer, write.content_id, index)
        return digest(source.block_views(index, self._block_size), seed, self._integrity)

    def _look(self, number: int, posted: Posted) -> None:
        transport, handle = posted.transport, posted.handle
        try:
            status, drained = transport.poll(handle), transport.drained(handle)
        except Exception:  # no transport may do that; what it does not tell is not known, and others' posts go on
            if not posted.unknown:
                log.exception("%s.poll raised", transport.name)
            status, drained = Status.UNKNOWN, False
        write, indices = posted.part.write.write, set(posted.part.indices)
        receiver = posted.part.write.receiver
        if status is Status.PENDING:
            return
        if status is Status.UNKNOWN:
            if not posted.unknown:
                posted.unknown = True
                if posted.stage is not None and not drained:
                    self.staging.of(transport).strand(posted.stage)
                error = UnknownInFlight("a write has an unknown outcome", transport=transport.name)
                self._went_wrong(posted.part.write, number, transport, error.cause)
                self._do(self._machine.write_unknown(write, error))
            if not drained and not (posted.read and posted.stage is None) and self._source_free(posted):
                posted.read = True
                if posted.stage is not None:
                    self.staging.of(transport).give(posted.stage)
                    posted.stage = None
                self._let_go(posted.part.write.serial)
            if drained:
                self._settle(number, posted)
                self._do(self._machine.write_drained(write, indices))
            return
        self._settle(number, posted)
        if posted.unknown:
            self._do(self._machine.write_drained(write, indices))
        elif status is Status.DONE:
            if (target := self.targets.get(receiver)) is not None:
                if target.reach.lane.transport is transport:
                    target.reach.failures = 0
                if self._went_another_way(target, posted):
                    return
            self._do(self._machine.write_done(write, posted.digests))
        else:
            failed = TransportError("a write failed", transport=transport.name)
            self._went_wrong(posted.part.write, number, transport, failed.cause)
            self._do(self._machine.write_failed(write, indices, failed))

    def _source_free(self, posted: Posted) -> bool:
        try:
            return posted.transport.source_free(posted.handle)
        except Exception:  # as with `poll`: what it does not tell is not known
            if not posted.mute:
                posted.mute = True
                log.exception("%s.source_free raised", posted.transport.name)
            return False

    def _settle(self, number: int, posted: Posted) -> None:
        del self._posted[number]
        posted.transport.release(posted.handle)
        if posted.stage is not None:
            self.staging.of(posted.transport).give(posted.stage)


def joined(copies: list[Copy]) -> list[Copy]:
    """The same bytes in as few copies as can be: what is adjacent in the peer's memory goes through memory of our own.

    For rows that were put in so many pieces that a transport would not take them in one post. Only where the transport
    reads any memory: registered rows are staged, one copy a component.
    """
    runs: list[list[Copy]] = []
    for copy in copies:
        last = runs[-1][-1] if runs else None
        if last is not None and _adjacent(last, copy):
            runs[-1].append(copy)
        else:
            runs.append([copy])
    fewer = []
    for run in runs:
        if len(run) == 1:
            fewer.append(run[0])
            continue
        memory = host_memory(sum(copy.nbytes for copy in run))
        view, at = memory.view(), 0
        for copy in run:
            assert isinstance(copy.local, Memory)
            copy_bytes(view[at : at + copy.nbytes], copy.local.view(copy.local_offset, copy.nbytes))
            at += copy.nbytes
        fewer.append(Copy(memory, 0, run[0].remote, run[0].remote_offset, at))
    return fewer


def _adjacent(one: Copy, other: Copy) -> bool:
    plain = isinstance(one.local, Memory) and isinstance(other.local, Memory)
    return plain and one.remote == other.remote and one.remote_offset + one.nbytes == other.remote_offset
