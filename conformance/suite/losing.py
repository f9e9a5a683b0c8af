"""VIS-2, FEN-3, FEN-5 to FEN-7 and PEE-1, 2, 4, 5, 6: with the peer in another process, which is killed or stopped."""

from __future__ import annotations

import hashlib
import time
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
from tensorferry.core.transport import Copy, PeerState, Region, Status, Transport

NOTICED_WITHIN_S = 30.0 * FACTOR
ENDS_WITHIN_S = 60.0 * FACTOR


def meet(stage: Stage, nbytes: int = 4096, *, writer: Transport | None = None) -> tuple[PeerProcess, Pair]:
    """A process that owns a region, and a writer here that knows it."""
    process = stage.process()
    number, generation = process.ask("region", nbytes=nbytes)
    here = writer or stage.open()
    peer = joined(lambda: here.connect(process.describe()))
    region = Region(number, generation, Memory(0, nbytes))
    return process, Pair(stage, here, here, region, peer)


def meet_back(stage: Stage, nbytes: int) -> tuple[PeerProcess, Transport, Region, Any]:
    """A process that knows a region of ours, and how we see it."""
    process, owner = stage.process(), stage.open()
    region = stage.region(owner, nbytes)
    peer = joined(lambda: owner.connect(process.describe()))
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
    process, owner, region, _ = meet_back(stage, size)
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
    process.kill()
    return pair.writer, pair.peer


@check("FEN-3", seconds=60)
def the_dead_are_gone(stage: Stage) -> None:
    writer, peer = _ended(stage)
    gone = stage.gone(writer, peer, NOTICED_WITHIN_S)
    state = writer.peer_state(peer)
    stage.expect(gone, f"{NOTICED_WITHIN_S:g} s after the end of the peer, peer_state says {state!r} and not GONE")


@check("PEE-1", seconds=60)
def the_dead_are_noticed(stage: Stage) -> None:
    writer, peer = _ended(stage)
    noticed = stage.eventually(lambda: writer.peer_state(peer) is not PeerState.ALIVE, NOTICED_WITHIN_S)
    stage.expect(noticed, f"{NOTICED_WITHIN_S:g} s after the end of the peer, peer_state still says ALIVE")


@check("FEN-7", seconds=60)
def the_gone_stay_gone(stage: Stage) -> None:
    writer, peer = _ended(stage)
    if not stage.gone(writer, peer, NOTICED_WITHIN_S):
        stage.unknown("peer_state never said GONE (FEN-3)")
    until = time.monotonic() + stage.times(0, 1, 5) + 0.2
    while time.monotonic() < until:
        state = writer.peer_state(peer)
        stage.expect(state is PeerState.GONE, f"peer_state said GONE, and then {state!r}")
        time.sleep(0.01)


@check("FEN-5", seconds=90)
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
    try:
        process, away = meet(stage, 8 << 20)
    except NotApplicable as reason:
        stage.note("not stopped", reason)
        return
    source = away.source(stage.pattern(8 << 20))
    handles = [_posted(away, source, 0, 8 << 20) for _ in range(4)]
    process.stop()
    until = time.monotonic() + stage.times(1, 3, 45)
    while time.monotonic() < until:
        alive(away.writer, away.peer, "is stopped (SIGSTOP), with writes to it on their way")
        time.sleep(0.02)
    process.go_on()
    for handle in handles:
        away.end(handle, ENDS_WITHIN_S)
    alive(away.writer, away.peer, "was stopped and goes on")


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


@check("FEN-6", seconds=120)
def nothing_lands_after_gone(stage: Stage) -> None:
    _writers_that_close(stage)
    for _ in range(stage.times(1, 3, 20)):
        try:
            process, owner, region, peer = meet_back(stage, 8 << 20)
        except NotApplicable as reason:
            stage.note("not with a process", reason)
            return
        process.tell("stream", remote=[region.id, region.generation], nbytes=8 << 20, seed="stream")
        process.hear("stream")
        time.sleep(0.1 + stage.random.random() * 0.1)
        process.popen.kill()
        if not stage.gone(owner, peer, 30):
            stage.unknown("peer_state never said GONE (FEN-3)")
        stage.seal(region)
        time.sleep(0.05)
        stage.sealed(region, after="peer_state had said that its writer is GONE")
    stage.settle()
    stage.sealed(region, after="peer_state had said that its writer is GONE")


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
    dead, to_dead = meet(stage, 1 << 20, writer=writer)
    stopped, to_stopped = meet(stage, 1 << 20, writer=writer)
    well, to_well = meet(stage, 1 << 20, writer=writer)
    source = to_well.source(stage.pattern(1 << 20))
    dead.kill()
    stopped.stop()
    flying = []
    for pair in (to_dead, to_stopped):
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
    stopped.go_on()
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


@check("PEE-6", seconds=180)
def stopped_and_continued(stage: Stage) -> None:
    """With the owner stopped, then with the writer stopped."""
    piece, count = 1 << 20, 24
    pause = (0.5, 2.5, 40.0)[stage.tier]
    process, pair = meet(stage, piece * count)
    name = f"{stage.seed}"
    source = pair.source(pattern(name, piece * count))
    handles = [_posted(pair, source, n * piece, piece) for n in range(count)]
    time.sleep(stage.random.random() * 0.01)
    process.stop()
    time.sleep(pause)
    early = [pair.writer.poll(handle) for handle in handles]
    process.go_on()
    whole = pattern(name, piece * count)
    ends = [pair.end(handle, ENDS_WITHIN_S) for handle in handles]
    stage.note("outcomes", ", ".join(status.name for status in ends))
    for n, (before, status) in enumerate(zip(early, ends, strict=True)):
        kept = before not in FINAL or before is status
        stage.expect(kept, f"post {n} was {before.name} while its peer was stopped, and {status.name} afterwards")
        if status is Status.DONE:
            same = process.ask("digest", offset=n * piece, nbytes=piece) == _digest(whole[n * piece :][:piece])
            stage.expect(same, f"post {n} to a peer that was stopped meanwhile is DONE, and not placed")
    _stopped_writer(stage, piece, count, pause)


def _stopped_writer(stage: Stage, piece: int, count: int, pause: float) -> None:
    process, owner, region, _ = meet_back(stage, piece * count)
    names = [f"{stage.seed}:{n}" for n in range(count)]
    remote = [region.id, region.generation]
    handles = [
        process.ask("post", remote=remote, offset=n * piece, nbytes=piece, seed=names[n % 4]) for n in range(count)
    ]
    process.stop()
    time.sleep(pause)
    process.go_on()
    for n, handle in enumerate(handles):
        status, _ = process.ask("outcome", handle=handle, within=ENDS_WITHIN_S)
        stage.expect(Status[status] in FINAL, f"post {n} of a writer that was stopped meanwhile does not end")
        if status == "DONE":
            if owner.capabilities.needs_flush:
                owner.flush(region)
            wrong = difference(stage.read(owner, region, n * piece, piece), pattern(names[n % 4], piece), n * piece)
            stage.expect(not wrong, f"post {n} of a writer that was stopped is DONE, and not placed: {wrong}")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
