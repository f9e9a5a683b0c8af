"""XFR-6, 12, 16 and 21: what is read, for how long, and from which memory."""

from __future__ import annotations

import mmap
import time
from ctypes import CDLL, addressof, c_char, c_size_t, c_void_p

from tensorferry.conformance.model import check
from tensorferry.conformance.patterns import SEAL, difference
from tensorferry.conformance.stage import FINAL, PATIENCE_S, Pair, Stage, at
from tensorferry.core.memory import Memory
from tensorferry.core.transport import Copy, Region, Status


@check("XFR-6")
def leaves_the_source_alone(stage: Stage) -> None:
    for nbytes in (100, 1 << 20, (3 << 20) + 1):
        pair = stage.pair(nbytes)
        data = stage.pattern(nbytes)
        source = pair.source(data)
        for _ in range(3):
            pair.done(pair.writer.post(pair.peer, [Copy(source, 0, at(pair.region), 0, nbytes)]))
        memory = source.memory if isinstance(source, Region) else source
        wrong = difference(bytes(memory.view(0, nbytes)), data)
        stage.expect(not wrong, f"the source of a copy of {nbytes} bytes was changed: {wrong}")


@check("XFR-12")
def reads_from_what_it_declares(stage: Stage) -> None:
    pair = stage.pair(1 << 16)
    data = stage.pattern(1 << 16)
    memory = pair.writer.allocate(len(data))
    memory.view()[:] = data
    region = pair.writer.register(memory)
    pair.done(pair.writer.post(pair.peer, [Copy(region, 0, at(pair.region), 0, len(data))]), "a post from a region")
    pair.placed(data, what="what lies in a registered region,")
    if pair.writer.capabilities.registers_sources:
        return
    plain = bytearray(stage.pattern(5001, "plain"))
    memory = Memory(addressof(c_char.from_buffer(plain)), len(plain), owner=plain)
    pair.done(pair.writer.post(pair.peer, [Copy(memory, 1, at(pair.region), 0, 5000)]), "a post from plain memory")
    pair.placed(bytes(plain[1:]), what="what lies in memory that is not registered,")
    nbytes = 8192
    mapped = mmap.mmap(-1, nbytes)
    mapped[:] = data = stage.pattern(nbytes, "read-only")
    memory = Memory(addressof(c_char.from_buffer(mapped)), nbytes, owner=mapped)
    if CDLL(None).mprotect(c_void_p(memory.address), c_size_t(nbytes), mmap.PROT_READ) != 0:
        stage.unknown("the system did not make memory read-only")
    copies = [Copy(memory, 0, at(pair.region), 0, nbytes)]
    pair.done(pair.writer.post(pair.peer, copies), "a post from read-only memory")
    pair.placed(data, what="what lies in read-only memory,")


@check("XFR-16")
def shares_a_source(stage: Stage) -> None:
    pair = stage.pair(8 * 100_000)
    data = stage.pattern(100_000)
    source = pair.source(data)
    batches = [[Copy(source, 0, at(pair.region), (4 * b + n) * 100_000, 100_000) for n in range(4)] for b in range(2)]
    for handle in [pair.writer.post(pair.peer, copies) for copies in batches]:
        pair.done(handle)
    for n in range(8):
        pair.placed(data, n * 100_000, what=f"copy {n} of 8 of the same source,")


@check("XFR-21", seconds=60)
def leaves_a_free_source_alone(stage: Stage) -> None:
    """One piece of staging, filled anew as soon as that is allowed; nobody flushes before the end."""
    sizes, rounds = (1, 100, 4097, 100_001, 1 << 18), stage.times(10, 30, 200)
    told: list[tuple[str, Pair, list[bytes]]] = []
    for moment in ("it was DONE", "source_free had answered True"):
        pair = stage.pair(rounds * sizes[-1])
        source = pair.source(bytes(sizes[-1]))
        view = (source.memory if isinstance(source, Region) else source).view()
        datas, handles = [], []
        for n in range(rounds):
            data = stage.pattern(sizes[n % 5], n)
            view[: len(data)] = data
            handle = pair.writer.post(pair.peer, [Copy(source, 0, at(pair.region), n * sizes[-1], len(data))])
            _spin_until_free(stage, pair, handle, by_status=moment == "it was DONE")
            view[: len(data)] = bytes([SEAL]) * len(data)
            datas.append(data)
            handles.append(handle)
        for handle in handles:
            stage.done(pair.writer, handle)
            pair.writer.release(handle)
        told.append((moment, pair, datas))
    stage.settle()
    for moment, pair, datas in told:
        pair.flush()
        for n, data in enumerate(datas):
            wrong = difference(pair.read(n * sizes[-1], len(data)), data)
            what = f"the source of a post of {len(data)} bytes was read after {moment}"
            stage.expect(not wrong, f"{what}: what was written to it then has arrived, or its bytes have not: {wrong}")


def _spin_until_free(stage: Stage, pair: Pair, handle: int, *, by_status: bool) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        status = pair.writer.poll(handle)
        if status is Status.DONE if by_status else pair.writer.source_free(handle):
            return
        ended = by_status and status in FINAL
        stage.expect(not ended, f"a post between two healthy ends ended {status!r}, not DONE")
        stage.expect(time.monotonic() < deadline, f"the source of a post is not free after {PATIENCE_S:g} s")
