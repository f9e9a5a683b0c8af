"""VIS-2, FEN-3, FEN-5 to FEN-7 and PEE-1, 2, 4, 5, 6: with the peer in another process, which is killed or stopped."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tensorferry.conformance.model import NotApplicable, check
from tensorferry.conformance.patience import FACTOR
from tensorferry.conformance.patterns import difference, pattern
from tensorferry.conformance.processes import PeerProcess, joined
from tensorferry.conformance.stage import FINAL, Pair, Stage, at
from tensorferry.conformance.suite.trouble import ending, shoot
from tensorferry.core.errors import FerryError
from tensorferry.core.memory import Memory
from tensorferry.core.transport import Copy, Fence, PeerState, Region, Status, Transport

NOTICED_WITHIN_S = 30.0 * FACTOR
ENDS_WITHIN_S = 60.0 * FACTOR


def _join(stage: Stage, call: Callable[[], Any]) -> Any:
    """`joined`, and that it was in vain is remembered: no more processes are started."""
    try:
        return joined(call)
    except NotApplicable as reason:
        stage.shared["joins no processes"] = str(reason)
        raise


def _start(stage: Stage, count: int = 1) -> list[PeerProcess]:
    if reason := stage.shared.get("joins no processes"):
        raise NotApplicable(reason)
    return stage.processes(count)


def meet(
    stage: Stage, nbytes: int = 4096, *, writer: Transport | None = None, process: PeerProcess | None = None
) -> tuple[PeerProcess, Pair]:
    """A process that owns a region, and a writer here that knows it."""
    process = process or _start(stage)[0]
    number, generation = process.ask("region", nbytes=nbytes)
    here = writer or stage.open()
    peer = _join(stage, lambda: here.connect(process.describe()))
    region = Region(number, generation, Memory(0, nbytes))
    return process, Pair(stage, here, here, region, peer)


def meet_back(
    stage: Stage, nbytes: int, process: PeerProcess | None = None
) -> tuple[PeerProcess, Transport, Region, Any]:
    """A process that knows a region of ours, and how we see it."""
    process = process or _start(stage)[0]
    owner = stage.open()
    region = stage.region(owner, nbytes)
    peer = _join(stage, lambda: owner.connect(process.describe()))
    process.ask("connect", descriptor=owner.describe().hex())
    return process, owner, region, peer


def _posted(pair: Pair, source: Any, offset: int, nbytes: int) -> int:
    return pair.writer.post(pair.peer, [Copy(source, offset, at(pair.region), offset, nbytes)])


@check("VIS-2", seconds=60)
def visible_elsewhere(stage: Stage) -> None:
    size = 1 << 20
    process, pair = meet(stage, size)
    for n in range(stage.times(3, 20, 200)):
        nbytes = stage.random.choice((1, 100, 65_537, size))
        name = f"{stage.seed}:{n}"
        handle = pair.post(pattern(name, nbytes))
        pair.stage.done(pair.writer, handle, "a post to another process")
        wrong = process.ask("differs", offset=0, nbytes=nbytes, seed=name)
        stage.expect(not wrong, f"DONE, and the other process, told of it, does not see {nbytes} bytes: {wrong}")
    _, owner, region, _ = meet_back(stage, size, process)
    for n in range(stage.times(3, 20, 200)):
        name, nbytes = f"{stage.seed}:back:{n}", stage.random.choice((1, 4097, size))
        handle = process.ask("post", remote=[region.id, region.generation], offset=0, nbytes=nbytes, seed=name)
        status, _ = process.ask("outcome", handle=handle)
        if owner.capabilities.needs_flush:
            owner.flush(region)
        found = stage.read(owner, region, 0, nbytes)
        stage.expect(status == "DONE", f"a post by another process ended {status}")
        wrong = difference(found, pattern(name, nbytes))
        stage.expect(not wrong, f"another process says DONE, and we do not see {nbytes} bytes: {wrong}")


def _ended(stage: Stage) -> tuple[Transport, Any]:
    """A peer that has ended: its process, or its transport where the transport joins no two processes."""
    try:
        process, pair = meet(stage)
    except NotApplicable as reason:
        stage.note("instead of a process", f"a close in this one: it {reason}")
        pair = stage.pair(own=True)
        stage.expect(pair.writer.peer_state(pair.peer) is not PeerState.GONE, "a peer that is open is said to be GONE")
        pair.owner.close()
        return pair.writer, pair.peer
    state = pair.writer.peer_state(pair.peer)
    stage.expect(state is not PeerState.GONE, "a peer whose process runs is said to be GONE")
    process.kill(reap=False)
    return pair.writer, pair.peer


@dataclass
class Death:
    """What peer_state said of a peer that ended, in order."""

    noticed: bool = False
    """Something else than ALIVE, in time."""
    gone: bool = False
    last: str = ""
    afterwards: list[PeerState] = field(default_factory=list)
    """After the first GONE."""


def death(stage: Stage) -> Death:
    """Of one peer, for all rules that ask how its end is seen."""
    told: Death = stage.once("death", lambda: _death(stage))
    return told


def _death(stage: Stage) -> Death:
    writer, peer = _ended(stage)
    declared, told = writer.capabilities, Death()
    needs_gone = Fence.PEER_GONE in declared.fences
    deadline = time.monotonic() + NOTICED_WITHIN_S
    while time.monotonic() < deadline:
        state = writer.peer_state(peer)
        told.last = repr(state)
        told.noticed |= state is not PeerState.ALIVE
        told.gone |= state is PeerState.GONE
        if told.gone or (told.noticed and not needs_gone):
            break
        time.sleep(0.001)
    until = time.monotonic() + stage.times(0, 1, 5) + 0.2
    while told.gone and time.monotonic() < until:
        told.afterwards.append(writer.peer_state(peer))
        time.sleep(0.01)
    return told


@check("FEN-3", seconds=90)
def the_dead_are_gone(stage: Stage) -> None:
    told = death(stage)
    what = f"{NOTICED_WITHIN_S:g} s after the end of the peer, peer_state says {told.last} and not GONE"
    stage.expect(told.gone, what)


@check("PEE-1", seconds=90)
def the_dead_are_noticed(stage: Stage) -> None:
    noticed = death(stage).noticed
    stage.expect(noticed, f"{NOTICED_WITHIN_S:g} s after the end of the peer, peer_state still says ALIVE")


@check("FEN-7", seconds=90)
def the_gone_stay_gone(stage: Stage) -> None:
    told = death(stage)
    if not told.gone:
        stage.unknown("peer_state never said GONE (FEN-3)")
    for state in told.afterwards:
        stage.expect(state is PeerState.GONE, f"peer_state said GONE, and then {state!r}")


@check("FEN-5", seconds=180)
def silence_is_not_death(stage: Stage) -> None:
    pair = stage.pair()

    def alive(writer: Transport, peer: Any, what: str) -> None:
        state = writer.peer_state(peer)
        stage.expect(isinstance(state, PeerState), f"peer_state answered {state!r}, which is no PeerState")
        stage.expect(state is not PeerState.GONE, f"peer_state says GONE of a peer that {what}")

    alive(pair.writer, pair.peer, "is open in this process")
    watcher = stage.open()
    watched = watcher.connect(pair.writer.describe())
    pair.writer.disconnect(pair.peer)
    time.sleep(0.3)
    alive(watcher, watched, "is open, and has only disconnected from somebody")
    forgotten = stage.attempt(lambda: pair.writer.peer_state(pair.peer), "peer_state of a peer that was disconnected")
    stage.expect(forgotten is not PeerState.GONE, "peer_state says GONE of a peer that we have only disconnected")
    try:
        told = stopped(stage)
    except NotApplicable as reason:
        stage.note("not stopped", reason)
        return
    stage.expect(not told.buried, told.buried)


def _writers_that_close(stage: Stage) -> None:
    """Where a close is an end of its own, without one of the process."""
    for _ in range(stage.times(1, 3, 20)):
        pair = stage.pair(64)
        watched = pair.owner.connect(pair.writer.describe())
        shots = shoot(stage, pair, 4)
        time.sleep(stage.random.random() * 0.01)
        pair.writer.close()
        if stage.gone(pair.owner, watched, 1):
            regions = [shot.region for shot in shots]
            stage.seal(*regions)
            stage.settle()
            stage.sealed(*regions, after="peer_state had said that its writer, which had closed, is GONE")


def _seal_when_gone(stage: Stage, process: PeerProcess, owner: Transport, region: Region, peer: Any) -> None:
    """Our own interpreter is kept busy before the death and until the seal: what a reader written in Python has not
    placed by then still lies in a buffer."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(0.5)
    try:
        stage.busy(0.15)  # until buffers are full
        process.popen.kill()
        stage.busy(0.1)  # until it has ended
        until = time.monotonic() + 1
        while owner.peer_state(peer) is not PeerState.GONE and time.monotonic() < until:
            pass
        if owner.peer_state(peer) is PeerState.GONE:
            stage.seal(region)
            return
    finally:
        sys.setswitchinterval(usual)
    if not stage.gone(owner, peer, 30):
        stage.unknown("peer_state never said GONE (FEN-3)")
    stage.seal(region)


