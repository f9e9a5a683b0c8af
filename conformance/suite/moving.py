"""XFR: what is posted arrives, at its place, once, and nothing else does. The source's rules are in reading.py."""

from __future__ import annotations

import time
from functools import partial

from tensorferry.conformance.model import check
from tensorferry.conformance.patterns import GUARD, difference
from tensorferry.conformance.stage import Pair, Stage, at, shuffled
from tensorferry.core.errors import BadCall, FerryError, OutOfBounds
from tensorferry.core.memory import Memory, host_memory
from tensorferry.core.transport import Copy

MOST_COPIES = 65_536


@check("XFR-1")
def places_every_byte(stage: Stage) -> None:
    sizes = [1, 2, 3, 7, 8, 63, 64, 65, 255, 4095, 4096, 4097, 65_535, 65_537, (1 << 20) - 1, 1 << 20, (1 << 20) + 1]
    sizes += [stage.random.randrange(1, 3 << 20) for _ in range(stage.times(2, 8, 60))]
    sizes += [] if stage.tier == 0 else [(4 << 20) + 13, (8 << 20) - 1]
    pair = stage.pair(max(sizes) + 64)
    for nbytes in sizes:
        data = stage.pattern(nbytes, nbytes)
        pair.region.memory.view(0, nbytes)[:] = bytes([GUARD]) * nbytes
        handle = pair.post(data)
        pair.done(handle, f"a copy of {nbytes} bytes")
        pair.placed(data)


@check("XFR-2")
def honours_local_offsets(stage: Stage) -> None:
    size = (5 << 20) if stage.tier == 0 else (20 << 20)
    pair = stage.pair(1000)
    data = stage.pattern(size)
    source = pair.source(data)
    for offset in _offsets(stage, size):
        nbytes = min(1000, size - offset)
        pair.done(pair.writer.post(pair.peer, [Copy(source, offset, at(pair.region), 0, nbytes)]))
        wrong = difference(pair.read(0, nbytes), data[offset : offset + nbytes])
        stage.expect(not wrong, f"{nbytes} bytes from local offset {offset} are not what lies there: {wrong}")


@check("XFR-3")
def honours_remote_offsets(stage: Stage) -> None:
    size = (5 << 20) if stage.tier == 0 else (20 << 20)
    pair = stage.pair(size)
    for offset in _offsets(stage, size):
        data = stage.pattern(min(1000, size - offset), offset)
        pair.done(pair.post(data, offset))
        wrong = difference(pair.read(offset, len(data)), data)
        if wrong:
            where = pair.read().find(data) if len(data) > 8 else -1
            found = f"; they are at offset {where}" if where >= 0 else ""
            stage.fail(f"{len(data)} bytes to remote offset {offset} are not there: {wrong}{found}")
        pair.region.memory.view(offset, len(data))[:] = bytes([GUARD]) * len(data)


def _offsets(stage: Stage, size: int) -> list[int]:
    """Odd and even ones, small and large, and the last byte's."""
    fixed = [1, 64, 4095, 4096, 50_001, (1 << 16) - 1, (1 << 20) + 3, (4 << 20) + 4099]
    return [*fixed, *(stage.random.randrange(size) for _ in range(stage.times(4, 12, 60))), size - 1]


@check("XFR-4")
def keeps_copies_apart(stage: Stage) -> None:
    for count, longest in ((2, 64), (3, 5000), (stage.times(50, 400, 1000), 700)):
        copies = min(count, stage.open().capabilities.max_copies)
        lengths = [stage.random.randrange(1, longest) for _ in range(copies)]
        _scatter(stage, lengths, [64] * copies, f"a batch of {copies} copies of different lengths")
        _scatter(stage, [64] * copies, lengths, f"a batch of {copies} copies of the same length")


