"""ERR, CAN, FEN-1, FEN-2, FEN-4, PEE-3, PEE-7, PEE-8: what a handle says of its end is true."""

from __future__ import annotations

import time
from functools import partial

from tensorferry.conformance.model import NotApplicable, check
from tensorferry.conformance.stage import FINAL, PATIENCE_S, Pair, Stage, at
from tensorferry.conformance.suite.losing import meet
from tensorferry.conformance.suite.stranding import stranded
from tensorferry.conformance.suite.trouble import CLOSED, ENDS_WITHIN_S, Shot, ending, fates, lost, shoot
from tensorferry.core.errors import BadCall, FerryError
from tensorferry.core.transport import Copy, RemoteRegion, Status

SCENES_S = 240.0
"""Longest check that looks at `fates`: whichever comes first brings them about."""


@check("ERR-1", seconds=SCENES_S)
def statuses_are_final(stage: Stage) -> None:
    pair = stage.pair()
    handle = pair.post(b"x")
    for _ in range(3):
        status, drained = pair.writer.poll(handle), pair.writer.drained(handle)
        stage.expect(isinstance(status, Status), f"poll answered {status!r}, which is no Status")
        stage.expect(isinstance(drained, bool), f"drained answered {drained!r}, which is no bool")
    stage.done(pair.writer, handle)
    for n in range(200):
        status = pair.writer.poll(handle)
        stage.expect(status is Status.DONE, f"a handle was DONE, and {status!r} at poll {n} after it")
    for fate in fates(stage):
        pending = f"after {fate.scene}, a handle is still PENDING after {ENDS_WITHIN_S:g} s"
        stage.expect(not fate.raised, f"after {fate.scene}, a handle is not to be asked: {fate.raised}")
        stage.expect(fate.status is not Status.PENDING, pending)
        before = fate.status
        for now, _ in fate.looks:
            allowed = now is before or (before is Status.UNKNOWN and now in FINAL)
            stage.expect(allowed, f"after {fate.scene}, a handle was {before.name}, and later {now!r}")
            before = now


@check("ERR-2", seconds=SCENES_S)
def final_means_drained(stage: Stage) -> None:
    pair = stage.pair(1 << 20)
    source = pair.source(stage.pattern(1 << 20))
    for _ in range(stage.times(20, 60, 500)):
        handle = pair.writer.post(pair.peer, [Copy(source, 0, at(pair.region), 0, 1 << 20)])
        while pair.writer.poll(handle) is Status.PENDING:
            pass  # the first moment is what matters
        drained = pair.writer.drained(handle)
        stage.expect(drained, f"a handle is {pair.writer.poll(handle).name} and not drained")
        pair.writer.release(handle)
    for fate in fates(stage):
        for status, drained in [(fate.status, fate.drained), *fate.looks]:
            final = status in (Status.DONE, Status.FAILED)
            stage.expect(drained or not final, f"after {fate.scene}, a handle is {status.name} and not drained")


@check("ERR-3", seconds=SCENES_S)
def drained_is_monotone(stage: Stage) -> None:
    pair = stage.pair(64)
    shots = shoot(stage, pair, 4)
    seen: set[int] = set()
    until = time.monotonic() + 0.3
    while time.monotonic() < until or len(seen) < len(shots):
        for shot in shots:
            if pair.writer.drained(shot.handle):
                seen.add(shot.handle)
            else:
                stage.expect(shot.handle not in seen, f"handle {shot.handle} was drained, and is not any more")
        stage.expect(time.monotonic() < until + 30, "a post between two healthy ends is not drained after 30 s")
    for fate in fates(stage):
        told = [fate.drained, *(drained for _, drained in fate.looks)]
        stage.expect(told == sorted(told), f"after {fate.scene}, a handle was drained, and is not any more")


@check("ERR-9")
def source_free_is_monotone(stage: Stage) -> None:
    pair = stage.pair(1 << 20)
    source = pair.source(stage.pattern(1 << 20))
    for nbytes in (1, 4096, *[1 << 20] * stage.times(5, 20, 200)):
        handle = pair.writer.post(pair.peer, [Copy(source, 0, at(pair.region), 0, nbytes)])
        free = over = False
        deadline = time.monotonic() + PATIENCE_S
        while not over:
            over = pair.writer.poll(handle) in FINAL and pair.writer.drained(handle)
            now = pair.writer.source_free(handle)
            stage.expect(isinstance(now, bool), f"source_free answered {now!r}, which is no bool")
            stage.expect(now or not free, "source_free was True, and is not any more")
            stage.expect(now or not over, "a handle is drained, and its source is not free")
            free = now
            stage.expect(time.monotonic() < deadline, f"a post is not drained after {PATIENCE_S:g} s")
        pair.done(handle)