@check("FEN-6", seconds=120)
def nothing_lands_after_gone(stage: Stage) -> None:
    _writers_that_close(stage)
    try:
        processes = _start(stage, stage.times(1, 3, 20))
        met = [meet_back(stage, 8 << 20, process) for process in processes]
    except NotApplicable as reason:
        stage.note("not with a process", reason)
        return
    for process, owner, region, peer in met:
        process.tell("stream", remote=[region.id, region.generation], nbytes=8 << 20, seed="stream")
        process.hear("stream")
        time.sleep(0.1 + stage.random.random() * 0.1)
        _seal_when_gone(stage, process, owner, region, peer)
        time.sleep(0.05)
        stage.sealed(region, after="peer_state had said that its writer is GONE")
    stage.settle()
    stage.sealed(*(region for _, _, region, _ in met), after="peer_state had said that its writer is GONE")


@check("PEE-2", seconds=180)
def posts_to_the_dead(stage: Stage) -> None:
    process, pair = meet(stage, 8 << 20)
    source = pair.source(stage.pattern(8 << 20))
    before = [_posted(pair, source, 0, 8 << 20) for _ in range(6)]
    process.kill()
    notices = pair.writer.capabilities.notices_dead_peer
    gone = stage.gone(pair.writer, pair.peer, NOTICED_WITHIN_S if notices else 1)
    for n in range(3):
        told = ending(stage, lambda: _posted(pair, source, 0, 4096), pair, ENDS_WITHIN_S)
        stage.note(f"post {n} after the death", told)
        lost = told is Status.DONE and (gone or not pair.writer.capabilities.same_host_only)
        stage.expect(not lost, "a post to a peer whose process had been killed before ended DONE")
    for handle in before:
        pair.end(handle, ENDS_WITHIN_S)