def _scatter(stage: Stage, lengths: list[int], gaps: list[int], what: str) -> None:
    """Copies from shuffled places to shuffled places, named in shuffled order."""
    numbers = range(len(lengths))
    remote = _laid_out(shuffled(stage.random, numbers), lengths, gaps)
    local = _laid_out(shuffled(stage.random, numbers), lengths, [0] * len(lengths))
    pair = stage.pair(sum(lengths) + sum(gaps))
    data = stage.pattern(sum(lengths), what)
    source = pair.source(data)
    order = shuffled(stage.random, numbers)
    copies = [Copy(source, local[n], at(pair.region), remote[n], lengths[n]) for n in order]
    pair.done(pair.writer.post(pair.peer, copies), what)
    found = pair.read()
    pieces = {n: data[local[n] : local[n] + lengths[n]] for n in numbers}
    for place, n in enumerate(order):
        wrong = difference(found[remote[n] : remote[n] + lengths[n]], pieces[n], remote[n])
        if wrong:
            other = next((order.index(m) for m in numbers if pieces[m] in found[remote[n] :][: lengths[n]]), None)
            hint = f"; copy {other} of the batch is there instead" if other is not None and lengths[n] > 3 else ""
            stage.fail(f"in {what}, copy {place} was not placed: {wrong}{hint}")


def _laid_out(order: list[int], lengths: list[int], gaps: list[int]) -> dict[int, int]:
    places, at_ = {}, 0
    for n in order:
        places[n] = at_
        at_ += lengths[n] + gaps[n]
    return places


@check("XFR-5")
def touches_nothing_else(stage: Stage) -> None:
    size = 1 << 16
    owner, writer = stage.open(), stage.open()
    around = None
    if owner.capabilities.allocates_targets:
        regions = [stage.region(owner, size) for _ in range(3)]
    else:
        around = host_memory(5 * size)  # the region lies between guards of our own
        around.view()[:] = bytes([GUARD]) * around.nbytes
        regions = [owner.register(Memory(around.address + n * size, size, owner=around)) for n in (1, 2, 3)]
    pair = Pair(stage, owner, writer, regions[1], writer.connect(owner.describe()))
    guard = bytes([GUARD])
    spots = [(0, 1), (0, 100), (1, 63), (4095, 2), (size - 100, 100), (size - 1, 1), (0, size)]
    for offset, nbytes in spots:
        for region in regions:
            region.memory.view()[:] = guard * size
        data = stage.pattern(nbytes, offset)
        pair.done(pair.post(data, offset))
        after = pair.read(offset + nbytes)
        wrong = difference(after, guard * len(after), offset + nbytes) or difference(
            pair.read(0, offset), guard * offset
        )
        what = f"a copy to [{offset}, {offset + nbytes})"
        stage.expect(not wrong, f"{what} touched others: {wrong}")
        for name, region in (("before", regions[0]), ("after", regions[2])):
            wrong = difference(pair.read(region=region), guard * size)
            stage.expect(not wrong, f"{what} touched the region {name} it: {wrong}")
        if around is not None:
            for place, name in ((0, "before the first"), (4 * size, "after the last")):
                wrong = difference(around.view(place, size), guard * size)
                stage.expect(not wrong, f"{what} touched memory {name} region: {wrong}")


@check("XFR-7")
def reaches_both_ends(stage: Stage) -> None:
    for size in (1, 64, 100, 4096, 4097, 65_536, (1 << 20) + 1):
        pair = stage.pair(size)
        for name, offset in (("first", 0), ("last", size - 1)):
            answer = stage.attempt(partial(pair.post, b"\1", offset), "post")
            what = f"the {name} byte of a region of {size} bytes"
            if isinstance(answer, FerryError):
                stage.fail(f"a copy to {what} was refused: {answer}")
            pair.done(answer, f"a copy to {what}")
            found = pair.read(offset, 1)
            stage.expect(found == b"\1", f"DONE, and {what} was not written: found 0x{found.hex()}, expected 0x01")
        data = stage.pattern(size)
        pair.done(pair.post(data))
        pair.placed(data, what=f"a copy that fills a region of {size} bytes,")


@check("XFR-8", seconds=60)
def takes_the_declared_number(stage: Stage) -> None:
    most = min(stage.open().capabilities.max_copies, MOST_COPIES)
    pair = stage.pair(most * 3)
    data = stage.pattern(most * 3)
    source = pair.source(data)
    copies = [Copy(source, 3 * n, at(pair.region), 3 * n, 3) for n in range(most)]
    pair.done(pair.writer.post(pair.peer, copies), f"a batch of {most} copies")
    pair.placed(data, what=f"a batch of {most} copies")


