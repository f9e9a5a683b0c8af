"""A post that is handed to an engine: what is still to be submitted of it, and how it ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from tensorferry.backends._process import ProcessWatch
from tensorferry.core.transport import Status


class Target(Protocol):
    """A peer, as the thread that posts to it knows it."""

    watch: ProcessWatch | None
    """Its process, where it is one of this host."""
    ready: bool
    """It may be submitted to."""

    @property
    def name(self) -> str:
        """What it is called in the log."""

    @property
    def jobs(self) -> deque[Any]:
        """Posts to it that are not submitted whole, in their order."""

    @property
    def under_way(self) -> Any:
        """What the engine has, sized."""

    def ended(self) -> bool:
        """Its process has ended, by its watch."""


T = TypeVar("T", bound=Target)
P = TypeVar("P")


@dataclass(eq=False, slots=True)
class Job(Generic[T, P]):
    """One post. `status` is written by the thread that posts, replaced whole, and read by any."""

    target: T
    parts: deque[P]
    """What is not submitted yet, a submit each."""
    keep: Sequence[object]
    """What has to live while the engine may read the sources."""
    queued_at: float
    status: Status = Status.PENDING
    cancelled: bool = False
    under_way: int = 0
    dropped: bool = False
    """Some of it was not submitted and will not be."""

    @property
    def quiet(self) -> bool:
        """The engine neither reads its source any more nor will."""
        return self.under_way == 0 and not self.parts

    @property
    def drained(self) -> bool:
        """Nothing of it can land any more: by the peer's word, or because the peer's process has ended.

        In the second case the engine may be trying still. What it then sends reaches nobody, so the source may be
        written to again; it stays mapped (`keep`) until the engine has done with it.
        """
        if self.status is Status.UNKNOWN:
            return self.target.ended()
        return self.status is not Status.PENDING


Segment = tuple[object, int, int, int, int]
"""(local memory, start of the remote region, source address, target address, bytes)"""