@check("PEE-4", seconds=180)
def the_others_go_on(stage: Stage) -> None:
    writer = stage.open()
    dead, halted, well = _start(stage, 3)
    to_dead, to_halted, to_well = (meet(stage, 1 << 20, writer=writer, process=one)[1] for one in (dead, halted, well))
    source = to_well.source(stage.pattern(1 << 20))
    dead.kill()
    halted.stop()
    flying = []
    for pair in (to_dead, to_halted):
        for _ in range(4):
            answer = stage.attempt(partial(_posted, pair, source, 0, 1 << 20), "post")
            flying += [] if isinstance(answer, FerryError) else [(pair, answer)]
    for n in range(stage.times(3, 10, 100)):
        name = f"{stage.seed}:{n}"
        handle = to_well.post(pattern(name, 100_000))
        status = to_well.end(handle, 15)
        stage.expect(status is Status.DONE, f"with a peer dead and one stopped, a post to a third ended {status.name}")
        wrong = well.ask("differs", offset=0, nbytes=100_000, seed=name)
        stage.expect(not wrong, f"with one peer dead and one stopped, a third does not see what is DONE: {wrong}")
    halted.go_on()
    for pair, handle in flying:
        pair.end(handle, ENDS_WITHIN_S)


@check("PEE-5", seconds=120)
def nothing_waits_for_the_stopped(stage: Stage) -> None:
    process, pair = meet(stage, 8 << 20)
    descriptor = process.describe()
    source = pair.source(stage.pattern(8 << 20))
    _posted(pair, source, 0, 8 << 20)
    process.stop()

    def soon(verb: str, call: Any, limit: float = 5.0) -> Any:
        answer, took = stage.timed(lambda: stage.attempt(call, verb))
        stage.expect(took < limit, f"with the peer stopped, {verb} took {took:.1f} s")
        return answer

    handles = [soon("post", lambda: _posted(pair, source, 0, 8 << 20)) for _ in range(6)]
    until = time.monotonic() + stage.times(0, 1, 10)
    while time.monotonic() <= until:
        for handle in handles:
            if not isinstance(handle, FerryError):
                soon("poll", partial(pair.writer.poll, handle))
                soon("drained", partial(pair.writer.drained, handle))
        soon("peer_state", lambda: pair.writer.peer_state(pair.peer))
        time.sleep(0.05)
    soon("connect", lambda: pair.writer.connect(descriptor))
    soon("disconnect", lambda: pair.writer.disconnect(pair.peer))
    soon("connect", lambda: pair.writer.connect(descriptor))
    newcomer = stage.open()
    soon("connect by a new instance", lambda: newcomer.connect(descriptor))
    soon("close", newcomer.close, 10)
    soon("close", pair.writer.close, 10)


