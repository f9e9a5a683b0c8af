"""Posts as the mooncake transport's thread knows them: what is to be submitted to whom, and how it went."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from tensorferry.backends import _engine_jobs
from tensorferry.backends._engine_jobs import Segment
from tensorferry.backends._mooncake_contact import Contact
from tensorferry.backends._mooncake_trial import Trial
from tensorferry.backends._mooncake_wire import Descriptor, session_name
from tensorferry.backends._process import ProcessWatch

Piece = tuple[int, int, int]
"""(source address, target address, bytes)"""


@dataclass(eq=False, slots=True)
class Target:
    """A peer's engine."""

    told: Descriptor
    watch: ProcessWatch | None
    """Its process, where it is one of this host."""
    session: str = ""
    """The engine's name for it, once it has one."""
    jobs: deque[Job] = field(default_factory=deque)
    under_way: dict[int, Submit] = field(default_factory=dict)
    ready: bool = False
    """It may be submitted to: it has answered, its token has been read, and no submit has failed since."""
    opened: bool = False
    """The engine has its segment; no submit to it blocks."""
    contact: Contact | None = None
    trial: Trial | None = None
    """It has answered, and its token is being read."""
    not_before: float = 0.0
    """It is asked again only then; and a post waits for the answer from then on."""
    looked_at_all: float = 0.0
    _watching: threading.Lock = field(default_factory=threading.Lock)

    @property
    def name(self) -> str:
        return session_name(self.told.address, self.told.port)

    def ended(self) -> bool:
        """Its process has ended. From any thread: a watch is for one at a time."""
        if self.watch is None:
            return False
        with self._watching:
            return self.watch.ended()


@dataclass(eq=False, slots=True)
class Job(_engine_jobs.Job[Target, Piece]):
    """One post."""

    begun: bool = False
    """The engine may have some of it."""


@dataclass(slots=True)
class Submit:
    job: Job
    nbytes: int
    since: float


def cut(segments: Sequence[Segment], most: int) -> deque[Piece]:
    """Copies as pieces of at most `most` bytes; what is adjacent on both sides is joined first.

    Nothing is joined across two registrations, however they lie: a submit has to lie in one on each side.
    """
    pieces: deque[Piece] = deque()
    ordered = sorted(segments, key=lambda segment: segment[3])
    at = 0
    while at < len(ordered):
        local, region, source, target, nbytes = ordered[at]
        at += 1
        while at < len(ordered):
            after = ordered[at]
            if after[0] is not local or after[1] != region or after[2:4] != (source + nbytes, target + nbytes):
                break
            nbytes += after[4]
            at += 1
        pieces.extend((source + n, target + n, min(most, nbytes - n)) for n in range(0, nbytes, most))
    return pieces
