"""LIF, REG, HYG-8: opening, closing, and registered memory."""

from __future__ import annotations

import gc
import json
import os
import threading
import time
from functools import partial

from tensorferry.conformance.judge import VERBS, refusals
from tensorferry.conformance.model import NotApplicable, check
from tensorferry.conformance.patterns import GUARD
from tensorferry.conformance.stage import FINAL, Stage, at, declares
from tensorferry.core.errors import BadCall, FerryError, Unsupported
from tensorferry.core.memory import Memory, host_memory
from tensorferry.core.transport import Copy, Options, Region, Status


@check("LIF-1", joined=False)
def opens_and_writes(stage: Stage) -> None:
    """No look at the bytes: that is XFR-1's."""
    pair = stage.pair(64)
    status = pair.end(pair.post(b"smoke"))
    stage.expect(status is Status.DONE, f"a write of 5 bytes between two fresh instances ended {status!r}")


@check("LIF-2", joined=False)
def closes_twice(stage: Stage) -> None:
    for used in (False, True):
        transport = stage.open()
        if used:
            stage.region(transport, 4096)
        for count in ("first", "second", "third"):
            answer = stage.attempt(transport.close, f"the {count} close")
            stage.expect(not isinstance(answer, FerryError), f"the {count} close raised {answer!r}")


@check("LIF-3", seconds=60)
def closes_in_time(stage: Stage) -> None:
    for round_ in range(stage.times(1, 3, 10)):
        pair = stage.pair(8 << 20, own=True)
        if round_ == 0 and stage.hooks.has("hold", "let_go"):
            stage.hooks.hold(pair.writer)
        source = pair.source(stage.pattern(8 << 20))
        for _ in range(8):
            pair.writer.post(pair.peer, [Copy(source, 0, at(pair.region), 0, 8 << 20)])
        _, took = stage.timed(pair.writer.close)
        if round_ == 0 and stage.hooks.has("hold", "let_go"):
            stage.hooks.let_go(pair.writer)
        stage.expect(took < 10, f"close with 8 posts in flight took {took:.1f} s")


@check("LIF-4")
def answers_after_close(stage: Stage) -> None:
    pair = stage.pair(8 << 20, own=True)
    early = pair.post(b"early")
    stage.done(pair.writer, early)
    source = pair.source(stage.pattern(8 << 20))
    copies = [Copy(source, 0, at(pair.region), 0, 8 << 20)]
    late = [pair.writer.post(pair.peer, copies) for _ in range(6)]
    pair.writer.close()
    stage.expect(
        pair.writer.poll(early) is Status.DONE, f"a handle was DONE, and {pair.writer.poll(early)!r} after close"
    )
    for handle in late:
        status = pair.writer.poll(handle)
        stage.expect(status in FINAL, f"after close, handle {handle} still says {status!r}")


@check("LIF-5")
def refuses_after_close(stage: Stage) -> None:
    pair = stage.pair()
    descriptor, memory = pair.owner.describe(), pair.writer.allocate(64)
    copy = Copy(pair.source(b"x"), 0, at(pair.region), 0, 1)
    pair.writer.close()
    calls = {
        "allocate": lambda: pair.writer.allocate(64),
        "register": lambda: pair.writer.register(memory),
        "describe": pair.writer.describe,
        "connect": lambda: pair.writer.connect(descriptor),
        "post": lambda: pair.writer.post(pair.peer, [copy]),
    }
    for verb, call in calls.items():
        stage.refused(call, BadCall, what=f"{verb} after close")