@check("XFR-9", seconds=60)
def goes_beyond_the_preferred_size(stage: Stage) -> None:
    preferred = stage.open().capabilities.preferred_post_bytes
    nbytes = min(preferred, 64 << 20) * 2 + 4097
    pair = stage.pair(nbytes)
    data = stage.pattern(nbytes)
    pair.done(pair.post(data), f"a copy of {nbytes} bytes")
    pair.placed(data)


@check("XFR-10", seconds=90)
def posts_at_once(stage: Stage) -> None:
    pair = stage.pair(64)
    quickest = min(_timed_small(stage, pair) for _ in range(5))
    stage.note("quickest post of 1 byte, s", f"{quickest:.4f}")
    stage.expect(quickest < 0.2, f"the quickest of five posts of one byte took {quickest:.2f} s to return")
    _bulk(stage, waiting="post")


@check("XFR-20", seconds=90)
def polls_at_once(stage: Stage) -> None:
    _bulk(stage, waiting="poll")


def _timed_small(stage: Stage, pair: Pair) -> float:
    source = pair.source(b"x")
    handle, took = stage.timed(lambda: pair.writer.post(pair.peer, [Copy(source, 0, at(pair.region), 0, 1)]))
    pair.done(handle)
    return took


def _bulk(stage: Stage, *, waiting: str) -> None:
    """A post so long that a verb which waits for it, or does it, is told from one that does not. Three attempts: only
    what each of them shows is no accident of scheduling."""
    piece = 16 << 20
    pair = stage.pair(piece)
    source = pair.source(stage.pattern(1 << 20) * 16)
    seen: list[str] = []
    count, most = 4, pair.writer.capabilities.max_copies
    while len(seen) < 3:
        copies = [Copy(source, 0, at(pair.region), 0, piece)] * min(count, most)
        begun = time.monotonic()
        handle = pair.writer.post(pair.peer, copies)
        posted = time.monotonic() - begun
        status = pair.writer.poll(handle)
        polled = time.monotonic() - begun - posted
        pair.writer.drained(handle)
        asked = time.monotonic() - begun - posted - polled
        stage.done(pair.writer, handle)
        whole = time.monotonic() - begun
        pair.writer.release(handle)
        if whole < 0.25 and count < min(most, 128):
            count *= 2
            continue
        took = posted if waiting == "post" else max(polled, asked)
        stage.note(f"attempt {len(seen)}", f"{waiting} took {took:.4f} s of {whole:.3f} s, then {status.name}")
        if took < 0.05 or took < whole / 2:
            return
        seen.append(f"{took:.2f} s of the {whole:.2f} s until DONE")
    stage.fail(f"{waiting} waits for the bytes: with {len(copies)} copies of 16 MiB it took {', '.join(seen)}")


@check("XFR-11")
def writes_once(stage: Stage) -> None:
    regions = []
    for _ in range(stage.times(1, 2, 6)):
        pair = stage.pair(4 << 20)
        regions.append(pair.region)
        handles = []
        for place, nbytes in ((0, 1), (4096, 5000), (65_536, 100_000), (1 << 20, 2 << 20)):
            handle = pair.post(stage.pattern(nbytes, place), place)
            stage.done(pair.writer, handle)
            handles.append(handle)
        pair.flush()
        stage.seal(pair.region)
        time.sleep(0.02)
        stage.sealed(pair.region, after="all posts were DONE")
        for handle in handles:
            pair.writer.release(handle)
        other = pair.target(4096)
        pair.done(pair.post(b"another", region=other))
    stage.settle()
    stage.sealed(*regions, after="all posts were DONE and released, and another post had been made")


@check("XFR-13")
def spans_regions(stage: Stage) -> None:
    pair = stage.pair(4096)
    regions = [pair.region, *(stage.region(pair.owner, 4096 + n) for n in range(1, 8))]
    pair.reconnect()
    data = stage.pattern(8 * 512)
    source = pair.source(data)
    order = shuffled(stage.random, range(8))
    copies = [Copy(source, 512 * n, at(regions[n]), 1000 + n, 512) for n in order]
    pair.done(pair.writer.post(pair.peer, copies), "a batch over 8 regions")
    for n, region in enumerate(regions):
        pair.placed(data[512 * n :][:512], 1000 + n, region, what=f"the copy for region {n} of 8")


