"""HYG, RES and THR-2: what a plugin costs, and what it leaves behind."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import tracemalloc
import weakref
from typing import Any

import msgspec

from tensorferry.conformance.model import NotApplicable, check
from tensorferry.conformance.patience import FACTOR
from tensorferry.conformance.stage import Stage, at
from tensorferry.conformance.target import child_environment
from tensorferry.core.errors import ConfigError, FerryError, UnknownOption
from tensorferry.core.memory import Memory, host_memory
from tensorferry.core.transport import (
    CONTRACT_VERSION,
    Capabilities,
    Copy,
    Fence,
    Options,
    Probe,
    Readiness,
    Transport,
)
from tensorferry.plugins import registry

PROBE_S = 10.0 * FACTOR
IMPORT_S = 2.0 * FACTOR


def _cls(stage: Stage) -> type[Transport]:
    return stage.target.cls or type(stage.open())


def _fresh(stage: Stage, what: str, environment: dict[str, str] | None = None, within: float = 60.0) -> dict[str, Any]:
    """What `conformance.fresh` tells of an import or a probe."""
    cls = _cls(stage)
    path = f"{cls.__module__}:{cls.__qualname__}"
    if cls.__module__ == "__main__" or "<locals>" in path:
        stage.unknown(f"needs a fresh process, and {path} cannot be imported in one")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tensorferry.conformance.fresh", what, path],
            env=child_environment() if environment is None else environment,
            capture_output=True,
            timeout=within,
            check=False,
        )
    except subprocess.TimeoutExpired:
        stage.fail(f"the {what} of {path} did not end within {within:g} s in a fresh process")
    stage.expect(done.returncode == 0, f"the {what} of {path} ended its process with status {done.returncode}")
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@check("HYG-1", joined=False)
def probe_never_raises(stage: Stage) -> None:
    answer = stage.attempt(_cls(stage).probe, "probe")
    stage.expect(not isinstance(answer, FerryError), f"probe raised {answer!r}")
    stage.expect(isinstance(answer, Probe), f"probe answered a {type(answer).__name__}, which is no Probe")
    assert isinstance(answer, Probe)
    stage.expect(isinstance(answer.readiness, Readiness), f"probe's readiness is {answer.readiness!r}")
    stage.expect(answer.reason and isinstance(answer.reason, str), "probe gives no reason")
    texts = all(isinstance(text, str) for pair in answer.facts.items() for text in pair)
    stage.expect(texts, f"probe's facts are not all str: {answer.facts!r}")
    bare = {name: value for name, value in child_environment().items() if name in ("PATH", "PYTHONPATH")}
    for name, environment in (("an empty environment", bare), ("no home", bare | {"HOME": "/nonexistent"})):
        told = _fresh(stage, "probe", environment)
        stage.expect("raised" not in told, f"with {name}, probe raised {told.get('raised')}")


@check("HYG-2", joined=False, seconds=120)
def probe_is_quick(stage: Stage) -> None:
    seconds = _fresh(stage, "probe")["seconds"]
    stage.note("seconds", f"{seconds:.3f}")
    stage.expect(seconds < PROBE_S, f"probe took {seconds:.1f} s in a fresh process")


@check("HYG-3", joined=False, seconds=120)
def import_loads_no_engine(stage: Stage) -> None:
    told = _fresh(stage, "import")
    stage.expect("raised" not in told, f"the import raised {told.get('raised')}")
    own = _cls(stage).__module__.partition(".")[0]
    stage.note("modules", len(told["modules"]))
    stage.expect(not told["engines"], f"importing the class loads {', '.join(told['engines'])}")
    foreign = [library for library in told["libraries"] if f"/{own}/" not in library]
    stage.expect(not foreign, f"importing the class loads native libraries: {', '.join(foreign[:5])}")


@check("HYG-4", joined=False)
def states_its_version(stage: Stage) -> None:
    cls = _cls(stage)
    stated = any("contract_version" in vars(base) for base in cls.__mro__ if base is not Transport)
    ours = cls.__module__.startswith("tensorferry.")
    stage.expect(stated or ours, f"{cls.__name__} does not state contract_version: it should be {CONTRACT_VERSION}")
    version = cls.contract_version
    stage.expect(version == CONTRACT_VERSION, f"contract_version is {version!r}, this suite's is {CONTRACT_VERSION}")
    name = getattr(cls, "name", None)
    stage.expect(isinstance(name, str) and name, f"name is {name!r}")
    spec = stage.target.spec
    if spec is not None and ":" not in spec.name:
        stage.expect(name == spec.name, f"name is {name!r}, and the entry point is called {spec.name!r}")


@check("HYG-5", joined=False)
def options_are_typed(stage: Stage) -> None:
    kind: Any = _cls(stage).options_type
    right = isinstance(kind, type) and issubclass(kind, Options)
    stage.expect(right, f"options_type is {kind!r}, which is no Options")
    config = kind.__struct_config__
    stage.expect(config.frozen, f"{kind.__name__} is not frozen")
    lacking = [field.name for field in msgspec.structs.fields(kind) if field.required]
    stage.expect(not lacking, f"options without a default: {', '.join(lacking)}")
    wrong = {"no_such_option_of_the_suite": "1"}
    try:
        msgspec.convert(wrong, kind)
    except msgspec.ValidationError:
        pass
    else:
        stage.fail(f"{kind.__name__} takes an option that it does not have")
    spec = stage.target.spec
    if spec is not None and ":" not in spec.name:
        call = lambda: registry.open_transport(spec.name, {**spec.options, **wrong})  # noqa: E731
        stage.refused(call, UnknownOption, ConfigError, what="opening with an unknown option")


@check("HYG-6")
def path_is_known(stage: Stage) -> None:
    pair = stage.pair()
    pair.done(pair.post(b"x"))
    for what, path in (("path()", pair.writer.path()), ("path(peer)", pair.writer.path(pair.peer))):
        stage.expect(isinstance(path, str), f"{what} answered {path!r}, which is no str")
        stage.expect(path.strip(), f"{what} is empty")
    probed = type(pair.writer).probe().path
    if probed and not stage.target.options:
        told = pair.writer.path()
        stage.expect(told == probed, f"path() is {told!r}, and the probe says {probed!r}")


@check("HYG-7", joined=False)
def capabilities_are_sound(stage: Stage) -> None:
    declared: Any = _cls(stage).capabilities
    stage.expect(isinstance(declared, Capabilities), f"capabilities is a {type(declared).__name__}")
    kinds = declared.memory_kinds
    stage.expect(kinds and kinds <= {"cpu", "cuda"}, f"memory_kinds is {set(kinds)}: cpu and cuda are known")
    for name in ("max_copies", "preferred_post_bytes"):
        value = getattr(declared, name)
        stage.expect(type(value) is int and value >= 1, f"{name} is {value!r}")
    stage.expect(all(isinstance(f, Fence) for f in declared.fences), f"fences are not all Fences: {declared.fences!r}")
    for field in msgspec.structs.fields(declared) if isinstance(declared, msgspec.Struct) else ():
        stage.note(field.name, getattr(declared, field.name))
    flags = ("same_host_only", "registers_sources", "allocates_targets", "cancellable", "notices_dead_peer")
    for name in (*flags, "needs_flush", "thread_safe", "reads", "wakes"):
        value = getattr(declared, name)
        stage.expect(isinstance(value, bool), f"{name} is {value!r}, which is no bool")
    same = stage.open().capabilities == declared
    stage.expect(same, "an instance's capabilities differ from its class's")


@check("HYG-9", joined=False, seconds=120)
def probe_leaves_nothing(stage: Stage) -> None:
    told = _fresh(stage, "probe")
    if "raised" in told:
        stage.unknown(f"probe raised {told['raised']} (HYG-1)")
    for name in ("environment", "threads", "children"):
        stage.expect(not told[name], f"probe leaves behind {name}: {', '.join(map(str, told[name]))}")
    stage.note("native threads", told["tasks"])
    stage.expect(told["descriptors"] <= 0, f"probe leaves {told['descriptors']} file descriptors open")


@check("HYG-10", joined=False)
def reads_is_reserved(stage: Stage) -> None:
    stage.expect(not _cls(stage).capabilities.reads, "reads is declared; contract 1 has no verb for it")


@check("HYG-11", joined=False, seconds=120)
def import_is_cheap(stage: Stage) -> None:
    told = _fresh(stage, "import")
    stage.note("seconds of processor time", f"{told['cpu']:.3f}")
    stage.expect(told["cpu"] < IMPORT_S, f"importing the class takes {told['cpu']:.1f} s of processor time")
    for name in ("environment", "threads", "children"):
        stage.expect(not told[name], f"importing the class changes {name}: {', '.join(map(str, told[name]))}")


@check("THR-2")
def probes_beside_work(stage: Stage) -> None:
    pair = stage.pair(1 << 20)
    problems: list[str] = []

    def probe() -> None:
        for _ in range(5):
            try:
                type(pair.writer).probe()
            except Exception as error:  # noqa: BLE001 - told below
                problems.append(f"probe in another thread raised {type(error).__name__}: {error}")

    threads = [threading.Thread(target=probe, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for n in range(20):
        data = stage.pattern(1 << 18, n)
        pair.done(pair.post(data), "a post while others probe")
        pair.placed(data)
    for thread in threads:
        thread.join()
    stage.expect(not problems, "; ".join(problems[:3]))


# ---- resources ----------------------------------------------------------------------------------------------------


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
    stage.eventually(lambda: _descriptors() <= before, 5)
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
    stage.eventually(lambda: tasks() <= before, 5)
    names = ", ".join(sorted({t.name for t in threading.enumerate() if t not in known})) or "of an engine"
    more = tasks() - before
    stage.expect(more < rounds, f"{rounds} times open, write and close leave {more} more threads: {names}")


@check("RES-3", seconds=120)
def forgets_released_handles(stage: Stage) -> None:
    pair = stage.pair(4096)
    source = pair.source(b"x" * 64)
    copies = [Copy(source, 0, at(pair.region), 0, 64)]

    def posts(count: int) -> None:
        for _ in range(count):
            pair.done(pair.writer.post(pair.peer, copies))

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
    stage.expect(growth < 40, f"each post that is released leaves {growth:.0f} bytes behind ({count} posts)")


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
    gone = stage.eventually(lambda: gc.collect() >= 0 and alive() is None, 5)
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
    stage.eventually(lambda: _descriptors() <= before, 5)
    more = _descriptors() - before
    stage.expect(more < rounds, f"{rounds} times connect, write and disconnect leave {more} file descriptors open")
    grown = len(os.listdir("/proc/self/task")) - threads
    stage.expect(grown < rounds, f"{rounds} times connect, write and disconnect leave {grown} threads behind")
