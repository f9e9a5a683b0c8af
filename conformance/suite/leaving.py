"""RES: what is left behind when a transport, a peer or a handle is given up."""

from __future__ import annotations

import gc
import mmap
import os
import threading
import tracemalloc
import weakref
from contextlib import suppress
from functools import partial

from tensorferry.conformance.model import NotApplicable, check
from tensorferry.conformance.patience import FACTOR
from tensorferry.conformance.stage import Stage, at
from tensorferry.conformance.suite.loading import opened
from tensorferry.core.errors import FerryError
from tensorferry.core.memory import Memory, host_memory
from tensorferry.core.transport import (
    Copy,
    Region,
    Transport,
)

LATE_S = 5.0 * FACTOR
"""How late what was closed may be given back."""


def _descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def _cycle(stage: Stage) -> None:
    owner, writer = stage.target.open(), stage.target.open()
    try:
        region = stage.region(owner, 4096)
        peer = writer.connect(owner.describe())
        source = stage.source(writer, b"x" * 64)
        stage.done(writer, writer.post(peer, [Copy(source, 0, at(region), 0, 64)]))
        writer.disconnect(peer)
        owner.retire(region)
    finally:
        writer.close()
        owner.close()


@check("RES-1", seconds=120)
def leaves_no_descriptor(stage: Stage) -> None:
    _cycle(stage)  # what is opened once for the process stays
    _cycle(stage)
    before, rounds = _descriptors(), stage.times(3, 8, 40)
    for _ in range(rounds):
        _cycle(stage)
    stage.eventually(lambda: _descriptors() <= before, LATE_S)
    more = _descriptors() - before
    stage.expect(more < rounds, f"{rounds} times open, write and close leave {more} more file descriptors open")


@check("RES-2", seconds=120)
def leaves_no_thread(stage: Stage) -> None:
    def tasks() -> int:
        return len(os.listdir("/proc/self/task"))

    _cycle(stage)
    _cycle(stage)
    before, rounds = tasks(), stage.times(3, 8, 40)
    known = set(threading.enumerate())
    for _ in range(rounds):
        _cycle(stage)
    stage.eventually(lambda: tasks() <= before, LATE_S)
    names = ", ".join(sorted({t.name for t in threading.enumerate() if t not in known})) or "of an engine"
    more = tasks() - before
    stage.expect(more < rounds, f"{rounds} times open, write and close leave {more} more threads: {names}")


@check("RES-6", seconds=120)
def leaves_no_file(stage: Stage) -> None:
    """/dev/shm is everybody's: where others leave files at the same time, it is this transport if each round does, and
    nobody has them open or mapped."""
    files = opened(stage)["files"]
    stage.expect(not files, f"open, write and close leave files behind: {', '.join(files[:5])}")
    _cycle(stage)
    left: list[set[str]] = []
    for _ in range(stage.times(3, 5, 20)):
        before = _files()
        _cycle(stage)
        left.append(_files() - before)
    if not all(left):
        return
    stage.eventually(lambda: not all(new & _files() for new in left), LATE_S)
    remaining, used = _files(), _used()
    left = [
        {file for file in new & remaining if not any(f"{one}/".startswith(f"{file}/") for one in used)} for new in left
    ]
    some = ", ".join(sorted(file for new in left for file in new)[:3])
    stage.expect(not all(left), f"each open, write and close leaves shared memory behind that nobody has open: {some}")


def _files() -> set[str]:
    """Memory that processes share by name."""
    return {entry.path for entry in os.scandir("/dev/shm")}


def _used() -> set[str]:
    """The files that a process which we may look at has open or mapped."""
    found: set[str] = set()
    for process in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            with open(f"/proc/{process}/maps", encoding="utf-8", errors="replace") as maps:
                found.update(line.split(maxsplit=5)[5].strip() for line in maps if "/" in line)
            folder = f"/proc/{process}/fd"
            found.update(os.readlink(f"{folder}/{number}") for number in os.listdir(folder))
    return found


