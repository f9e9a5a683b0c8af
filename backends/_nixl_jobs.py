"""Posts as the nixl transport's threads know them: what is to be submitted to whom, and how it went."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tensorferry.backends import _engine_jobs, _engine_thread
from tensorferry.backends._engine_jobs import Segment
from tensorferry.backends._nixl_engine import Piece, Request, Route
from tensorferry.backends._nixl_sockets import Stalled
from tensorferry.backends._nixl_wire import Descriptor
from tensorferry.backends._process import ProcessWatch
from tensorferry.core.transport import Status

if TYPE_CHECKING:
    from tensorferry.backends._nixl_wireup import Wireup

Batch = tuple[Route, list[Piece]]
"""One request: the engine takes one kind of memory on either side of it."""

fate = threading.Lock()
"""Held by whoever looks at a status and then gives one: two threads may, when one of them does not come back from the
engine for long, and then does."""

MOST_PIECES = 256
"""In one request: scattered ones cost 2.3 us each, all within one call."""


@dataclass(eq=False, slots=True, weakref_slot=True)
class Target:
    """A peer's agent. The engine has one connection for it, however often it is disconnected and connected again, so
    there is one of these."""

    told: Descriptor
    """Its newest descriptor."""
    watch: ProcessWatch | None
    """Its process, where it is one of this host."""
    jobs: deque[Job] = field(default_factory=deque)
    under_way: list[Submit] = field(default_factory=list)
    learnt: int = -1
    """The revision of the descriptor whose metadata the engine has."""
    ready: bool = False
    """It has answered, and no request has failed since."""
    cut: bool = False
    """Its connections were ended; what was under way is waited for, and then it is forgotten."""
    stalled: Stalled | None = None
    """Those of its connections that are ended when nothing goes on on them."""
    looked_at: float = 0.0
    """When it was looked for them."""
    knock: Request | None = None
    """The byte on its doorstep, under way."""
    asked_at: float = 0.0
    moved_at: float = 0.0
    """When a request to it was last begun with nothing under way, or came to its end."""
    not_before: float = 0.0
    unwanted: bool = False
    """It was disconnected: forget it when nothing of it is left."""
    wireups: list[Wireup] | None = None
    """What the other threads do before it is forgotten; None: not asked yet."""
    place: int = -1
    """Which thread serves it."""
    at_once: bool = True
    """Every request was over when its post returned, as copies are."""

    @property
    def name(self) -> str:
        return self.told.agent

    def ended(self) -> bool:
        """Its process has ended."""
        return self.watch is not None and self.watch.ended()


@dataclass(eq=False, slots=True)
class Job(_engine_jobs.Job[Target, Batch]):
    """One post."""

    retried: bool = False
    """The engine knew no such memory at first; the peer's metadata was taken in anew for it."""
    taken: bool = False
    """The thread that serves its peer has it."""

    def take(self) -> bool:
        """By that thread. False: it was given up before, and nothing of it may begin."""
        with fate:
            self.taken = self.status is Status.PENDING
            return self.taken

    def give_up(self) -> bool:
        """By another thread, because that one does not come back: FAILED where it has not taken it, and never will; or
        UNKNOWN. False: it had an outcome before."""
        with fate:
            if self.status is not Status.PENDING:
                return False
            self.status = Status.UNKNOWN if self.taken else Status.FAILED
            return True


class Bell(_engine_thread.Bell):
    """The last status of a post stays, whoever else gives one at the same time."""

    def finish(self, job: _engine_jobs.Job[Any, Any], status: Status) -> None:
        with fate:
            job.status = status
        super().finish(job, status)


@dataclass(eq=False, slots=True)
class Submit:
    job: Job
    request: Request


def cut(segments: Sequence[Segment], most: int) -> deque[list[Piece]]:
    """Copies as requests of at most `most` bytes; what is adjacent on both sides is joined first: many small pieces
    cost the engine ten times what one long piece does.

    Nothing is joined across two registrations, however they lie: the engine looks for each piece in one of them.
    """
    pieces: list[Piece] = []
    before: Segment | None = None
    for segment in sorted(segments, key=lambda one: one[3]):
        local, region, source, target, nbytes = segment
        if before is not None and before[0] is local and before[1] == region:
            start, there, length = pieces[-1]
            if (start + length, there + length) == (source, target):
                pieces[-1] = (start, there, length + nbytes)
                before = segment
                continue
        pieces.append((source, target, nbytes))
        before = segment
    batches: deque[list[Piece]] = deque()
    room = 0
    for source, target, nbytes in pieces:
        done = 0
        while done < nbytes:
            if not room or len(batches[-1]) == MOST_PIECES:
                batches.append([])
                room = most
            length = min(nbytes - done, room)
            batches[-1].append((source + done, target + done, length))
            done += length
            room -= length
    return batches
