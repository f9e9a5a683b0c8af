"""One post in the hands of a fault proxy: what of it lands, in which order, and what is told meanwhile."""

from __future__ import annotations

import itertools
import random
import weakref
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tensorferry.conformance.fault_policy import Decision
from tensorferry.core.memory import Memory
from tensorferry.core.transport import Copy, Region, RemoteRegion, Status

if TYPE_CHECKING:
    from tensorferry.conformance.faults import FaultProxy

Key = tuple[int, int]
"""(id, generation) of a region."""


@dataclass(eq=False)
class Met:
    """A peer that `connect` has returned. `owner`: the proxy at its end, where it has one in this process."""

    peer: Any
    owner: weakref.ref[FaultProxy] | None = None
    told: set[Key] = field(default_factory=set)
    lost: bool = False
    buried: bool = False


@dataclass(eq=False)
class Held:
    """A post in the proxy's hands. `waves` land one after the other; `inner` is the one that is landing."""

    number: int
    decision: Decision
    met: Met
    copies: list[Copy]
    waves: list[list[Copy]]
    outcome: Status
    beats: int
    targets: dict[RemoteRegion, Memory]
    held: bool
    staged: Region | None = None
    next: int = 0
    inner: int | None = None
    dropped: bool = False
    over: bool = False

    @property
    def status(self) -> Status:
        if self.decision.early or self.decision.ghost:
            return Status.DONE if self.decision.early else Status.FAILED
        if self.decision.unknown or self.decision.drained:
            return Status.UNKNOWN  # and it stays that: drained is all that is ever learnt of such a post
        return self.outcome if self.over else Status.PENDING

    @property
    def drained(self) -> bool:
        return self.over or self.decision.early or self.decision.ghost or self.decision.drained


def memory_of(copy: Copy) -> Memory:
    return copy.local.memory if isinstance(copy.local, Region) else copy.local


def pieces_of(copies: list[Copy], decision: Decision) -> list[list[Copy]]:
    """The copies' bytes in `decision.pieces` lists, in the order in which they land; none is empty."""
    total = sum(copy.nbytes for copy in copies)
    count = min(decision.pieces, total)
    cuts = [total * n // count for n in range(count + 1)] if count else []
    waves: list[list[Copy]] = []
    for first, last in itertools.pairwise(cuts):
        wave: list[Copy] = []
        at = 0
        for copy in copies:
            start, stop = max(first - at, 0), min(last - at, copy.nbytes)
            if start < stop:
                wave.append(
                    replace(
                        copy,
                        local_offset=copy.local_offset + start,
                        remote_offset=copy.remote_offset + start,
                        nbytes=stop - start,
                    )
                )
            at += copy.nbytes
        waves.append(wave)
    if decision.shuffle:
        random.Random(str(decision.shuffle)).shuffle(waves)
    if decision.fails >= 0:
        waves = waves[: min(decision.fails, len(waves) - 1)]
    return [wave for wave in waves for _ in range(1 + decision.twice)]
