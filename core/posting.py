"""How grants become posts: cut, staged, hashed, handed to the transport, watched to their end.

A receiver that takes nothing holds up no other, an error is the error of the write that it met, and staging is taken
when a post can start and given back when it has drained. Rows that a GPU copies to the staging are posted when the GPU
says that they are there; until then their part is being prepared.

Long because the whole way of a grant through the sender is one story.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from tensorferry.core import effects as fx
from tensorferry.core.carriers import Carriers, Lane, Reach
from tensorferry.core.copying import HOST_DEVICE, Copying, Device, Reading, outlive
from tensorferry.core.devices import between
from tensorferry.core.digest import block_seed, digest
from tensorferry.core.errors import DeviceError, FerryError, OutOfBounds, TransportError, UnknownInFlight
from tensorferry.core.layout import Geometry, Layout, SlabPlan, slab_plan
from tensorferry.core.memory import HOST, Memory, Place, copy_bytes, host_memory
from tensorferry.core.sender import SenderMachine
from tensorferry.core.source import LocalCopy, Source, staged_views, write_plan
from tensorferry.core.staging import Stage, Staging, Stagings
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
class Prepared:
    """A part that is posted when `copying` is over, if it is still wanted and the way is still the same."""

    part: Part
    target: Target
    lane: Lane
    source: Source
    staging: Staging
    stage: Stage | None
    rows: bool  # all of them pass through the stage
    copies: list[LocalCopy]
    copying: list[Copying]
    content: Reading | None  # what is hashed; None: the caller's rows where they lie

    def finished(self) -> bool:
        return all(one.finished() for one in self.copying)


@dataclass(slots=True)
class Posted:
    part: Part
    transport: Transport
    handle: int
    stage: Stage | None
    read: bool  # the caller's rows are not read any more: they were copied to the stage, or sent
    digests: dict[int, int]
    staging: Staging
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
    ) -> None:
        self.sources: dict[int, Source] = {}  # by serial, until nothing reads them
        self.targets: dict[int, Target] = {}  # by receiver incarnation
        self.staging = staging
        self._layout = layout
        self._carriers = carriers
        self._machine = machine
        self._do = do
        self._block_size = block_size
        self._devices: dict[Place, Device] = {HOST: HOST_DEVICE}  # by where rows lie
        self._lines: dict[int, deque[Part]] = {}  # by receiver: not posted yet
        self._preparing: list[Prepared] = []
        self._aside: list[tuple[list[Copying], Staging, Stage]] = []  # given back when nothing copies to it any more
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
            plan = self._plan(write.receiver, block)
            step = min(preferred, self.staging.max_blocks(plan, source.names, rows=source.place != HOST))
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
        preparing = any(p.part.write.receiver == receiver for p in self._preparing)
        if preparing or receiver in self._lines:
            return False
        if any(not (p.unknown and p.read and p.stage is None) for p in mine.values()):
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
        waiting = waiting or any(p.part.write.serial == serial for p in self._preparing)
        return waiting or any(
            posted.part.write.serial == serial and not posted.read for posted in self._posted.values()
        )

    @property
    def busy(self) -> bool:
        """A post is under way, its outcome unknown, or waits for its turn."""
        return bool(self._posted or self._lines or self.copies)

    @property
    def copies(self) -> bool:
        """A GPU copies rows for posts to come."""
        return bool(self._preparing or self._aside)

    def progress(self) -> bool:
        """Report what has finished, then post what is in line. True while something is under way."""
        for number, posted in list(self._posted.items()):
            self._look(number, posted)
        if self.copies:
            self._go_on()
        self._post_all()
        return bool(self._posted or self.copies)

    def close(self) -> None:
        """Nothing more is posted. What a GPU still copies holds its memory until it is over."""
        left = [*(p.copying for p in self._preparing), *(copying for copying, _, _ in self._aside)]
        outlive([one for copying in left for one in copying])
        self._preparing.clear()
        self._aside.clear()

    def _go_on(self) -> None:
        """Post what was prepared, and give back the staging of what never will be."""
        for prepared in list(self._preparing):
            try:
                if not prepared.finished():
                    continue
            except DeviceError as problem:
                self._preparing.remove(prepared)
                self._give_back(prepared.copying, prepared.staging, prepared.stage)
                self._refuse(prepared.part, None, problem)
            else:
                self._preparing.remove(prepared)
                self._resume(prepared)
            self._let_go(prepared.part.write.serial)
        self._aside, aside = [], self._aside
        for copying, staging, stage in aside:
            self._give_back(copying, staging, stage)

    def _resume(self, prepared: Prepared) -> None:
        """Its rows are in place. What has changed meanwhile? Not wanted any more: it never will be. Another way, other
        slabs: all over again."""
        part, receiver = prepared.part, prepared.part.write.receiver
        wanted, target = self._machine.wants(part.write.write), self.targets.get(receiver)
        if wanted and target is prepared.target and target.reach.lane is prepared.lane:
            self._send(prepared)
            return
        self._give_back(prepared.copying, prepared.staging, prepared.stage)
        if wanted:
            self._lines.setdefault(receiver, deque()).appendleft(part)
        else:
            self._do(self._machine.write_drained(part.write.write, set(part.indices)))

    def _give_back(self, copying: list[Copying], staging: Staging, stage: Stage | None) -> None:
        """A stage whose rows are not going to be posted: now, or when nothing copies to it any more."""
        if stage is None:
            return
        try:
            over = all(one.finished() for one in copying)
        except DeviceError:  # then nothing runs there
            over = True
        if over:
            staging.give(stage)
        else:
            self._aside.append((copying, staging, stage))

    def _post_all(self) -> None:
        """Post what is in line, one part of each receiver in turn: a receiver that takes nothing holds up no other."""
        under_way = Counter(p.part.write.receiver for p in self._posted.values() if not p.unknown)
        under_way.update(p.part.write.receiver for p in self._preparing)
        ready = deque(receiver for receiver, line in self._lines.items() if line)
        while ready:
            receiver = ready.popleft()
            line = self._lines[receiver]
            if under_way[receiver] >= MOST_POSTS:
                continue
            outcome = self._post(line[0])
            if outcome is Outcome.NO_STAGE:
                return  # first come, first served: nobody else may take what this one waits for (R3)
            serial = line.popleft().write.serial
            if outcome is Outcome.OVER:
                self._let_go(serial)
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
        target = self.targets.get(write.receiver)
        try:
            prepared = self._prepare(part, target)
            if prepared is None:
                return Outcome.NO_STAGE
            if prepared.content is not None:  # a GPU copies: it has only begun
                self._preparing.append(prepared)
                return Outcome.POSTED
        except Exception as problem:  # noqa: BLE001 - no byte has moved; it is this write's error and nobody else's
            return self._refuse(part, target, problem)
        return self._send(prepared)

    def _prepare(self, part: Part, target: Target | None) -> Prepared | None:
        """Bring the rows to where they can be written from: at once on the host, and by a GPU when it says so. None:
        has to wait for staging."""
        write = part.write
        if target is None:
            raise TransportError("the receiver cannot be reached any more")
        source, lane = self.sources[write.serial], target.reach.lane
        if lane.barred is not None:
            raise lane.barred
        slab = target.geometry.slab_of(part.block)
        if target.generations[slab] != part.generation:
            raise OutOfBounds(f"slab {slab} of the receiver has other memory by now")
        plan = self._plan(write.receiver, part.block)
        staging, rows = self.staging.choose(lane.transport, source.place)
        if source.place != HOST and not rows:  # they cannot be joined later
            rows = self._spans(source, part) > lane.transport.capabilities.max_copies
        needed = plan.stage_bytes(source.names, part.count, rows=rows)
        stage = staging.take(needed) if needed else None
        if needed and stage is None:
            return None
        inside = part.block - target.geometry.slab_blocks(slab).start
        copying: list[Copying] = []
        content = None
        try:
            device = self._device(source.place)
            copying.append(batch := device.batch())
            with batch:
                copies = write_plan(
                    source, plan, part.index, inside, part.count, stage, rows=rows, device=device, batch=batch
                )
            if device is not HOST_DEVICE:
                if rows and stage is not None:
                    blocks = staged_views(source, plan, part.index, part.count, stage, device)
                else:
                    blocks = [list(source.block_views(index, self._block_size, device)) for index in part.indices]
                copying.append(content := device.read(blocks, source.integrity))
        except Exception:
            self._give_back(copying, staging, stage)
            raise
        return Prepared(part, target, lane, source, staging, stage, rows, copies, copying, content)

    def _device(self, place: Place) -> Device:
        if place not in self._devices:
            self._devices[place] = between(HOST, place)
        return self._devices[place]

    def _spans(self, source: Source, part: Part) -> int:
        start, stop = part.index * self._block_size, (part.index + part.count) * self._block_size
        return 1 + sum(len(source.spans(name, start, min(stop, source.total_tokens))) for name in source.names)

    def _send(self, prepared: Prepared) -> Outcome:
        """Post what lies ready."""
        part, target, lane, stage = prepared.part, prepared.target, prepared.lane, prepared.stage
        transport = lane.transport
        try:
            remote = RemoteRegion(*lane.regions[target.geometry.slab_of(part.block)])
            copies = [Copy(c.local, c.local_offset, remote, c.slab_offset, c.nbytes) for c in prepared.copies]
            if len(copies) > transport.capabilities.max_copies:
                copies = joined(copies)
            digests = self._digests(prepared)
            handle = transport.post(lane.peer, copies)
        except Exception as problem:  # noqa: BLE001 - refused before any byte moved; it is this write's error and nobody else's
            self._give_back(prepared.copying, prepared.staging, stage)
            return self._refuse(part, target, problem)
        self._posts += 1
        read = stage is not None and prepared.rows
        self._posted[self._posts] = Posted(part, transport, handle, stage, read, digests, prepared.staging)
        return Outcome.POSTED

    def _refuse(self, part: Part, target: Target | None, problem: Exception) -> Outcome:
        write = part.write
        log.log(logging.DEBUG if isinstance(problem, FerryError) else logging.ERROR, "post refused: %r", problem)
        if isinstance(problem, DeviceError):  # the rows cannot be read: by no way, and not the next time either
            self._do(self._machine.cancel(write.serial, problem))
        error = problem if isinstance(problem, TransportError) else TransportError(f"a post was refused: {problem}")
        # An error of place is about the place, one of a device about the rows, and neither about the way.
        if target is not None and not isinstance(problem, OutOfBounds | DeviceError):
            self._went_wrong(write, self._posts + 1, target.reach.lane.transport, str(error.cause))
        self._do(self._machine.write_failed(write.write, set(part.indices), error))
        return Outcome.OVER

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
        carries, path = target.reach.way
        log.warning("%s failed %d times in a row (%s); %s carries", transport.name, FALL_BACK_AFTER, reason, carries)
        self._do(self._machine.connected(receiver, None, carries, path))

    def _went_another_way(self, target: Target, posted: Posted) -> bool:
        """Under `require` a write that did ends its transfer, is not reported as done, and its way is used no more."""
        reach, write = target.reach, posted.part.write
        lane, known = reach.lane_of(posted.transport.name), reach.way
        error = None if lane is None else reach.check(lane, self._carriers.require)
        if error is None:
            if reach.way != known:  # the receiver is to hear it with this write's Done
                self._do(self._machine.connected(write.receiver, None, *reach.way))
            return False
        self._do(self._machine.cancel(write.serial, error))
        self._do(self._machine.write_failed(write.write, set(posted.part.indices), error))
        left = error if reach.lane.barred is not None else None
        self._do(self._machine.connected(write.receiver, left, *reach.way))
        return True

    def _digests(self, prepared: Prepared) -> dict[int, int]:
        write, source = prepared.part.write, prepared.source
        found: dict[int, int] = {}
        for k, index in enumerate(prepared.part.indices):
            content = prepared.content
            block = source.block_views(index, self._block_size) if content is None else content.blocks[k]
            seed = block_seed(write.receiver, write.xfer, write.content_id, index)
            found[index] = digest(block, seed, source.integrity)
        return found

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
                    posted.staging.strand(posted.stage)
                error = UnknownInFlight("a write has an unknown outcome", transport=transport.name)
                self._went_wrong(posted.part.write, number, transport, error.cause)
                self._do(self._machine.write_unknown(write, error))
            if not drained and not (posted.read and posted.stage is None) and self._source_free(posted):
                posted.read = True
                if posted.stage is not None:
                    posted.staging.give(posted.stage)
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
            posted.staging.give(posted.stage)


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
