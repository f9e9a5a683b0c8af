"""Posts that something happens to while they are on their way, and what they say of themselves afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from tensorferry.conformance.patience import FACTOR
from tensorferry.conformance.patterns import SEAL, difference
from tensorferry.conformance.stage import FINAL, Pair, Stage, at
from tensorferry.core.errors import FerryError
from tensorferry.core.transport import Copy, Fence, Region, Status

NBYTES = 4 << 20
SHOTS = 8
ENDS_WITHIN_S = 60.0 * FACTOR
CLOSED = "a close of the writer"


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

    @property
    def flushes(self) -> bool:
        return self.pair.owner.capabilities.needs_flush and not self.name.endswith("owner")


@dataclass
class Fate:
    """What became of one post, as data: what is open is closed by the time that other rules look at it."""

    scene: str
    status: Status
    """As first seen that was not PENDING; PENDING where it never ended."""
    drained: bool
    """At that moment."""
    lost: str = ""
    """DONE, and where the target lacked bytes of it."""
    raised: str = ""
    """PENDING, because poll or drained raised this."""
    looks: list[tuple[Status, bool]] = field(default_factory=list)
    """What poll and drained said later, in this order."""
    landed: str = ""
    """Drained, or FAILED, and what then landed."""
    drains: bool = False
    """In the end, or within the time that a DRAIN fence has."""


def lost(shot: Shot) -> str:
    """Where the target lacks bytes of the post; empty where it has them all."""
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
    CLOSED: _close_writer,
    "a close of the target's owner": _close_owner,
}


def fates(stage: Stage) -> list[Fate]:
    """Each event, at different moments, and the outcome of every post: brought about once for all rules about it."""
    found: list[Fate] = stage.once("trouble", lambda: _fates(stage))
    for name in EVENTS:
        if told := ", ".join(fate.status.name for fate in found if fate.scene == name):
            stage.note(name, told)
    return found


def _fates(stage: Stage) -> list[Fate]:
    scenes: list[Scene] = []
    seen: dict[int, Fate] = {}  # by the shot's id
    for name, event in EVENTS.items():
        for attempt in range(stage.times(1, 2, 8)):
            pair = stage.pair(64)
            if name == "a cancel" and not pair.writer.capabilities.cancellable:
                break
            own = pair.owner.capabilities
            readable = not (name == "a close of the target's owner" and own.allocates_targets)
            readable = readable and not (name == "a retire" and own.needs_flush)  # nobody flushes what is retired
            scene = Scene(name, pair, shoot(stage, pair), readable)
            scenes.append(scene)
            if attempt:
                time.sleep(stage.random.random() * 0.02)
            event(pair, scene.shots)
            _watch(stage, scene, seen)
            if any(shot.status is Status.PENDING for shot in scene.shots):
                return list(seen.values())  # ERR-1 says so; nobody waits for it again
            _look(scene, seen)
    _look_on(stage, scenes, seen)
    if Fence.DRAIN in scenes[0].pair.writer.capabilities.fences:
        deadline = time.monotonic() + ENDS_WITHIN_S
        for scene in scenes:
            if scene.name == CLOSED:
                continue  # what would find out has ended
            unknown = [shot.handle for shot in scene.shots if shot.status is Status.UNKNOWN]
            stage.drained(scene.pair.writer, unknown, max(0.0, deadline - time.monotonic()))
    for scene in scenes:
        for shot in scene.shots:
            seen[id(shot)].drains = scene.pair.writer.drained(shot.handle)
    return list(seen.values())


def _watch(stage: Stage, scene: Scene, seen: dict[int, Fate]) -> None:
    """Until each post has an outcome. At the first moment of one, the bytes of what is DONE are compared, and nothing
    may land any more where it is drained or FAILED: the target is sealed."""
    pair, waiting = scene.pair, list(scene.shots)
    deadline = time.monotonic() + ENDS_WITHIN_S
    while waiting and time.monotonic() < deadline:
        for shot in list(waiting):
            answer = stage.attempt(partial(_ask, pair, shot), f"after {scene.name}, poll or drained")
            if isinstance(answer, FerryError):  # ERR-1 says so
                waiting.remove(shot)
                seen[id(shot)] = Fate(scene.name, Status.PENDING, False, raised=repr(answer))
                continue
            shot.status, shot.drained = answer
            if shot.status not in FINAL:
                continue
            stage.expect(isinstance(shot.status, Status), f"poll answered {shot.status!r}, which is no Status")
            waiting.remove(shot)
            fate = seen[id(shot)] = Fate(scene.name, shot.status, shot.drained)
            if scene.readable and (shot.drained or shot.status is not Status.UNKNOWN):
                if scene.flushes:  # what is placed and not yet visible is not what lands later
                    pair.flush(shot.region)
                fate.lost = lost(shot) if shot.status is Status.DONE else ""
                stage.seal(shot.region)
    for shot in waiting:
        seen[id(shot)] = Fate(scene.name, Status.PENDING, False)


def _ask(pair: Pair, shot: Shot) -> tuple[Status, bool]:
    status = pair.writer.poll(shot.handle)
    return status, status in FINAL and pair.writer.drained(shot.handle)


def _look(scene: Scene, seen: dict[int, Fate]) -> None:
    for shot in scene.shots:
        seen[id(shot)].looks.append((scene.pair.writer.poll(shot.handle), scene.pair.writer.drained(shot.handle)))


def _look_on(stage: Stage, scenes: list[Scene], seen: dict[int, Fate]) -> None:
    """A few times more, and at what was sealed: now, and when late writes have had their time."""

    def look_at_seals() -> None:
        for scene in scenes:
            for shot in scene.shots:
                fate = seen[id(shot)]
                sealed = scene.readable and (shot.drained or shot.status is not Status.UNKNOWN)
                if sealed and not fate.landed:
                    if scene.flushes:  # what came late into a shadow shows then
                        scene.pair.flush(shot.region)
                    view = shot.region.memory.view()
                    fate.landed = difference(view, bytes([SEAL]) * len(view))

    look_at_seals()
    for _ in range(2):
        for scene in scenes:
            _look(scene, seen)
        time.sleep(0.05)
    stage.settle()
    for scene in scenes:
        _look(scene, seen)
    look_at_seals()


def ending(stage: Stage, call: Callable[[], int], pair: Pair, within: float = ENDS_WITHIN_S) -> FerryError | Status:
    """The error with which a post is refused, or the status that it ends with."""
    answer = stage.attempt(call, "post")
    return answer if isinstance(answer, FerryError) else pair.end(answer, within)
