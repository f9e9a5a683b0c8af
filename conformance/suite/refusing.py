"""BND: what is wrong with a copy is said by `post`, before a byte moves."""

from __future__ import annotations

from functools import partial

from tensorferry.conformance.model import NotApplicable, check
from tensorferry.conformance.patterns import GUARD, difference
from tensorferry.conformance.stage import Pair, Stage, at
from tensorferry.core.errors import BadCall, FerryError, OutOfBounds, TransportError, Unsupported
from tensorferry.core.memory import Memory, host_memory
from tensorferry.core.transport import Copy, RemoteRegion, Status

SIZE = 4096


def _untouched(stage: Stage, pair: Pair, after: str) -> None:
    """A later post has ended, and nothing but its one byte at the end has been written."""
    pair.done(pair.post(b"\1", SIZE - 1), f"a post after {after}")
    wrong = difference(pair.read(0, SIZE - 1), bytes([GUARD]) * (SIZE - 1))
    stage.expect(not wrong, f"bytes moved for {after}: {wrong}")


def _refuse(stage: Stage, pair: Pair, copies: list[Copy], what: str, *errors: type[FerryError]) -> None:
    stage.refused(lambda: pair.writer.post(pair.peer, copies), *(errors or (OutOfBounds,)), what=what)


@check("BND-1")
def remote_bounds(stage: Stage) -> None:
    for size in (SIZE, 100, 1):
        pair = stage.pair(size)
        stage.region(pair.owner, SIZE)  # a neighbour, which an address past the end may well meet
        pair.reconnect()
        source = pair.source(stage.pattern(SIZE + 1))
        wrong = [
            (size, 1),
            (0, size + 1),
            (size - 1, 2),
            (-1, 2),
            (-1, 1),
            (size + SIZE, 1),
            (1 << 31, 1),
            (1 << 62, 1),
        ]
        for offset, nbytes in [*wrong, (1 << 62, 1), ((1 << 63) - 1, 2), ((1 << 64) - 1, 2), (-(1 << 62), 1)]:
            what = f"a copy to [{offset}, {offset + nbytes}) of a region of {size} bytes"
            _refuse(stage, pair, [Copy(source, 0, at(pair.region), offset, nbytes)], what)


@check("BND-2")
def local_bounds(stage: Stage) -> None:
    pair = stage.pair(SIZE)
    for size in (64, 1):
        source = pair.source(stage.pattern(size))
        for offset, nbytes in [
            (size, 1),
            (0, size + 1),
            (size - 1, 2),
            (-1, 2),
            (-1, 1),
            (1 << 62, 1),
            (-(1 << 62), 1),
        ]:
            what = f"a copy from [{offset}, {offset + nbytes}) of local memory of {size} bytes"
            _refuse(stage, pair, [Copy(source, offset, at(pair.region), 0, nbytes)], what)
    _untouched(stage, pair, "copies from outside the local memory")


@check("BND-3")
def straddling(stage: Stage) -> None:
    owner, writer = stage.open(), stage.open()
    if owner.capabilities.allocates_targets:
        first, second = stage.region(owner, SIZE), stage.region(owner, SIZE)
        stage.note("side by side", first.memory.address + SIZE == second.memory.address)
    else:
        both = host_memory(2 * SIZE)
        both.view()[:] = bytes([GUARD]) * both.nbytes
        first = owner.register(Memory(both.address, SIZE, owner=both))
        second = owner.register(Memory(both.address + SIZE, SIZE, owner=both))
    pair = Pair(stage, owner, writer, first, writer.connect(owner.describe()))
    source = pair.source(stage.pattern(2 * SIZE))
    for region, offset, nbytes in (
        (first, SIZE - 1, 2),
        (first, SIZE - 32, 64),
        (first, 0, 2 * SIZE),
        (first, SIZE, 64),
        (second, -32, 64),
        (second, -SIZE, SIZE),
    ):
        name = "the first" if region is first else "the second"
        what = f"a copy to [{offset}, {offset + nbytes}) of {name} of two neighbouring regions of {SIZE} bytes"
        _refuse(stage, pair, [Copy(source, 0, at(region), offset, nbytes)], what)
    wrong = difference(pair.read(region=second), bytes([GUARD]) * SIZE)
    stage.expect(not wrong, f"a refused copy wrote into the neighbouring region: {wrong}")
    _straddling_sources(stage, pair)


def _straddling_sources(stage: Stage, pair: Pair) -> None:
    if not pair.writer.capabilities.registers_sources:
        return
    memory = pair.writer.allocate(2 * SIZE)
    try:
        halves = [pair.writer.register(Memory(memory.address + n * SIZE, SIZE, owner=memory)) for n in range(2)]
    except FerryError as error:
        stage.note("parts of one piece of memory are not registered", error)
        return
    what = "a copy that begins in one local region and ends in the next"
    _refuse(stage, pair, [Copy(halves[0], SIZE - 32, at(pair.region), 0, 64)], what)


@check("BND-4")
def unknown_regions(stage: Stage) -> None:
    pair = stage.pair(SIZE)
    source = pair.source(b"x" * 64)
    known = pair.region.id
    for number in (known + 1, known + 1000, 1 << 40, -1):
        remote = RemoteRegion(number, pair.region.generation)
        _refuse(stage, pair, [Copy(source, 0, remote, 0, 64)], f"a copy to region {number}, which is not there,")