@check("ERR-4")
def unknown_handles(stage: Stage) -> None:
    pair = stage.pair()
    handles = [pair.post(b"x") for _ in range(3)]
    for handle in handles:
        stage.done(pair.writer, handle)
    pair.writer.release(handles[1])
    for what, handle in (("was released", handles[1]), ("was never given", max(handles) + 1_000_003)):
        for verb in ("poll", "drained", "source_free", "release"):
            call = getattr(pair.writer, verb)
            stage.refused(partial(call, handle), BadCall, what=f"{verb} of a handle that {what}")
    for handle in (handles[0], handles[2]):
        stage.expect(pair.writer.poll(handle) is Status.DONE, "the release of one handle changed another")


@check("ERR-5", seconds=SCENES_S)
def release_needs_drained(stage: Stage) -> None:
    try:
        released = stranded(stage).released  # of which one may have become drained between the two questions
        what = f"of a closed writer's posts to a stopped process, release took {released} that are not drained"
        stage.expect(released < 2, what)
    except NotApplicable as reason:
        stage.note("not to a stopped process", reason)
    taken, asked = 0, 0
    for _ in range(20):
        pair = stage.pair(64)
        held = stage.hooks.has("hold", "let_go")
        if held:
            stage.hooks.hold(pair.writer)
        try:
            for shot in shoot(stage, pair, 4):
                if pair.writer.drained(shot.handle):
                    continue
                asked += 1
                try:
                    pair.writer.release(shot.handle)
                except BadCall:
                    status = pair.writer.poll(shot.handle)  # it is still there
                    stage.expect(isinstance(status, Status), f"after a refused release, poll answered {status!r}")
                    return
                taken += 1  # or it was drained in between: hence more than one
                stage.expect(taken < 4 and not held, f"release took {taken} handles that were not drained")
        finally:
            if held:
                stage.hooks.let_go(pair.writer)
    stage.unknown(f"no handle was seen that is not drained ({asked} at most): the hook hold would make it certain")


@check("ERR-6", seconds=SCENES_S)
def done_is_true(stage: Stage) -> None:
    for fate in fates(stage):
        what = f"after {fate.scene}, a post of two copies is DONE, and not all is placed: {fate.lost}"
        stage.expect(not fate.lost, what)


@check("ERR-7", seconds=SCENES_S)
def failed_is_over(stage: Stage) -> None:
    for fate in fates(stage):
        landed = fate.landed if fate.status is Status.FAILED else ""
        stage.expect(not landed, f"something landed after {fate.scene}, when its handle was FAILED: {landed}")


@check("FEN-4", seconds=SCENES_S)
def drained_is_over(stage: Stage) -> None:
    for fate in fates(stage):
        landed = fate.landed if fate.drained else ""
        stage.expect(not landed, f"something landed after {fate.scene}, when its handle was drained: {landed}")
    try:
        landed = stranded(stage).landed
    except NotApplicable as reason:
        stage.note("not to a stopped process", reason)
    else:
        what = "a post to a stopped process was drained, by its writer's close, and landed when the process went on"
        stage.expect(not landed, f"{what}: {landed}")
    if not stage.hooks.has("hold", "let_go"):
        return
    pair = stage.pair(64)
    stage.hooks.hold(pair.writer)
    shots = shoot(stage, pair, 3)
    early = [shot for shot in shots if pair.writer.drained(shot.handle)]
    stage.seal(*(shot.region for shot in early))
    stage.hooks.let_go(pair.writer)
    stage.drained(pair.writer, [shot.handle for shot in shots], 30)
    stage.settle()
    stage.sealed(*(shot.region for shot in early), after="its handle was drained, while it was held back,")


