"""Ranks, a layer above transfers: who decides that a room runs, and how every rank learns it. No collective (TP-1).

Each (room, rank) is a transfer of its own. The sender counts votes and tells the leader, rank 0, COMMIT or ABORT. The
leader's `Decisions` pass it on as verdicts: a follower asks with Query, again and again until it has heard, and is
answered as soon as there is an answer. A framework that broadcasts its schedule anyway uses `transfer.resolve`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tensorferry.core.arguments import integer, text
from tensorferry.core.errors import ConfigError
from tensorferry.core.ledger import Ranges
from tensorferry.core.messages import Query, Verdict

Snapshot = tuple[Any, ...]


@dataclass(frozen=True)
class Group:
    """This receiver's place among the tensor-parallel ranks of one language side.

    `leader` is the control address (tcp://host:port) that rank 0 binds and the others ask for verdicts; empty where
    the framework itself tells the ranks, through `transfer.resolve("run" | "drop")`.
    """

    rank: int
    ranks: int
    leader: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", integer(self.rank, "rank", kind=ConfigError))
        object.__setattr__(self, "ranks", integer(self.ranks, "ranks", kind=ConfigError))
        text(self.leader, "the leader's address", kind=ConfigError)
        if not 0 <= self.rank < self.ranks <= 4096:
            raise ConfigError(f"rank {self.rank} of {self.ranks}: ranks count from 0 and are at most 4096")

    @property
    def leads(self) -> bool:
        return self.rank == 0


SOLO = Group(0, 1)

MOST_OVER = 1 << 16
"""Ranges of one rank's transfers that are over: at most one more than it has live, which is far below this (MSG-5)."""


@dataclass
class Use:
    """One use of a room by the group, as its leader sees it. `bound`: rank -> (route, incarnation, xfer)."""

    room: int
    ranks: int
    bound: dict[int, tuple[str, int, int]] = field(default_factory=dict)
    verdict: tuple[bool, str, str] | None = None  # (run, code, cause), sticky
    heard: set[int] = field(default_factory=set)


class Decisions:
    """The leader's memory of what was decided, kept for each use until every follower has heard (TP-4)."""

    def __init__(self, incarnation: int, most: int) -> None:
        self.incarnation = incarnation
        self.most = most
        self.uses: dict[int, Use] = {}  # by the leader's own xfer, oldest first
        self.over: dict[int, tuple[int, Ranges]] = {}  # rank -> (incarnation, its transfers that are over)

    def open(self, xfer: int, room: int, ranks: int) -> None:
        self.uses[xfer] = Use(room, ranks)

    def decide(self, xfer: int, run: bool, code: str, cause: str) -> list[tuple[str, Verdict]]:
        """The first decision stands. Returns what to tell the followers that have asked already."""
        use = self.uses.get(xfer)
        if use is None or use.verdict is not None:
            return []
        use.verdict = (run, code, cause)
        decided = [key for key, other in self.uses.items() if other.verdict is not None]
        for key in decided[: max(0, len(decided) - self.most)]:  # a rank that never asks must not fill the memory
            del self.uses[key]
        return [(route, self._verdict(use, inc, asked)) for route, inc, asked in use.bound.values()]

    def query(self, route: str, query: Query) -> tuple[int | None, Verdict | None]:
        """(the leader's xfer that the query is about, the verdict if there is one)."""
        asker = (query.src, query.xfer)
        inc, over = self.over.get(query.rank, (0, Ranges()))
        if query.src < inc or (query.src == inc and query.xfer in over and not query.heard):
            return None, None  # late: it must not be taken for a question about the next use of its room
        if query.src == inc and query.heard and (over.pieces < MOST_OVER or query.xfer in over):
            over.add(query.xfer)
        for xfer, use in self.uses.items():
            if use.room != query.room and not query.heard:  # who has forgotten the transfer has forgotten its room
                continue
            bound = use.bound.get(query.rank)
            if bound is not None and bound[1:] != asker:
                continue  # this use has its transfer of that rank: the question is about another use of the room
            if bound is None and query.heard:
                continue
            use.bound[query.rank] = (route, *asker)
            if query.src > inc:  # a successor, and it has asked about a room that there is: not a stray frame
                self.over[query.rank] = (query.src, Ranges())
            if query.heard:
                use.heard.add(query.rank)
                if len(use.heard) == use.ranks - 1:
                    del self.uses[xfer]
                return xfer, None
            return xfer, self._verdict(use, *asker) if use.verdict is not None else None
        return None, None

    def unheard(self, xfer: int) -> list[tuple[str, Verdict]]:
        """The verdict of a use again, for those who have asked and not said that they have heard."""
        use = self.uses.get(xfer)
        if use is None or use.verdict is None:
            return []
        return [
            (route, self._verdict(use, inc, asked))
            for rank, (route, inc, asked) in use.bound.items() if rank not in use.heard
        ]  # fmt: skip

    def _verdict(self, use: Use, inc: int, xfer: int) -> Verdict:
        assert use.verdict is not None
        run, code, cause = use.verdict
        return Verdict(src=self.incarnation, dst=inc, xfer=xfer, run=run, code=code, cause=cause)

    def snapshot(self) -> Snapshot:
        return tuple(
            (xfer, use.room, use.ranks, tuple(sorted(use.bound.items())), use.verdict, tuple(sorted(use.heard)))
            for xfer, use in self.uses.items()
        ), tuple((rank, inc, over.ranges()) for rank, (inc, over) in sorted(self.over.items()))

    def restore(self, snapshot: Snapshot) -> None:
        uses, over = snapshot
        self.uses = {
            xfer: Use(room, ranks, dict(bound), verdict, set(heard))
            for xfer, room, ranks, bound, verdict, heard in uses
        }
        self.over = {rank: (inc, Ranges(ranges)) for rank, inc, ranges in over}
