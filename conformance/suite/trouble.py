"""Posts that something happens to while they are on their way, and what they say of themselves afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from tensorferry.conformance.model import Violation
from tensorferry.conformance.patience import FACTOR
from tensorferry.conformance.patterns import difference
from tensorferry.conformance.stage import FINAL, Pair, Stage, at
from tensorferry.core.errors import FerryError
from tensorferry.core.transport import Copy, Region, Status

NBYTES = 4 << 20
SHOTS = 8
ENDS_WITHIN_S = 60.0 * FACTOR


@dataclass
class Shot:
    """One post of two copies, with a region of its own."""

    handle: int
    region: Region
    data: bytes
    status: Status = Status.PENDING
    drained: bool = False


@dataclass
class Scene:
    """Posts and what happened to them."""

    name: str
    pair: Pair
    shots: list[Shot]
    readable: bool
    """The targets may still be read: their transport is open, or their memory is the suite's."""

    def lost(self, shot: Shot) -> str:
        """Where the target lacks bytes of the post; empty where it has them all."""
        self.pair.stage.expect(self.readable, "the suite looked at memory that may be gone")
        return difference(shot.region.memory.view(), shot.data)


def shoot(stage: Stage, pair: Pair, count: int = SHOTS) -> list[Shot]:
    regions = [stage.own_target(pair.owner, NBYTES) for _ in range(count)]
    pair.reconnect()
    data = stage.pattern(NBYTES)
    source, half = pair.source(data), NBYTES // 2 + 1
    shots = []
    for region in regions:
        copies = [Copy(source, o, at(region), o, n) for o, n in ((0, half), (half, NBYTES - half))]
        shots.append(Shot(pair.writer.post(pair.peer, copies), region, data))
    return shots


def _cancel(pair: Pair, shots: list[Shot]) -> None:
    for shot in reversed(shots):
        pair.writer.cancel(shot.handle)


def _close_writer(pair: Pair, shots: list[Shot]) -> None:
    pair.writer.close()


def _close_owner(pair: Pair, shots: list[Shot]) -> None:
    if pair.owner.capabilities.needs_flush:  # its last chance
        for shot in shots:
            pair.owner.flush(shot.region)
    pair.owner.close()


def _retire(pair: Pair, shots: list[Shot]) -> None:
    for shot in reversed(shots):
        pair.owner.retire(shot.region)


def _disconnect(pair: Pair, shots: list[Shot]) -> None:
    pair.writer.disconnect(pair.peer)


EVENTS: dict[str, Callable[[Pair, list[Shot]], None]] = {
    "a cancel": _cancel,
    "a retire": _retire,
    "a disconnect": _disconnect,
    "a close of the writer": _close_writer,
    "a close of the target's owner": _close_owner,
}


def scenes(
    stage: Stage, look: Callable[[Scene, Shot], None] = lambda scene, shot: None, *, often: bool = False
) -> list[Scene]:
    """Each event, once or (`often`) at different moments, with the outcome of every post. `look` is called at the first
    moment at which a post has one."""
    found = []
    for name, event in EVENTS.items():
        for attempt in range(stage.times(1, 2 if often else 1, 8)):
            pair = stage.pair(64)
            if name == "a cancel" and not pair.writer.capabilities.cancellable:
                break
            own = pair.owner.capabilities
            readable = not (name == "a close of the target's owner" and own.allocates_targets)
            readable = readable and not (name == "a retire" and own.needs_flush)  # nobody flushes what is retired
            scene = Scene(name, pair, shoot(stage, pair), readable)
            if attempt:
                time.sleep(stage.random.random() * 0.02)
            event(pair, scene.shots)
            _watch(scene, look)
            stage.note(name if not attempt else f"{name} {attempt}", ", ".join(s.status.name for s in scene.shots))
            found.append(scene)
    return found


def _watch(scene: Scene, look: Callable[[Scene, Shot], None]) -> None:
    writer, waiting = scene.pair.writer, list(scene.shots)
    deadline = time.monotonic() + ENDS_WITHIN_S
    while waiting:
        for shot in list(waiting):
            shot.status = writer.poll(shot.handle)
            if shot.status in FINAL:
                shot.drained = writer.drained(shot.handle)
                waiting.remove(shot)
                look(scene, shot)
        if waiting and time.monotonic() > deadline:
            raise Violation(f"after {scene.name}, {len(waiting)} handles are PENDING for {ENDS_WITHIN_S:g} s")


def moved(stage: Stage, scene: Scene, shot: Shot, what: str) -> None:
    """Expect the seal that was put on the shot's target to hold."""
    if scene.readable:
        stage.sealed(shot.region, after=f"{scene.name}, when its handle was {what}")


def ending(stage: Stage, call: Callable[[], int], pair: Pair, within: float = ENDS_WITHIN_S) -> FerryError | Status:
    """The error with which a post is refused, or the status that it ends with."""
    answer = stage.attempt(call, "post")
    return answer if isinstance(answer, FerryError) else pair.end(answer, within)