@check("ERR-8")
def refusals_say_what_and_who(stage: Stage) -> None:
    pair = stage.pair()
    source = pair.source(b"x" * 64)
    far = [Copy(source, 0, at(pair.region), 4096, 64)]
    stranger = [Copy(source, 0, RemoteRegion(pair.region.id + 9, 1), 0, 64)]
    for what, call in {
        "a copy past the end": lambda: pair.writer.post(pair.peer, far),
        "a copy to a region that is not there": lambda: pair.writer.post(pair.peer, stranger),
        "connect with garbage": lambda: pair.writer.connect(b"garbage"),
    }.items():
        error = stage.refused(call, FerryError, what=what)
        assert isinstance(error, FerryError)
        stage.expect(len(error.cause.split()) > 1, f"{what} is refused without words: {error.cause!r}")
        named = error.transport == pair.writer.name
        stage.expect(named, f"{what} is refused in the name of {error.transport!r}, not of {pair.writer.name!r}")


# ---- fences that need no other process ----------------------------------------------------------------------------


@check("FEN-1", seconds=120)
def nothing_lands_after_retire(stage: Stage) -> None:
    for attempt in range(stage.times(2, 6, 30)):
        pair = stage.pair(64)
        held = stage.hooks.has("hold", "let_go") and attempt % 2 == 0
        if held:
            stage.hooks.hold(pair.writer)
        shots = shoot(stage, pair)
        time.sleep(stage.random.random() * 0.03)
        for shot in shots:
            pair.owner.retire(shot.region)
            stage.seal(shot.region)
        first = shots[0].region
        late = stage.attempt(partial(pair.post, b"late", region=first), "a post after retire")
        if held:
            stage.hooks.let_go(pair.writer)
        handles = [shot.handle for shot in shots] + ([] if isinstance(late, FerryError) else [late])
        stage.ended(pair.writer, handles, 60)
        time.sleep(0.05)
        stage.sealed(*(shot.region for shot in shots), after="retire had returned")
    stage.settle()
    stage.sealed(*(shot.region for shot in shots), after="retire had returned")


def _cut_under_way(stage: Stage) -> tuple[Pair, list[int]]:
    """Posts whose link is cut, and healed: those that are UNKNOWN then."""
    pair = stage.pair(64)
    held = stage.hooks.has("hold", "let_go")
    if held:
        stage.hooks.hold(pair.writer)
    try:
        handles = [shot.handle for shot in shoot(stage, pair)]
        stage.settle()  # one has to have begun: what never did can be FAILED, and says nothing about a fence
        stage.hooks.cut(pair.writer, pair.peer)
        time.sleep(0.5)
    finally:
        if held:
            stage.hooks.let_go(pair.writer)
    stage.hooks.heal(pair.writer, pair.peer)
    stage.ended(pair.writer, handles, ENDS_WITHIN_S)
    return pair, [handle for handle in handles if pair.writer.poll(handle) is Status.UNKNOWN]


@check("FEN-2", seconds=SCENES_S + 60)
def unknown_becomes_drained(stage: Stage) -> None:
    unknown = [fate for fate in fates(stage) if fate.status is Status.UNKNOWN and fate.scene != CLOSED]
    for fate in unknown:
        what = f"after {fate.scene}, an UNKNOWN handle is not drained after {ENDS_WITHIN_S:g} s"
        stage.expect(fate.drains, what)
    seen = len(unknown)
    if stage.hooks.has("cut", "heal"):
        pair, lost_by_cut = _cut_under_way(stage)
        ended = stage.drained(pair.writer, lost_by_cut, ENDS_WITHIN_S)
        stage.expect(
            ended, f"after its link was cut, an UNKNOWN handle is not drained {ENDS_WITHIN_S:g} s after the link healed"
        )
        seen += len(lost_by_cut)
    if not seen:
        stage.unknown("no handle became UNKNOWN; the hooks cut and heal would bring that about")


# ---- cancel -------------------------------------------------------------------------------------------------------


@check("CAN-1", seconds=60)
def cancelled_ends(stage: Stage) -> None:
    for attempt in range(stage.times(2, 5, 30)):
        pair = stage.pair(64)
        shots = shoot(stage, pair, 5)
        if attempt:  # the first are cancelled as early as can be, the last of them first: most have not begun
            time.sleep(stage.random.random() * 0.01)
        for shot in reversed(shots):
            pair.writer.cancel(shot.handle)
        for shot in shots:
            status = pair.end(shot.handle)
            if status is Status.DONE:
                pair.flush(shot.region)
                wrong = lost(shot)
                stage.expect(not wrong, f"a cancelled post is DONE, and not all is placed: {wrong}")


