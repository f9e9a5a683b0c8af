"""ERR, CAN, FEN-1, FEN-2, FEN-4, PEE-3, PEE-7, PEE-8: what a handle says of its end is true."""

from __future__ import annotations

import time
from functools import partial

from tensorferry.conformance.model import check
from tensorferry.conformance.stage import Pair, Stage, at
from tensorferry.conformance.suite.trouble import Scene, Shot, ending, moved, scenes, shoot
from tensorferry.core.errors import BadCall, FerryError
from tensorferry.core.transport import Copy, RemoteRegion, Status


@check("ERR-1", seconds=90)
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
    for scene in scenes(stage):
        for _ in range(3):
            for shot in scene.shots:
                now = scene.pair.writer.poll(shot.handle)
                what = f"after {scene.name}, a handle was {shot.status.name}, and later {now!r}"
                stage.expect(now is shot.status, what)
            time.sleep(0.05)


@check("ERR-2", seconds=90)
def final_means_drained(stage: Stage) -> None:
    def look(scene: Scene, shot: Shot) -> None:
        if shot.status is not Status.UNKNOWN:
            stage.expect(shot.drained, f"after {scene.name}, a handle is {shot.status.name} and not drained")

    pair = stage.pair(1 << 20)
    source = pair.source(stage.pattern(1 << 20))
    for _ in range(stage.times(20, 60, 500)):
        handle = pair.writer.post(pair.peer, [Copy(source, 0, at(pair.region), 0, 1 << 20)])
        while pair.writer.poll(handle) is Status.PENDING:
            pass  # the first moment is what matters
        drained = pair.writer.drained(handle)
        stage.expect(drained, f"a handle is {pair.writer.poll(handle).name} and not drained")
        pair.writer.release(handle)
    scenes(stage, look)


@check("ERR-3", seconds=90)
def drained_is_monotone(stage: Stage) -> None:
    pair = stage.pair(64)
    shots = shoot(stage, pair, 4)
    seen: set[int] = set()
    until = time.monotonic() + 0.5
    while time.monotonic() < until or len(seen) < len(shots):
        for shot in shots:
            if pair.writer.drained(shot.handle):
                seen.add(shot.handle)
            else:
                stage.expect(shot.handle not in seen, f"handle {shot.handle} was drained, and is not any more")
        stage.expect(time.monotonic() < until + 30, "a post between two healthy ends is not drained after 30 s")
    for scene in scenes(stage):
        for shot in scene.shots:
            now = scene.pair.writer.drained(shot.handle)
            stage.expect(now or not shot.drained, f"after {scene.name}, a handle was drained, and is not any more")


@check("ERR-4")
def unknown_handles(stage: Stage) -> None:
    pair = stage.pair()
    handles = [pair.post(b"x") for _ in range(3)]
    for handle in handles:
        stage.done(pair.writer, handle)
    pair.writer.release(handles[1])
    for what, handle in (("was released", handles[1]), ("was never given", max(handles) + 1_000_003)):
        for verb in ("poll", "drained", "release"):
            call = getattr(pair.writer, verb)
            stage.refused(partial(call, handle), BadCall, what=f"{verb} of a handle that {what}")
    for handle in (handles[0], handles[2]):
        stage.expect(pair.writer.poll(handle) is Status.DONE, "the release of one handle changed another")


@check("ERR-5", seconds=60)
def release_needs_drained(stage: Stage) -> None:
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


@check("ERR-6", seconds=120)
def done_is_true(stage: Stage) -> None:
    def look(scene: Scene, shot: Shot) -> None:
        if shot.status is Status.DONE and scene.readable:
            scene.pair.flush(shot.region) if not scene.name.endswith("owner") else None
            wrong = scene.lost(shot)
            stage.expect(not wrong, f"after {scene.name}, a post of two copies is DONE, and not all is placed: {wrong}")

    scenes(stage, look, often=True)


@check("ERR-7", seconds=120)
def failed_is_over(stage: Stage) -> None:
    _nothing_lands_after(stage, "FAILED", lambda shot: shot.status is Status.FAILED)


@check("FEN-4", seconds=120)
def drained_is_over(stage: Stage) -> None:
    _nothing_lands_after(stage, "drained", lambda shot: shot.drained)
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


def _nothing_lands_after(stage: Stage, what: str, over: object) -> None:
    sealed: list[tuple[Scene, Shot]] = []

    def look(scene: Scene, shot: Shot) -> None:
        if callable(over) and over(shot) and scene.readable:
            stage.seal(shot.region)
            sealed.append((scene, shot))

    scenes(stage, look, often=True)
    stage.note("watched", len(sealed))
    for scene, shot in sealed:
        moved(stage, scene, shot, what)
    stage.settle()
    for scene, shot in sealed:
        moved(stage, scene, shot, what)


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


@check("FEN-2", seconds=180)
def unknown_becomes_drained(stage: Stage) -> None:
    unknown = [(scene, shot) for scene in scenes(stage) for shot in scene.shots if shot.status is Status.UNKNOWN]
    for scene, shot in unknown:
        ended = stage.drained(scene.pair.writer, [shot.handle], 60)
        stage.expect(ended, f"after {scene.name}, an UNKNOWN handle is not drained after 60 s")
    if stage.hooks.has("hold", "let_go"):
        pair = stage.pair(64)
        stage.hooks.hold(pair.writer)
        shots = shoot(stage, pair, 3)
        stage.settle()  # one has to have begun: what never did can be FAILED, and says nothing about a fence
        pair.writer.close()
        held = [shot for shot in shots if pair.writer.poll(shot.handle) is Status.UNKNOWN]
        stage.hooks.let_go(pair.writer)
        ended = stage.drained(pair.writer, [shot.handle for shot in held], 60)
        stage.expect(ended, "a handle that was UNKNOWN when its writer closed is not drained 60 s after it was let go")
        unknown += [(Scene("hold", pair, shots, True), shot) for shot in held]
    if not unknown:
        stage.unknown("no handle became UNKNOWN; the hooks hold and let_go would bring that about")


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
                wrong = Scene("a cancel", pair, shots, True).lost(shot)
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
            wrong = Scene("a cancel", pair, shots, True).lost(shot)
            stage.expect(not wrong, f"the neighbour of a cancelled post is DONE, and not all is placed: {wrong}")
        pair.done(pair.post(b"after"), "a post after cancels")


# ---- peers that close, and links ----------------------------------------------------------------------------------


@check("PEE-3", seconds=90)
def gone_takes_nothing(stage: Stage) -> None:
    pair = stage.pair(own=True)
    pair.done(pair.post(b"before"))
    pair.owner.close()
    if not stage.gone(pair.writer, pair.peer, 5):
        from tensorferry.conformance.suite.losing import meet

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
        if told is Status.DONE and not pair.owner.capabilities.allocates_targets:
            pair.placed(data, what="after the peer's transport has closed, a post")
        time.sleep(0.05)


@check("PEE-8", seconds=180)
def a_link_that_is_cut(stage: Stage) -> None:
    if not stage.hooks.has("cut", "heal"):
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
                wrong = Scene("a cut", pair, shots, True).lost(shot)
                stage.expect(not wrong, f"after the link was cut and healed a post is DONE, and not placed: {wrong}")
        _again(stage, pair)


def _again(stage: Stage, pair: Pair) -> None:
    def arrives() -> bool:
        pair.reconnect()
        return ending(stage, lambda: pair.post(b"healed"), pair) is Status.DONE

    stage.expect(stage.eventually(arrives, 60), "60 s after the link was healed, no post ends DONE")
    pair.placed(b"healed")
