"""Which transport carries to a peer: both sides' candidates in, a ranked list with reasons out. Pure, and the same on
both sides, so that either can explain what the other does.

A transport is a candidate where its side has it open. Of those that both have, the faster way comes first: RDMA, then
memory that both map, then a network stack. The rest of the list is the fallback, in order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tensorferry.core.transport import CONTRACT_VERSION

PATHS = ("rdma", "memcpy", "tcp")
"""What carries the bytes, best first; anything else follows."""

PREFERENCE: dict[str, tuple[str, ...]] = {
    "rdma": ("mooncake", "nixl"),
    "memcpy": ("shm", "nixl"),
    # Plain sockets move 5.2 GB/s over loopback where Mooncake moves 3.4 and NIXL 3.0 (128 MiB, two cores), and they
    # let nobody write who was not given the token.
    "tcp": ("tcp", "mooncake", "nixl"),
}
"""Among transports of one path: these in this order, then others by name."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A transport that one side has open."""

    name: str
    path: str
    contract: int = CONTRACT_VERSION


@dataclass(frozen=True, slots=True)
class Verdict:
    """One transport of either side, with the reason for its place. Only what is `viable` can carry."""

    name: str
    path: str
    viable: bool
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.viable else f"not {self.name} ({self.reason})"


def preference(name: str, path: str) -> tuple[int, int, str]:
    """Sort key: the smaller, the better."""
    within = PREFERENCE.get(path, ())
    place = within.index(name) if name in within else len(within)
    return (PATHS.index(path) if path in PATHS else len(PATHS), place, name)


def rank(ours: Iterable[Candidate], theirs: Iterable[Candidate], require: str = "") -> list[Verdict]:
    """Every transport of either side: those that both can use first, best first, then the others with what is wrong.

    The path is what both sides say it is: where they differ, the lesser of the two. `require` names a path; whatever
    would take another is not viable.
    """
    here, there = {c.name: c for c in ours}, {c.name: c for c in theirs}
    usable: list[tuple[str, str]] = []
    refused: list[Verdict] = []
    for name in sorted(here.keys() | there.keys()):
        mine, other = here.get(name), there.get(name)
        if mine is None or other is None:
            only = mine or other
            assert only is not None
            why = "the peer does not offer it" if mine else "only the peer has it"
            refused.append(Verdict(name, only.path, False, why))
            continue
        path = max(mine.path, other.path, key=lambda p: (preference(name, p), p))
        if other.contract != mine.contract:
            why = f"the peer's is written for transport contract {other.contract}, ours for {mine.contract}"
            refused.append(Verdict(name, path, False, why))
        elif require and path != require:
            which = "the peer's" if mine.path == require else "its" if other.path == require else "either side's"
            refused.append(Verdict(name, path, False, f"{require} is required, and {which} path is {path}"))
        else:
            usable.append((name, path))
    usable.sort(key=lambda pair: preference(*pair))
    ranked = [
        Verdict(name, path, True, f"follows {usable[k - 1][0]}: over {path}" if k else f"first choice: over {path}")
        for k, (name, path) in enumerate(usable)
    ]
    return ranked + refused
