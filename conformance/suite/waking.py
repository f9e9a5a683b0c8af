"""WAK: who sleeps until something changes is woken."""

from __future__ import annotations

import threading
import time

from tensorferry.conformance.model import check
from tensorferry.conformance.stage import FINAL, PATIENCE_S, Pair, Stage, at
from tensorferry.conformance.suite.trouble import ENDS_WITHIN_S, shoot
from tensorferry.core.transport import Copy


@check("WAK-1")
def wakes_after_a_change(stage: Stage) -> None:
    pair = stage.pair(1 << 20)
    woken = threading.Event()
    pair.writer.on_progress(woken.set)
    source = pair.source(stage.pattern(1 << 20))
    for nbytes in (1, 4096, 1 << 20):
        handle = pair.writer.post(pair.peer, [Copy(source, 0, at(pair.region), 0, nbytes)])
        _sleep_until(stage, pair, [handle], woken)
        pair.done(handle)


@check("WAK-2", seconds=150)
def loses_no_wake(stage: Stage) -> None:
    pair = stage.pair(1 << 20)
    woken = threading.Event()
    pair.writer.on_progress(woken.set)
    source = pair.source(stage.pattern(1 << 20))
    for _ in range(stage.times(5, 25, 200)):
        handles = []
        for _ in range(stage.random.randrange(1, 40)):
            nbytes = stage.random.choice((1, 100, 10_000, 300_000))
            handles.append(pair.writer.post(pair.peer, [Copy(source, 0, at(pair.region), 0, nbytes)]))
        _sleep_until(stage, pair, handles, woken)
        for handle in handles:
            pair.done(handle)
    pair = stage.pair(64)
    pair.writer.on_progress(woken.set)
    woken.clear()  # before the posts: what ends at once wakes at once
    shots = shoot(stage, pair)
    pair.owner.close()
    waiting = {shot.handle for shot in shots}
    deadline = time.monotonic() + ENDS_WITHIN_S  # ERR-1 says so where they do not end
    while waiting and time.monotonic() < deadline:
        slept = woken.wait(PATIENCE_S)
        woken.clear()
        ended = {handle for handle in waiting if pair.writer.poll(handle) in FINAL}
        lost = ", ".join(sorted({pair.writer.poll(handle).name for handle in ended}))
        what = f"after a close of the target's owner, {len(ended)} posts are {lost} and nobody was woken"
        stage.expect(slept or not ended, f"{what} for {PATIENCE_S:g} s")
        waiting -= ended


def _sleep_until(stage: Stage, pair: Pair, handles: list[int], woken: threading.Event) -> None:
    """Until all have ended, looking only when woken."""
    waiting = set(handles)
    while waiting:
        if not woken.wait(PATIENCE_S):
            ended = [handle for handle in waiting if pair.writer.poll(handle) in FINAL]
            what = f"{len(ended)} of {len(handles)} posts ended and nobody was woken for {PATIENCE_S:g} s"
            stage.fail(what if ended else f"{len(waiting)} posts do not end")
        woken.clear()
        waiting = {handle for handle in waiting if pair.writer.poll(handle) not in FINAL}


@check("WAK-3")
def survives_a_wake_that_raises(stage: Stage) -> None:
    pair = stage.pair()

    def wake() -> None:
        raise RuntimeError("raised on purpose by the conformance suite")

    pair.writer.on_progress(wake)
    for n in range(5):
        data = stage.pattern(64, n)
        pair.done(pair.post(data), "a post whose wake function raises")
        pair.placed(data)


@check("WAK-4")
def is_silent_after_close(stage: Stage) -> None:
    pair = stage.pair(4 << 20)
    calls: list[float] = []
    pair.writer.on_progress(lambda: calls.append(time.monotonic()))
    source = pair.source(stage.pattern(4 << 20))
    for _ in range(10):
        pair.writer.post(pair.peer, [Copy(source, 0, at(pair.region), 0, 4 << 20)])
    pair.writer.close()
    closed = time.monotonic()
    stage.settle()
    late = [call for call in calls if call > closed]
    stage.expect(not late, f"woken {len(late)} times after close had returned")


@check("WAK-5")
def holds_no_lock_while_it_wakes(stage: Stage) -> None:
    pair = stage.pair(1 << 20)
    caller, called, answered = threading.get_ident(), threading.Event(), threading.Event()

    def wake() -> None:
        if threading.get_ident() != caller and not called.is_set():
            called.set()
            answered.wait(PATIENCE_S / 2)

    pair.writer.on_progress(wake)
    handle = pair.post(stage.pattern(1 << 20))
    if not called.wait(PATIENCE_S):
        stage.unknown("the function was not called from another thread")
    calls = {
        "poll": lambda: pair.writer.poll(handle),
        "drained": lambda: pair.writer.drained(handle),
        "peer_state": lambda: pair.writer.peer_state(pair.peer),
        "post": lambda: pair.post(b"x"),
    }
    took = {verb: stage.timed(call)[1] for verb, call in calls.items()}
    answered.set()
    late = [verb for verb, seconds in took.items() if seconds > PATIENCE_S / 4]
    stage.expect(not late, f"while the wake function runs, {', '.join(late)} waits for its end")
    stage.end(pair.writer, handle)
