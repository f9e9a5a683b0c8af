"""Which post goes wrong, and how: decided by number and seed, written down in a log, replayed from it.

A decision depends on the policy and on the number of the post (or connect) alone: never on the clock, on threads or on
what is in the post. The same seed therefore gives the same decisions on any machine, and a log of them, one line for
each decision that is not "as it is", gives them again without the seed:

    faults seed=7 clock=polls
    post 0 late=3
    post 4 pieces=3 shuffle=81 fails=1
    connect 1 refuse
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Literal, Self, cast

Clock = Literal["polls", "steps"]

TRUTHFUL = frozenset(
    {"late", "reordered", "partial", "duplicated", "snapshot", "unknown", "failed", "deaf", "refuse", "connect", "lose"}
)
"""Faults after which every answer is still true, and every declared capability too. A user of transports survives
them all."""

CAPABLE = frozenset({"held", "unseen"})
"""True as well, of a transport that declares less: `held` takes Fence.DRAIN away, `unseen` adds `needs_flush`."""

LIES = frozenset({"early", "ghost", "torn", "again", "buried", "drained", "broken", "mute"})
"""Answers that are not true: what no transport may do, and what its user cannot be blamed for."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one post. Everything off: it goes to the inner transport as it is.

    A post that is not as it is lands in pieces, one a beat (a poll of its handle, or a `step` of the proxy).
    """

    late: int = 0
    """Beats until the first piece lands."""
    pieces: int = 1
    """How many pieces the post's bytes are cut into, as evenly as they can be."""
    shuffle: int = 0
    """Seed of the order in which the pieces land; 0: from first to last."""
    twice: bool = False
    """Every piece lands a second time before the end is told."""
    snapshot: bool = False
    """The bytes are those of the time of the post. Off: those that the source has when the piece lands."""
    unknown: bool = False
    """UNKNOWN, from the beginning and for good. It is drained at its end."""
    fails: int = -1
    """The first so many pieces land, and then the post is FAILED; -1: all land. At least one byte never does."""
    held: bool = False
    """Nothing lands until `let_go`, which lands it, or `drop`, after which it never will."""
    unseen: bool = False
    """DONE, and the bytes are visible from the owner's `flush` on."""
    deaf: bool = False
    """`cancel` changes nothing."""
    refuse: bool = False
    """`post` raises TransportError, `connect` PeerUnreachable. No byte moves."""
    lose: bool = False
    """The peer is gone from this post on: nothing lands any more, neither here nor there."""

    early: bool = False
    """A lie: DONE at once; the bytes come later."""
    ghost: bool = False
    """A lie: FAILED at once; the bytes come later."""
    torn: bool = False
    """A lie: DONE without the second half of every copy."""
    again: bool = False
    """A lie: what has been DONE lands once more, as it was, after `late` further beats."""
    buried: bool = False
    """A lie: the peer is said to be GONE from this post on, and the bytes go on landing."""
    drained: bool = False
    """A lie: UNKNOWN, and said to be drained; the bytes come later."""
    broken: bool = False
    """A lie: `post` raises what is no FerryError."""
    mute: bool = False
    """A lie: `poll` raises what is no FerryError, until `let_go`."""

    @property
    def plain(self) -> bool:
        return self == AS_IT_IS

    @property
    def lies(self) -> bool:
        return any(getattr(self, name) for name in LIES)

    def __str__(self) -> str:
        told = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value is True:
                told.append(field.name)
            elif value is not False and value != field.default:
                told.append(f"{field.name}={value}")
        return " ".join(told) or "ok"

    @classmethod
    def parse(cls, text: str) -> Self:
        """What `str` wrote. Raises ValueError for anything else."""
        return cast(Self, _parse(text))


@lru_cache(maxsize=1024)
def _parse(text: str) -> Decision:
    told: dict[str, int | bool] = {}
    known = {field.name: field.default for field in fields(Decision)}
    for word in text.split():
        name, equals, value = word.partition("=")
        if word == "ok":
            continue
        if name not in known or isinstance(known[name], bool) == bool(equals):
            raise ValueError(f"{word!r} is no part of a decision; there are {', '.join(known)}")
        told[name] = int(value) if equals else True
    return Decision(**told)  # type: ignore[arg-type]  # ints where ints stand, True elsewhere: checked above


AS_IT_IS = Decision()

Decide = Callable[[str, int], Decision]
"""(verb, number from 0) -> decision. A pure function."""