@check("XFR-14")
def refuses_no_copies(stage: Stage) -> None:
    pair = stage.pair(64)
    stage.refused(lambda: pair.writer.post(pair.peer, []), BadCall, what="a post of no copies")


@check("XFR-15")
def moves_nothing_for_no_bytes(stage: Stage) -> None:
    pair = stage.pair(4096)
    source = pair.source(stage.pattern(64))
    for offset in (0, 100, 4096):
        copies = [Copy(source, 0, at(pair.region), offset, 0)]
        answer = stage.attempt(partial(pair.writer.post, pair.peer, copies), "a copy of no bytes")
        if isinstance(answer, FerryError):
            right = isinstance(answer, OutOfBounds | BadCall)
            stage.expect(right, f"a copy of no bytes raised {answer!r}; expected OutOfBounds or BadCall")
        else:
            pair.done(answer, "a copy of no bytes")
    wrong = difference(pair.read(), bytes([GUARD]) * 4096)
    stage.expect(not wrong, f"a copy of no bytes wrote: {wrong}")


@check("XFR-17")
def tells_peers_apart(stage: Stage) -> None:
    writer = stage.open()
    owners = [stage.open() for _ in range(3)]
    regions = [stage.region(owner, 4096) for owner in owners]
    peers = [writer.connect(owner.describe()) for owner in owners]
    datas = [stage.pattern(4096, n) for n in range(3)]
    handles = [
        writer.post(peers[n], [Copy(stage.source(writer, datas[n]), 0, at(regions[n]), 0, 4096)]) for n in (2, 0, 1)
    ]
    for handle in handles:
        stage.done(writer, handle)
    for n, owner in enumerate(owners):
        if owner.capabilities.needs_flush:
            owner.flush(regions[n])
        found = stage.read(owner, regions[n])
        stray = next((m for m in range(3) if m != n and found == datas[m]), None)
        hint = f": it has what was posted to peer {stray}" if stray is not None else ""
        stage.expect(found == datas[n], f"peer {n} of 3 does not have what was posted to it{hint}")


@check("XFR-18")
def writes_both_ways(stage: Stage) -> None:
    left = stage.pair(4 << 20)
    back = stage.region(left.writer, 4 << 20)
    peer = left.owner.connect(left.writer.describe())
    there, here = stage.pattern(4 << 20, "there"), stage.pattern(4 << 20, "here")
    source = stage.source(left.owner, here)
    first = left.post(there)
    second = left.owner.post(peer, [Copy(source, 0, at(back), 0, len(here))])
    third = left.owner.post(peer, [Copy(source, 0, at(back), 0, len(here))])
    left.done(first)
    stage.done(left.owner, second)
    stage.done(left.owner, third)
    left.placed(there, what="what went there")
    if left.writer.capabilities.needs_flush:
        left.writer.flush(back)
    wrong = difference(stage.read(left.writer, back), here)
    stage.expect(not wrong, f"DONE, and what went back was not placed: {wrong}")


@check("XFR-19", seconds=60)
def keeps_posts_apart(stage: Stage) -> None:
    count = stage.times(100, 1200, 5000)
    pair = stage.pair(count * 512)
    data = stage.pattern(count * 512)
    source = pair.source(data)
    handles: dict[int, int] = {}
    for n in shuffled(stage.random, range(count)):
        handle = pair.writer.post(pair.peer, [Copy(source, n * 512, at(pair.region), n * 512, 512)])
        stage.expect(handle not in handles, f"handle {handle} was given twice, and not released between")
        handles[handle] = n
    for handle in shuffled(stage.random, list(handles)):
        n = handles[handle]
        stage.done(pair.writer, handle, f"post {n}")
        pair.flush()
        pair.placed(data[n * 512 :][:512], n * 512, what=f"post {n} of {count}, asked for on its own,")
        pair.writer.release(handle)