@check("LIF-6")
def refuses_in_a_fork(stage: Stage) -> None:
    pair = stage.pair()
    pair.done(pair.post(b"before"))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # nothing but verbs and one write: no thread, no clean-up of the parent's
        answers = {}
        for verb, call in (("describe", pair.owner.describe), ("post", lambda: pair.post(b"child"))):
            try:
                call()
                answers[verb] = "answered"
            except BadCall:
                answers[verb] = ""
            except BaseException as error:  # noqa: BLE001 - told to the parent
                answers[verb] = f"raised {type(error).__name__}"
        os.write(writing, json.dumps(answers).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    answers = json.loads(told or b"{}")
    for verb in ("describe", "post"):
        said = answers.get(verb, "ended the child")
        stage.expect(not said, f"in a forked child, {verb} {said}; expected BadCall")
    pair.done(pair.post(b"after!"), "a post after the fork")
    pair.placed(b"after!")


@check("LIF-7")
def ends_threads_when_dropped(stage: Stage) -> None:
    before = set(threading.enumerate())
    transport = stage.target.open()
    region = transport.register(transport.allocate(64))
    stage.note("threads while open", len(set(threading.enumerate()) - before))
    del transport, region
    gc.collect()
    left = stage.eventually(lambda: not (set(threading.enumerate()) - before), 10)
    names = ", ".join(sorted(thread.name for thread in set(threading.enumerate()) - before))
    stage.expect(left, f"10 s after the last reference to it was dropped, threads go on: {names}")


class OtherOptions(Options, frozen=True):
    """Another transport's options."""


@check("LIF-8", joined=False)
def refuses_other_options(stage: Stage) -> None:
    cls = stage.target.cls or type(stage.open())

    def other() -> None:
        cls(OtherOptions()).close()

    stage.refused(other, BadCall, what=f"{cls.__name__}(options of another type)")


# ---- regions ------------------------------------------------------------------------------------------------------


@check("REG-1", joined=False)
def allocates(stage: Stage) -> None:
    transport = stage.open()
    for nbytes in (1, 63, 4096, 12_345, 1 << 20):
        memory = transport.allocate(nbytes)
        stage.expect(isinstance(memory, Memory), f"allocate({nbytes}) answered a {type(memory).__name__}")
        stage.expect(memory.nbytes == nbytes, f"allocate({nbytes}) gave {memory.nbytes} bytes")
        stage.expect(memory.kind == "cpu", f"allocate({nbytes}) gave {memory.kind} memory")
        stage.expect(
            memory.address % 64 == 0, f"allocate({nbytes}) gave address {memory.address:#x}: not aligned to 64"
        )
        view = memory.view()
        view[:] = bytes([GUARD]) * nbytes
        stage.expect(view[-1] == GUARD, f"the last of {nbytes} allocated bytes does not keep what is written to it")
    if "cuda" not in transport.capabilities.memory_kinds:
        stage.note("cuda", "not tried: opened here, it takes no CUDA memory")
        return
    memory = transport.allocate(4096, "cuda", 0)
    told = (memory.kind, memory.device, memory.nbytes, memory.address % 64)
    stage.expect(told == ("cuda", 0, 4096, 0), f"allocate(4096, 'cuda', 0) answered {memory}")
    stage.note("cuda", "allocated")


@check("REG-2", joined=False)
def registers(stage: Stage) -> None:
    transport = stage.open()
    for nbytes in (64, 4096, 100_001):
        memory = transport.allocate(nbytes)
        region = transport.register(memory)
        stage.expect(isinstance(region, Region), f"register answered a {type(region).__name__}")
        same = (region.memory.address, region.memory.nbytes) == (memory.address, memory.nbytes)
        stage.expect(same, f"register({memory}) answered with a region of {region.memory}")


@check("REG-3", joined=False)
def refuses_undeclared_kinds(stage: Stage) -> None:
    transport = stage.open()
    undeclared = [kind for kind in ("cuda", "no such kind") if kind not in transport.capabilities.memory_kinds]
    for kind in undeclared:
        stage.refused(partial(transport.allocate, 64, kind), Unsupported, what=f"allocate(64, {kind!r})")
        # A real address: should it be taken, nothing crashes.
        real = host_memory(4096)
        memory = Memory(real.address, 4096, kind, real)
        stage.refused(partial(transport.register, memory), Unsupported, what=f"register of {kind} memory")


@check("REG-4", joined=False)
def retires_twice(stage: Stage) -> None:
    transport = stage.open()
    kept, region = stage.region(transport, 4096), stage.region(transport, 4096)
    for count in ("first", "second", "third"):
        answer = stage.attempt(lambda: transport.retire(region), f"the {count} retire")
        stage.expect(not isinstance(answer, FerryError), f"the {count} retire raised {answer!r}")
    fresh = stage.region(transport, 4096)
    transport.retire(region)  # again, when its id may be another's
    other = stage.open()
    peer = other.connect(transport.describe())
    for live in (kept, fresh):
        handle = other.post(peer, [Copy(stage.source(other, b"x"), 0, at(live), 0, 1)])
        stage.done(other, handle, "a post to a region that lives, after another was retired again,")


@check("REG-5", joined=False)
def never_repeats_a_generation(stage: Stage) -> None:
    transport = stage.open()
    seen: set[tuple[int, int]] = set()
    alive: list[Region] = []
    for _ in range(stage.times(30, 100, 400)):
        region = transport.register(transport.allocate(4096))
        key = (region.id, region.generation)
        stage.expect(key not in seen, f"id {key[0]} and generation {key[1]} were given twice")
        seen.add(key)
        alive.append(region)
        if len(alive) > 3:
            transport.retire(alive.pop(stage.random.randrange(len(alive))))


@check("REG-6", joined=False)
def keeps_retired_memory(stage: Stage) -> None:
    transport = stage.open()
    region = stage.region(transport, 1 << 16)
    transport.retire(region)
    others = [stage.region(transport, 1 << 16, 0) for _ in range(8)]
    view = region.memory.view()
    stage.expect(bytes(view) == bytes([GUARD]) * (1 << 16), "a retired region's bytes changed, and nobody wrote to it")
    view[:] = b"\1" * (1 << 16)
    for other in others:
        stage.expect(
            not any(other.memory.view()), "a retired region shares its memory with one that was allocated later"
        )


@check("REG-7")
def takes_any_memory(stage: Stage) -> None:
    owner, writer = stage.open(), stage.open()
    memory = host_memory(3 * 4096)
    memory.view()[:] = bytes([GUARD]) * memory.nbytes
    region = owner.register(Memory(memory.address + 4096 + 3, 4001, owner=memory))  # neither a page nor aligned
    data = stage.pattern(4001)
    handle = writer.post(writer.connect(owner.describe()), [Copy(stage.source(writer, data), 0, at(region), 0, 4001)])
    stage.done(writer, handle, "a post into memory that the suite allocated")
    if owner.capabilities.needs_flush:
        owner.flush(region)
    guard = bytes([GUARD])
    found, expected = bytes(memory.view()), guard * 4099 + data + guard * (3 * 4096 - 4099 - 4001)
    stage.expect(
        found == expected, "what was written into memory that the suite allocated is not there, or not only there"
    )


@check("REG-8", joined=False)
def refuses_foreign_memory(stage: Stage) -> None:
    transport = stage.open()
    stage.refused(lambda: transport.register(host_memory(4096)), FerryError, what="register of others' memory")


@check("REG-9", joined=False)
def refuses_to_retire_anothers(stage: Stage) -> None:
    transport, other = stage.open(), stage.open()
    for _ in range(3):
        foreign = stage.region(other, 4096)
    stage.refused(lambda: transport.retire(foreign), BadCall, what="retire of another transport's region")


@check("HYG-8")
def refuses_what_is_not_declared(stage: Stage) -> None:
    capabilities = stage.open().capabilities
    undeclared = [need for need in VERBS if not declares(capabilities, need)]
    if not undeclared:
        raise NotApplicable("declares " + ", ".join(VERBS))
    begun = time.monotonic()
    refusals(stage, undeclared)
    stage.expect(time.monotonic() - begun < 10, "the refusals took more than 10 s")