@dataclass(frozen=True)
class Policy:
    """Says what becomes of each post and connect. Immutable: one policy serves any number of proxies, each of which
    counts its own posts and keeps its own log.

    `clock`: what a beat is. `holds`, `hides`: the policy may hold a write for ever (then Fence.DRAIN is not declared),
    or hides all of them until `flush` (then `needs_flush` is).
    """

    decide: Decide
    title: str = ""
    clock: Clock = "polls"
    holds: bool = False
    hides: bool = False

    @classmethod
    def empty(cls) -> Policy:
        return cls(lambda verb, number: AS_IT_IS)

    @classmethod
    def seeded(
        cls, seed: int, faults: Iterable[str] = TRUTHFUL, *, rate: float = 0.5, clock: Clock = "polls"
    ) -> Policy:
        """`rate`: how many of the posts something becomes of, from 0 to 1."""
        chosen = sorted(faults)
        if unknown := set(chosen) - TRUTHFUL - CAPABLE - LIES:
            raise ValueError(f"no such fault: {', '.join(sorted(unknown))}")
        return cls(
            lambda verb, number: _drawn(seed, chosen, rate, verb, number),
            title=f"seed={seed}",
            clock=clock,
            holds="held" in chosen,
            hides="unseen" in chosen,
        )

    @classmethod
    def scripted(
        cls,
        posts: str | Mapping[int, str] | Callable[[int], str] = "ok",
        connects: str | Mapping[int, str] | Callable[[int], str] = "ok",
        *,
        clock: Clock = "polls",
        holds: bool = False,
        hides: bool = False,
    ) -> Policy:
        """By hand: one decision for all, by number (others: as it is), or a function of the number."""
        scripts = {"post": posts, "connect": connects}

        def decide(verb: str, number: int) -> Decision:
            script = scripts[verb]
            if isinstance(script, Mapping):
                return Decision.parse(script.get(number, "ok"))
            return Decision.parse(script if isinstance(script, str) else script(number))

        return cls(decide, clock=clock, holds=holds, hides=hides)

    @classmethod
    def from_log(cls, log: str) -> Policy:
        """The decisions that a proxy's `log` shows; whatever it does not show is as it is. Raises ValueError."""
        first, *lines = log.strip().splitlines() or [""]
        opening, *marks = first.split()
        if opening != "faults":
            raise ValueError(f"a log begins with 'faults', not {first!r}")
        decisions: dict[tuple[str, int], Decision] = {}
        for line in lines:
            verb, number, told = line.split(" ", 2)
            decisions[verb, int(number)] = Decision.parse(told)
        clock = next((mark.removeprefix("clock=") for mark in marks if mark.startswith("clock=")), "polls")
        if clock not in ("polls", "steps"):
            raise ValueError(f"a beat is a poll or a step, not {clock!r}")
        return cls(
            lambda verb, number: decisions.get((verb, number), AS_IT_IS),
            title=" ".join(mark for mark in marks if mark.startswith("seed=")),
            clock=cast(Clock, clock),
            holds="holds" in marks,
            hides="hides" in marks,
        )

    @property
    def heading(self) -> str:
        marks = [self.title, f"clock={self.clock}", "holds" * self.holds, "hides" * self.hides]
        return " ".join(["faults", *filter(None, marks)])


class Log:
    """What one proxy decided, in the order of verb and number: the same text for the same decisions."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.counts = {"post": 0, "connect": 0}
        self.lines: list[str] = []

    def next(self, verb: str) -> Decision:
        number = self.counts[verb]
        self.counts[verb] += 1
        decision = self.policy.decide(verb, number)
        if not decision.plain:
            self.lines.append(f"{verb} {number} {decision}")
        return decision

    def __str__(self) -> str:
        return "\n".join([self.policy.heading, *self.lines]) + "\n"


def _drawn(seed: int, faults: list[str], rate: float, verb: str, number: int) -> Decision:
    dice = random.Random(f"{seed}/{verb}/{number}")  # by its text: the same on every platform and version
    if dice.random() >= rate:
        return AS_IT_IS
    if verb == "connect":
        return Decision(refuse="connect" in faults and dice.random() < 0.3)
    decision = AS_IT_IS
    choice = [fault for fault in faults if fault != "connect"]
    for fault in dice.sample(choice, min(len(choice), dice.randint(1, 3))):
        decision = _with(decision, fault, dice)
    if decision.refuse:
        return Decision(refuse=True)
    return Decision(lose=True) if decision.lose else decision


def _with(decision: Decision, fault: str, dice: random.Random) -> Decision:
    many = max(decision.pieces, dice.randint(2, 5))
    match fault:
        case "late":
            return replace(decision, late=dice.randint(1, 6))
        case "reordered":
            return replace(decision, pieces=many, shuffle=dice.randint(1, 999))
        case "partial":
            return replace(decision, pieces=many)
        case "duplicated":
            return replace(decision, twice=True)
        case "failed":
            return replace(decision, pieces=many, fails=dice.randint(0, many - 1))
        case "lose":  # once is for good: not at every turn
            return replace(decision, lose=dice.random() < 0.1)
        case "connect":
            return decision
        case _:
            return replace(decision, **{fault: True})
