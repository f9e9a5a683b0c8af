"""What the receiver knows of one transfer and of one peer, and what both sides call facts and status."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

from tensorferry.core.allocator import Tenant
from tensorferry.core.errors import FerryError, InternalError
from tensorferry.core.ledger import Ranges
from tensorferry.core.rounds import RoundLog


class Phase(IntEnum):
    """Where a receiver's transfer stands; receiver.py tells the story."""

    OPENING = 0
    QUEUED = 1
    ACTIVE = 2
    VOTED = 3
    CLOSING = 4


TRANSITIONS: dict[tuple[Phase, Phase], str] = {
    (Phase.OPENING, Phase.QUEUED): "announced; the destination budget is in use",
    (Phase.OPENING, Phase.ACTIVE): "announced; destination reserved",
    (Phase.OPENING, Phase.VOTED): "a follower gives up",
    (Phase.OPENING, Phase.CLOSING): "cancelled, refused, too late",
    (Phase.QUEUED, Phase.ACTIVE): "destination reserved",
    (Phase.QUEUED, Phase.OPENING): "sender restarted with other content",
    (Phase.QUEUED, Phase.VOTED): "a follower gives up",
    (Phase.QUEUED, Phase.CLOSING): "cancelled, aborted, too late",
    (Phase.ACTIVE, Phase.OPENING): "sender restarted with other content",
    (Phase.ACTIVE, Phase.VOTED): "several ranks: every row is here, or a follower gives up",
    (Phase.ACTIVE, Phase.CLOSING): "every row is here; or cancelled, aborted, too late",
    (Phase.VOTED, Phase.OPENING): "sender restarted with other content",
    (Phase.VOTED, Phase.VOTED): "a follower that had everything gives up",
    (Phase.VOTED, Phase.CLOSING): "COMMIT at the leader, RUN or DROP at a follower",
}
"""Every way from phase to phase, and why. `Transfer.enter` refuses any other; the docs' diagram is made from it."""


class Status(StrEnum):
    """What a caller sees. It only moves forward; the last two are final."""

    BOOTSTRAPPING = "BOOTSTRAPPING"
    WAITING_FOR_INPUT = "WAITING_FOR_INPUT"
    TRANSFERRING = "TRANSFERRING"
    SUCCESS = "SUCCESS"
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class Facts:
    """What Announce says once and for all (ID-5)."""

    total: int
    content_id: bytes
    present: int
    aux: bytes
    integrity: str


@dataclass(slots=True)
class Transfer:
    """One (room, rank). `out` and `gathering` are the blocks it holds; `have` is the durable truth."""

    xfer: int
    room: int
    route: str
    dummy: bool
    phase: Phase = Phase.OPENING
    sender: int = 0  # the sender's incarnation that Open went to; 0 while there is none
    announced: bool = False  # by that incarnation
    facts: Facts | None = None
    ready: int = 0  # tokens that the sender can read now
    epoch: int = 1
    have: Ranges = field(default_factory=Ranges)  # indices gathered and verified: only ever grows (WM-1)
    out: dict[int, int] = field(default_factory=dict)  # index -> block, granted in this epoch
    gathering: dict[int, tuple[int, Tenant, bool]] = field(default_factory=dict)  # index -> (block, , still wanted)
    lent: bool = False  # it has had its loan, of any size
    charge: int = 0  # budget units reserved
    last_grant: int = 0
    bumps: int = 0
    paused: bool = False
    exposed: bool = False  # rows were shown to the caller before the end
    error: FerryError | None = None
    plea: FerryError | None = None  # a follower that has promised its rows wants out; only the verdict ends it
    told: bool = False  # the caller knows the end
    closed: bool = False  # the sender has answered Close, or never will
    # not protocol state: derived, or for people to look at
    taken: Ranges = field(default_factory=Ranges)  # have + out + gathering
    high: int = 0  # indices below this one have been granted at least once
    beyond: bool = False  # a grant went beyond the first one (R6)
    touched: int = 0  # counts changes, so that a driver sees progress
    log: RoundLog = field(default_factory=RoundLog)

    @property
    def status(self) -> Status:
        if self.told:
            return Status.SUCCESS if self.error is None and self.plea is None else Status.FAILED
        if self.beyond:
            return Status.TRANSFERRING
        return Status.WAITING_FOR_INPUT if self.touched else Status.BOOTSTRAPPING

    def enter(self, phase: Phase) -> None:
        """The one way to change phase. Raises InternalError for a transition that is not in the table."""
        if (self.phase, phase) not in TRANSITIONS:
            raise InternalError(
                f"transfer {self.xfer} cannot go from {self.phase.name} to {phase.name}", room=self.room
            )
        self.phase = phase

    @property
    def holds(self) -> int:
        return len(self.out) + len(self.gathering)

    @property
    def live(self) -> bool:
        return self.phase is not Phase.CLOSING


@dataclass(slots=True)
class Peer:
    """A sender, by the address that the caller gave. `inc` 0: not introduced, or lost and to be introduced anew."""

    inc: int = 0
    ack: int = 0  # the revision of our Hello that it has seen
    revision: int = -1  # of its Hello
    usable: bool = False
    buried: dict[int, int] = field(default_factory=dict)  # incarnation -> blocks it may still write to, replaced
    floor: int = 0  # incarnations up to this one are gone or superseded: a late Hello of theirs is ignored