@check("BND-5")
def generations(stage: Stage) -> None:
    pair = stage.pair(SIZE)
    source = pair.source(b"x" * 64)
    now = pair.region.generation
    for generation in (now + 1, now - 1, now + 1000, -1):
        remote = RemoteRegion(pair.region.id, generation)
        what = f"a copy to generation {generation} of a region of generation {now}"
        _refuse(stage, pair, [Copy(source, 0, remote, 0, 64)], what)
    old = pair.region
    pair.owner.retire(old)
    pair.reconnect()
    _refuse(stage, pair, [Copy(source, 0, at(old), 0, 64)], "a copy to a retired region")
    for _ in range(8):
        pair.region = stage.region(pair.owner, SIZE)
        pair.reconnect()
        what = f"a copy to {at(old)}, retired, with {at(pair.region)} registered since,"
        _refuse(stage, pair, [Copy(source, 0, at(old), 0, 64)], what)
    pair.done(pair.post(b"fresh"))
    pair.placed(b"fresh")
    stage.expect(bytes(old.memory.view(0, 64)) == bytes([GUARD]) * 64, "a retired region was written to")


@check("BND-6")
def all_or_nothing(stage: Stage) -> None:
    pair = stage.pair(SIZE)
    good = Copy(pair.source(stage.pattern(64)), 0, at(pair.region), 0, 64)
    source, remote = good.local, at(pair.region)
    wrong = {
        "one byte too far": Copy(source, 0, remote, SIZE - 63, 64),
        "a byte past its source": Copy(source, 1, remote, 128, 64),
        "an unknown region": Copy(source, 0, RemoteRegion(remote.id + 7, remote.generation), 0, 64),
        "another generation": Copy(source, 0, RemoteRegion(remote.id, remote.generation + 1), 0, 64),
    }
    for name, bad in wrong.items():
        for place in (0, 1, 2):
            copies = [good, good]
            copies.insert(place, bad)
            what = f"a batch of three whose copy {place} goes to {name}"
            _refuse(stage, pair, copies, what)
    _untouched(stage, pair, "batches with one wrong copy")


@check("BND-7")
def too_many(stage: Stage) -> None:
    most = stage.open().capabilities.max_copies
    if most > 1 << 20:
        stage.unknown(f"max_copies is {most}: more than the suite builds")
    pair = stage.pair(SIZE)
    copy = Copy(pair.source(b"x"), 0, at(pair.region), 0, 1)
    _refuse(stage, pair, [copy] * (most + 1), f"a batch of {most + 1} copies, where {most} are declared,", Unsupported)
    _untouched(stage, pair, "a batch that is too long")


@check("BND-8")
def negative_lengths(stage: Stage) -> None:
    pair = stage.pair(SIZE)
    source = pair.source(b"x" * 64)
    for nbytes in (-1, -64, -(1 << 62)):
        for offset in (0, 64):
            what = f"a copy of {nbytes} bytes"
            _refuse(stage, pair, [Copy(source, 0, at(pair.region), offset, nbytes)], what, OutOfBounds, BadCall)
    _untouched(stage, pair, "copies of negative lengths")


@check("BND-9")
def undeclared_sources(stage: Stage) -> None:
    pair = stage.pair(SIZE)
    if "cuda" in pair.writer.capabilities.memory_kinds:
        raise NotApplicable("declares all kinds that there are")
    real = host_memory(SIZE)
    copies = [Copy(Memory(real.address, SIZE, "cuda", real), 0, at(pair.region), 0, 64)]
    _refuse(stage, pair, copies, "a copy from cuda memory, which is not declared,", Unsupported)
    _untouched(stage, pair, "a copy from memory of a kind that is not declared")


@check("BND-10")
def dead_sources(stage: Stage) -> None:
    pair = stage.pair(SIZE)
    retired = stage.region(pair.writer, 64)
    pair.writer.retire(retired)
    _refuse(stage, pair, [Copy(retired, 0, at(pair.region), 0, 64)], "a copy from a retired local region")
    other = stage.open()
    for _ in range(3):
        foreign = stage.region(other, 64)
    _refuse(stage, pair, [Copy(foreign, 0, at(pair.region), 0, 64)], "a copy from a region of another instance")
    _untouched(stage, pair, "copies from regions that are not registered here")


@check("BND-11")
def unregistered_sources(stage: Stage) -> None:
    pair = stage.pair(SIZE)
    memory = host_memory(64)
    copies = [Copy(memory, 0, at(pair.region), 0, 64)]
    _refuse(stage, pair, copies, "a copy from memory that is not registered", TransportError)
    _untouched(stage, pair, "a copy from memory that is not registered")


@check("BND-12", seconds=180)
def stale_writer(stage: Stage) -> None:
    """The writer has an old descriptor: one of the regions of a batch is retired by now, whichever copy names it."""
    for count, place in ((2, 1), (2, 0), (3, 1)):
        pair = stage.pair(SIZE)
        regions = [pair.region, *(pair.target(SIZE) for _ in range(1, count))]
        gone = regions[place]
        data = stage.pattern(count * SIZE)
        source = pair.source(data)
        pair.owner.retire(gone)
        copies = [Copy(source, n * SIZE, at(region), 0, SIZE) for n, region in enumerate(regions)]
        answer = stage.attempt(
            partial(pair.writer.post, pair.peer, copies), "a post by a writer with an old descriptor"
        )
        told = answer if isinstance(answer, FerryError) else pair.end(answer, 60)
        stage.note(f"copy {place} of {count} to a retired region", told if isinstance(told, FerryError) else told.name)
        if told is not Status.DONE:
            continue
        for n, region in enumerate(regions):
            pair.flush(region) if region is not gone else None
            if region is gone and pair.owner.capabilities.needs_flush:
                continue  # nobody flushes what is retired
            what = f"copy {n} of {count}, to a region that is {'retired' if region is gone else 'live'},"
            pair.placed(data[n * SIZE :][:SIZE], region=region, what=what)
