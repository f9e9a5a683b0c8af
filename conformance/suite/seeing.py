"""VIS-1, VIS-3, ORD and THR-1: what stands there when DONE is said, after other posts, and with other threads."""

from __future__ import annotations

import threading

from tensorferry.conformance.model import check
from tensorferry.conformance.patterns import GUARD, difference
from tensorferry.conformance.stage import Stage, at
from tensorferry.core.transport import Copy, Region, Status


@check("VIS-1", seconds=60)
def done_is_visible(stage: Stage) -> None:
    size = 2 << 20
    pair = stage.pair(size)
    for attempt in range(stage.times(20, 100, 1000)):
        nbytes = stage.random.choice((1, 100, 4096, 100_000, size))
        data = stage.pattern(nbytes, attempt)
        half = nbytes // 2
        copies = [Copy(pair.source(data), 0, at(pair.region), 0, nbytes)]
        if half:
            copies = [Copy(copies[0].local, o, at(pair.region), o, n) for o, n in ((0, half), (half, nbytes - half))]
        pair.region.memory.view(0, nbytes)[:] = bytes([GUARD]) * nbytes
        handle = pair.writer.post(pair.peer, copies)
        while (status := pair.writer.poll(handle)) is Status.PENDING:
            pass  # no rest: the first moment at which DONE is said is what matters
        pair.flush()
        found = bytes(pair.region.memory.view(0, nbytes))
        stage.expect(status is Status.DONE, f"a post between two healthy ends ended {status.name}")
        wrong = difference(found, data)
        stage.expect(not wrong, f"DONE was said before all was to be seen (attempt {attempt}, {nbytes} bytes): {wrong}")
        pair.writer.release(handle)
        if isinstance(copies[0].local, Region):
            pair.writer.retire(copies[0].local)


@check("VIS-3")
def flushes_at_any_time(stage: Stage) -> None:
    pair = stage.pair(1 << 20)
    pair.owner.flush(pair.region)
    pair.owner.flush(pair.region)
    data = stage.pattern(1 << 20)
    handle = pair.post(data)
    pair.owner.flush(pair.region)
    pair.done(handle)
    pair.placed(data)
    pair.owner.flush(pair.region)
    pair.placed(data, what="after a second flush, the copy")


@check("ORD-1")
def the_newest_wins(stage: Stage) -> None:
    pair = stage.pair(100_000)
    sources = [(data := stage.pattern(100_000, n), pair.source(data)) for n in range(4)]
    for attempt in range(stage.times(20, 100, 1000)):
        data, source = sources[attempt % 4]
        if attempt % 2:  # over bytes that are placed and perhaps not visible yet: nobody has flushed
            handle = pair.writer.post(pair.peer, [Copy(sources[attempt % 3][1], 0, at(pair.region), 0, 100_000)])
            stage.done(pair.writer, handle)
            pair.writer.release(handle)
        pair.done(pair.writer.post(pair.peer, [Copy(source, 0, at(pair.region), 0, 100_000)]))
        wrong = difference(pair.read(), data)
        stage.expect(not wrong, f"after the DONE of write {attempt} its bytes do not stand there: {wrong}")
    data = sources[attempt % 4][0]
    stage.settle()
    pair.flush()
    wrong = difference(pair.read(), data)
    stage.expect(not wrong, f"an earlier write landed after the last one's DONE: {wrong}")


@check("ORD-2")
def outstanding_posts_may_mix(stage: Stage) -> None:
    size = 1 << 18
    one, other = 0x11, 0x22
    pair = stage.pair(2 * size)
    first, second = (pair.source(bytes([byte]) * size) for byte in (one, other))
    for attempt in range(stage.times(6, 20, 200)):
        shift = (0, 1, 4096, size // 2)[attempt % 4]
        pair.region.memory.view()[:] = bytes([GUARD]) * (2 * size)
        handles = [
            pair.writer.post(pair.peer, [Copy(source, 0, at(pair.region), offset, size)])
            for source, offset in ((first, 0), (second, shift))
        ]
        for handle in handles:
            pair.done(handle, "one of two posts to the same bytes, outstanding at the same time,")
        found = pair.read()
        what = f"of two outstanding posts to [0, {size}) and [{shift}, {shift + size})"
        wrong = difference(found[:shift], bytes([one]) * shift)
        stage.expect(not wrong, f"{what}, the first's own bytes are not placed: {wrong}")
        wrong = difference(found[size : size + shift], bytes([other]) * shift, size)
        stage.expect(not wrong, f"{what}, the second's own bytes are not placed: {wrong}")
        strange = set(found[shift:size]) - {one, other}
        stage.expect(not strange, f"{what}, bytes of both are neither's: 0x{bytes(sorted(strange))[:4].hex()}")
    stage.settle()
    wrong = difference(pair.read(), found)
    stage.expect(not wrong, f"what two outstanding posts had written changed after both were DONE: {wrong}")


@check("THR-1", seconds=60)
def works_from_four_threads(stage: Stage) -> None:
    posts, size = stage.times(20, 60, 400), 4096
    pair = stage.pair(4 * posts * size)
    data = stage.pattern(4 * posts * size)
    source = pair.source(data)
    problems: list[str] = []

    def work(part: int) -> None:
        try:
            for n in range(part * posts, (part + 1) * posts):
                copy = Copy(source, n * size, at(pair.region), n * size, size)
                handle = pair.writer.post(pair.peer, [copy])
                stage.done(pair.writer, handle, f"post {n} of thread {part}")
                pair.writer.release(handle)
        except Exception as error:  # noqa: BLE001 - told below, by the thread that runs the check
            problems.append(f"thread {part}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(part,), daemon=True) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stage.expect(not problems, "; ".join(problems))
    pair.flush()
    pair.placed(data, what="what four threads wrote")