@dataclass
class Stop:
    """What was seen with one peer stopped that is written to, and one that writes to us. Empty: nothing wrong."""

    buried: str = ""
    """GONE was said of one of them."""
    untrue: str = ""
    """A post changed its mind, or is DONE and not placed."""
    outcomes: dict[str, str] = field(default_factory=dict)


def stopped(stage: Stage) -> Stop:
    told: Stop = stage.once("stop", lambda: _stop(stage))
    return told


def _stop(stage: Stage) -> Stop:
    piece, count = 1 << 20, 24
    told = Stop()
    reader, writer = _start(stage, 2)
    _, pair = meet(stage, piece * count, process=reader)
    _, owner, region, back = meet_back(stage, piece * count, writer)
    names = [f"{stage.seed}:{n % 4}" for n in range(count)]
    source = pair.source(b"".join(pattern(name, piece) for name in names[:4]))
    remote = [region.id, region.generation]
    theirs = [writer.ask("post", remote=remote, offset=n * piece, nbytes=piece, seed=names[n]) for n in range(count)]
    writer.stop()
    ours = [
        pair.writer.post(pair.peer, [Copy(source, (n % 4) * piece, at(pair.region), n * piece, piece)])
        for n in range(count)
    ]
    time.sleep(stage.random.random() * 0.01)
    reader.stop()

    def look(when: str) -> None:
        for who, watcher, peer in (("is written to", pair.writer, pair.peer), ("writes", owner, back)):
            if watcher.peer_state(peer) is PeerState.GONE:
                told.buried = told.buried or f"peer_state says GONE of a peer that {when}; it {who}"

    until = time.monotonic() + stage.times(1, 3, 45)
    while time.monotonic() < until:
        look("is stopped (SIGSTOP), with writes on their way")
        time.sleep(0.02)
    early = [pair.writer.poll(handle) for handle in ours]
    reader.go_on()
    writer.go_on()
    reader.describe()  # it goes on
    ends = [pair.end(handle, ENDS_WITHIN_S) for handle in ours]
    look("was stopped and goes on")
    told.outcomes["posts to it"] = ", ".join(status.name for status in ends)
    for n, (before, status) in enumerate(zip(early, ends, strict=True)):
        if before in (Status.DONE, Status.FAILED) and before is not status:
            told.untrue = f"post {n} was {before.name} while its peer was stopped, and {status.name} afterwards"
        elif status is Status.DONE and (wrong := reader.ask("differs", offset=n * piece, nbytes=piece, seed=names[n])):
            told.untrue = f"post {n} to a peer that was stopped meanwhile is DONE, and not placed: {wrong}"
    back_ends = [writer.ask("outcome", handle=handle, within=ENDS_WITHIN_S)[0] for handle in theirs]
    told.outcomes["its posts"] = ", ".join(back_ends)
    if owner.capabilities.needs_flush:
        owner.flush(region)
    for n, name in enumerate(back_ends):
        if Status[name] not in FINAL:
            told.untrue = f"post {n} of a writer that was stopped meanwhile does not end"
        elif name == "DONE":
            found = stage.read(owner, region, n * piece, piece)
            if wrong := difference(found, pattern(names[n], piece), n * piece):
                told.untrue = f"post {n} of a writer that was stopped is DONE, and not placed: {wrong}"
    return told


@check("PEE-6", seconds=180)
def stopped_and_continued(stage: Stage) -> None:
    told = stopped(stage)
    for what, names in told.outcomes.items():
        stage.note(what, names)
    stage.expect(not told.untrue, told.untrue)
