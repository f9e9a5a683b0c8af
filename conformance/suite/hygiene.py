"""HYG and THR-2: what a plugin declares, and what it costs. HYG-12 and HYG-14 are in loading.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from typing import Any

import msgspec

from tensorferry.conformance.model import check
from tensorferry.conformance.patience import FACTOR
from tensorferry.conformance.stage import Stage
from tensorferry.conformance.target import child_environment
from tensorferry.core.errors import ConfigError, FerryError, UnknownOption
from tensorferry.core.transport import (
    CONTRACT_VERSION,
    Capabilities,
    Fence,
    Options,
    Probe,
    Readiness,
    Transport,
)
from tensorferry.plugins import registry

PROBE_S = 10.0 * FACTOR
IMPORT_S = 2.0 * FACTOR
FRESH_S = 60.0 * FACTOR


def class_of(stage: Stage) -> type[Transport]:
    return stage.target.cls or type(stage.open())


def path_of(stage: Stage) -> str:
    """The class, as a fresh process can import it."""
    cls = class_of(stage)
    path = f"{cls.__module__}:{cls.__qualname__}"
    if cls.__module__ == "__main__" or "<locals>" in path:
        stage.unknown(f"needs a fresh process, and {path} cannot be imported in one")
    return path


def _fresh(stage: Stage, what: str) -> dict[str, Any]:
    """What `conformance.fresh` tells of an import or a probe in the usual environment: one process for all rules."""
    told: dict[str, Any] = stage.once(what, lambda: told_by(stage, "fresh", what, path_of(stage)))
    return told


def told_by(
    stage: Stage, module: str, what: str, *arguments: str, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """What `python -m tensorferry.conformance.<module> <what> ...` prints, which is one line of JSON, and as `files`
    what it leaves in its working directory, which is its temporary one, too, unless there is an `environment`."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", f"tensorferry.conformance.{module}", what, *arguments],
            env={**child_environment(), "TMPDIR": folder} if environment is None else environment,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            out, _ = process.communicate(timeout=FRESH_S)
        except subprocess.TimeoutExpired:
            stage.note("where it hung", _stacks(process))
            stage.fail(f"the {what} of {arguments[0]} did not end within {FRESH_S:g} s in a fresh process")
        ended = f"the {what} of {arguments[0]} ended its process with status {process.returncode}"
        stage.expect(process.returncode == 0, ended)
        told: dict[str, Any] = json.loads(out)
        return told | {"files": sorted(os.listdir(folder))}


def _stacks(process: subprocess.Popen[bytes]) -> str:
    """End a process that hangs; what each of its threads was in."""
    process.send_signal(signal.SIGABRT)
    try:
        _, said = process.communicate(timeout=10)
    except subprocess.TimeoutExpired:  # where not even a signal gets through, or others have its standard error
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        return "it does not end by SIGABRT"
    return said.decode(errors="replace")[-4000:]


@check("HYG-1", joined=False)
def probe_never_raises(stage: Stage) -> None:
    answer = stage.attempt(class_of(stage).probe, "probe")
    stage.expect(not isinstance(answer, FerryError), f"probe raised {answer!r}")
    stage.expect(isinstance(answer, Probe), f"probe answered a {type(answer).__name__}, which is no Probe")
    assert isinstance(answer, Probe)
    stage.expect(isinstance(answer.readiness, Readiness), f"probe's readiness is {answer.readiness!r}")
    stage.expect(answer.reason and isinstance(answer.reason, str), "probe gives no reason")
    texts = all(isinstance(text, str) for pair in answer.facts.items() for text in pair)
    stage.expect(texts, f"probe's facts are not all str: {answer.facts!r}")
    bare = {name: value for name, value in child_environment().items() if name in ("PATH", "PYTHONPATH")}
    for name, environment in (("an empty environment", bare), ("no home", bare | {"HOME": "/nonexistent"})):
        told = told_by(stage, "fresh", "probe", path_of(stage), environment=environment)
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
    own = class_of(stage).__module__.partition(".")[0]
    stage.note("modules", len(told["modules"]))
    stage.expect(not told["engines"], f"importing the class loads {', '.join(told['engines'])}")
    foreign = [library for library in told["libraries"] if f"/{own}/" not in library]
    stage.expect(not foreign, f"importing the class loads native libraries: {', '.join(foreign[:5])}")


@check("HYG-4", joined=False)
def states_its_version(stage: Stage) -> None:
    cls = class_of(stage)
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
    kind: Any = class_of(stage).options_type
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
    declared: Any = class_of(stage).capabilities
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
    stage.expect(_settled(stage.open().capabilities, declared), "an instance's capabilities differ from its class's")


def _settled(found: Capabilities, declared: Capabilities) -> bool:
    """Those of the class, but for what is settled by opening: is there an engine, a driver and a card for a GPU's
    memory?"""
    return replace(found, memory_kinds=declared.memory_kinds, needs_flush=declared.needs_flush) == declared


@check("HYG-9", joined=False, seconds=120)
def probe_leaves_nothing(stage: Stage) -> None:
    told = _fresh(stage, "probe")
    if "raised" in told:
        stage.unknown(f"probe raised {told['raised']} (HYG-1)")
    for name in ("environment", "threads", "children", "files"):
        stage.expect(not told[name], f"probe leaves behind {name}: {', '.join(map(str, told[name]))}")
    stage.note("native threads", told["tasks"])
    stage.expect(told["descriptors"] <= 0, f"probe leaves {told['descriptors']} file descriptors open")


@check("HYG-10", joined=False)
def reads_is_reserved(stage: Stage) -> None:
    stage.expect(not class_of(stage).capabilities.reads, "reads is declared; contract 1 has no verb for it")


@check("HYG-11", joined=False, seconds=120)
def import_is_cheap(stage: Stage) -> None:
    told = _fresh(stage, "import")
    stage.note("seconds of processor time", f"{told['cpu']:.3f}")
    stage.expect(told["cpu"] < IMPORT_S, f"importing the class takes {told['cpu']:.1f} s of processor time")
    for name in ("environment", "threads", "children"):
        stage.expect(not told[name], f"importing the class changes {name}: {', '.join(map(str, told[name]))}")


@check("HYG-13")
def capabilities_stay(stage: Stage) -> None:
    declared = class_of(stage).capabilities
    pair = stage.pair(4096, own=True)
    settled = pair.writer.capabilities
    stage.expect(_settled(settled, declared), "an instance's capabilities are not those that were declared at first")

    def look(what: str) -> None:
        for name, end in (("the writer", pair.writer), ("the target's owner", pair.owner)):
            changed = end.capabilities != settled
            stage.expect(not changed, f"{what}, the capabilities of {name} are not those that were declared at first")

    look("after connecting")
    for n in range(3):
        pair.done(pair.post(stage.pattern(4096, n)))
    look("after writing")
    pair.target(64)
    look("after one more region")
    other = stage.open()
    stage.expect(other.capabilities == settled, "a later instance's capabilities are not those of the first")
    pair.writer.disconnect(pair.peer)
    look("after a disconnect")
    pair.writer.close()
    pair.owner.close()
    look("after close")
    stage.expect(class_of(stage).capabilities == declared, "the class's capabilities changed")
    stage.expect(stage.open().capabilities == settled, "an instance opened after another's close has others")


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