@check("CAN-2")
def cancel_after_the_end(stage: Stage) -> None:
    pair = stage.pair()
    handle = pair.post(data := stage.pattern(64))
    stage.done(pair.writer, handle)
    for _ in range(3):
        pair.writer.cancel(handle)
        status = pair.writer.poll(handle)
        stage.expect(status is Status.DONE, f"a handle was DONE, and after a cancel it is {status!r}")
        stage.expect(pair.writer.drained(handle), "a handle was DONE, and after a cancel it is not drained")
    pair.flush()
    pair.placed(data)
    pair.writer.release(handle)


@check("CAN-3")
def cancel_of_nothing(stage: Stage) -> None:
    pair = stage.pair()
    handle = pair.post(b"x")
    pair.done(handle)  # and released
    for what, number in (("was released", handle), ("was never given", handle + 1_000_003)):
        stage.refused(partial(pair.writer.cancel, number), BadCall, what=f"cancel of a handle that {what}")


@check("CAN-4")
def cancel_of_one(stage: Stage) -> None:
    for _ in range(stage.times(1, 4, 20)):
        pair = stage.pair(64)
        shots = shoot(stage, pair, 6)
        for shot in shots[1::2]:
            pair.writer.cancel(shot.handle)
        for shot in shots[::2]:
            status = pair.end(shot.handle)
            stage.expect(status is Status.DONE, f"the neighbour of a cancelled post ended {status.name}")
            pair.flush(shot.region)
            wrong = lost(shot)
            stage.expect(not wrong, f"the neighbour of a cancelled post is DONE, and not all is placed: {wrong}")
        pair.done(pair.post(b"after"), "a post after cancels")


# ---- peers that close, and links ----------------------------------------------------------------------------------


@check("PEE-3", seconds=90)
def gone_takes_nothing(stage: Stage) -> None:
    pair = stage.pair(own=True)
    pair.done(pair.post(b"before"))
    pair.owner.close()
    if not stage.gone(pair.writer, pair.peer, stage.times(1, 1, 5)):
        process, pair = meet(stage)
        process.kill()
        gone = stage.gone(pair.writer, pair.peer, 30)
        stage.expect(gone, "30 s after the end of the peer's process, peer_state does not say GONE")
    for _ in range(3):
        told = ending(stage, lambda: pair.post(b"after"), pair)
        stage.expect(told is not Status.DONE, "peer_state says GONE, and a post to the peer ended DONE")


@check("PEE-7", seconds=90)
def closed_peers(stage: Stage) -> None:
    pair = stage.pair(own=True)
    pair.done(pair.post(b"before"))
    pair.owner.close()
    for n in range(4):
        data = stage.pattern(64, n)
        told = ending(stage, partial(pair.post, data), pair)
        stage.note(f"post {n}", told)
        own = pair.owner.capabilities
        if told is Status.DONE and not own.allocates_targets and not own.needs_flush:  # nobody flushes a closed one
            pair.placed(data, what="after the peer's transport has closed, a post")
        time.sleep(0.05)


@check("PEE-8", seconds=180)
def a_link_that_is_cut(stage: Stage) -> None:
    if not stage.hooks.has("cut", "heal"):
        if stage.pair().writer.capabilities.same_host_only:
            raise NotApplicable("declares same_host_only: there is no link")
        stage.unknown("needs the hooks cut and heal")
    for _ in range(stage.times(1, 3, 10)):
        pair = stage.pair(64)
        spare, data = pair.target(4096), stage.pattern(4096, "while cut")
        shots = shoot(stage, pair)
        time.sleep(stage.random.random() * 0.02)
        stage.hooks.cut(pair.writer, pair.peer)
        late = stage.attempt(partial(pair.post, data, region=spare), "post while the link is cut")
        if not isinstance(late, FerryError):
            shots.append(Shot(late, spare, data))
        time.sleep(0.5)
        stage.hooks.heal(pair.writer, pair.peer)
        for shot in shots:
            if pair.end(shot.handle, 60) is Status.DONE:
                pair.flush(shot.region)
                wrong = lost(shot)
                stage.expect(not wrong, f"after the link was cut and healed a post is DONE, and not placed: {wrong}")
        _again(stage, pair)


def _again(stage: Stage, pair: Pair) -> None:
    def arrives() -> bool:
        pair.reconnect()
        return ending(stage, lambda: pair.post(b"healed"), pair) is Status.DONE

    stage.expect(
        stage.eventually(arrives, ENDS_WITHIN_S), f"{ENDS_WITHIN_S:g} s after the link was healed, no post ends DONE"
    )
    pair.placed(b"healed")