@check("RES-7", seconds=120)
def gives_memory_back(stage: Stage) -> None:
    piece, rounds = 8 << 20, stage.times(6, 12, 40)
    data = stage.pattern(1 << 20) * (piece >> 20)
    lasting = stage.open()
    source = stage.source(lasting, data)

    def write(writer: Transport, source: Region | Memory) -> None:
        owner = stage.target.open()
        try:
            region = stage.region(owner, piece)
            peer = writer.connect(owner.describe())
            handle = writer.post(peer, [Copy(source, 0, at(region), 0, piece)])
            stage.done(writer, handle)
            writer.release(handle)
            writer.disconnect(peer)
        finally:
            owner.close()

    def both() -> None:
        writer = stage.target.open()
        try:
            write(writer, stage.source(writer, data))
        finally:
            writer.close()

    for what, visit in (
        ("open, allocate, write and close", both),
        ("write to a peer that is opened for it, disconnected and closed", lambda: write(lasting, source)),
    ):
        visit()
        visit()
        gc.collect()
        before, enough = _resident(), piece * rounds // 2
        for _ in range(rounds):
            visit()
        stage.eventually(partial(_back, before + enough), LATE_S)
        more = _resident() - before
        stage.note(f"bytes more each time: {what}", more // rounds)
        grown = f"{rounds} times {what}, with {piece >> 20} MiB, leave {more >> 20} MiB more mapped"
        stage.expect(more < enough, f"{grown}, though nobody holds the memory any more")


def _back(below: int) -> bool:
    gc.collect()
    return _resident() < below


def _resident() -> int:
    """Bytes of memory that this process has mapped and touched, shared ones too."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * mmap.PAGESIZE


@check("RES-3", seconds=120)
def forgets_released_handles(stage: Stage) -> None:
    pair = stage.pair(4096)
    source = pair.source(b"x" * 64)
    copies = [Copy(source, 0, at(pair.region), 0, 64)]
    too_far = [Copy(source, 0, at(pair.region), 4096, 64)]

    def posts(count: int) -> None:
        for _ in range(count):
            pair.done(pair.writer.post(pair.peer, copies))
            with suppress(FerryError):  # BND-1 has its own opinion of one that is not refused
                pair.writer.post(pair.peer, too_far)

    count = stage.times(300, 1000, 10_000)
    posts(count)
    gc.collect()
    tracemalloc.start()
    try:
        posts(count // 4)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        posts(count)
        gc.collect()
        growth = (tracemalloc.get_traced_memory()[0] - before) / count
    finally:
        tracemalloc.stop()
    stage.note("bytes for each post", f"{growth:.1f}")
    stage.expect(
        growth < 40,
        f"each post that is released, and one that is refused with it, leave {growth:.0f} bytes behind ({count} posts)",
    )


class _Owner:
    """What keeps a source alive."""


@check("RES-4")
def holds_sources_as_long_as_needed(stage: Stage) -> None:
    pair = stage.pair(1 << 20)
    if pair.writer.capabilities.registers_sources:
        raise NotApplicable("declares registers_sources: the caller keeps its regions")
    backing = host_memory(1 << 20)
    backing.view()[:] = data = stage.pattern(1 << 20)
    owner = _Owner()
    alive = weakref.ref(owner)
    source = Memory(backing.address, 1 << 20, "cpu", owner)
    handle = pair.writer.post(pair.peer, [Copy(source, 0, at(pair.region), 0, 1 << 20)])
    del owner, source
    gc.collect()
    held = alive() is not None
    drained = pair.writer.drained(handle)
    stage.expect(held or drained, "the source of a post that is not drained was let go")
    pair.done(handle)
    pair.placed(data)
    pair.done(pair.post(b"another"))
    gone = stage.eventually(lambda: gc.collect() >= 0 and alive() is None, LATE_S)
    stage.expect(gone, "5 s after its handle was released, the source of a post is still held")


@check("RES-5", seconds=120)
def leaves_nothing_of_peers(stage: Stage) -> None:
    writer = stage.open()
    owners = [stage.open() for _ in range(2)]
    regions = [stage.region(owner, 4096) for owner in owners]
    source = stage.source(writer, b"x")

    def visit() -> None:
        for owner, region in zip(owners, regions, strict=True):
            peer = writer.connect(owner.describe())
            handle = writer.post(peer, [Copy(source, 0, at(region), 0, 1)])
            stage.done(writer, handle)
            writer.release(handle)
            writer.disconnect(peer)

    visit()
    visit()
    before, threads, rounds = _descriptors(), len(os.listdir("/proc/self/task")), stage.times(5, 20, 100)
    for _ in range(rounds):
        visit()
    stage.eventually(lambda: _descriptors() <= before, LATE_S)
    more = _descriptors() - before
    stage.expect(more < rounds, f"{rounds} times connect, write and disconnect leave {more} file descriptors open")
    grown = len(os.listdir("/proc/self/task")) - threads
    stage.expect(grown < rounds, f"{rounds} times connect, write and disconnect leave {grown} threads behind")
