"""What a world is made of: sizes, fault budgets and options of one configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from tensorferry.conformance.explore.machines import LEADER, Build
from tensorferry.core import messages as m
from tensorferry.core.allocator import BlockPool
from tensorferry.core.group import SOLO, Group
from tensorferry.core.policy import ReceiverPolicy
from tensorferry.core.receiver import ReceiverMachine
from tensorferry.core.sender import SenderMachine


class Faults(NamedTuple):
    """How often each fault may happen in one run."""

    cs: int = 0  # sender crash and restart
    cr: int = 0  # receiver crash and restart
    tr: int = 0  # the transport says UNKNOWN or FAILED
    co: int = 0  # a write lands corrupted
    ca: int = 0  # cancelled at the receiver
    sa: int = 0  # cancelled at the sender
    bu: int = 0  # bumped on suspicion
    ov: int = 0  # a fence is overdue: replace the slab
    rl: int = 0  # the sender believes that a live receiver is lost
    ps: int = 0  # the receiver believes that a live sender is lost
    re: int = 0  # the room is used again after its end


NONE = Faults()


@dataclass(frozen=True)
class Setup:
    """One configuration. `mutant` names what is broken in the world; mutated machines come as `make`."""

    name: str
    about: str = ""
    rooms: int = 1
    blocks: int = 2  # of each transfer
    pool: int = 2
    window: int | Literal["rounds"] = 2
    ranks: int = 1
    budget: int = 9  # destinations at once
    slabs: int = 1
    first_grant: int = 0  # of a loan; 0: announced mode
    faults: Faults = NONE
    split: bool = False  # completion and visibility are separate
    retry: bool = False  # the transport's library posts each write twice
    same: bool = False  # a restarted sender offers the same content
    late_offers: bool = False  # offering is a step of its own
    one_by_one: bool = False  # room 0 is offered only after the others have ended
    trickle: bool = False  # rows become readable one block at a time
    slow_gather: bool = False  # a gather's end is a step of its own
    proof: bool = True  # a crashed sender is proved gone (F4); else slabs are replaced (F3)
    dummies: tuple[int, ...] = ()  # ranks without data
    one_sender: bool = False
    collect: bool = True  # leave out messages that can never have an effect again
    big: bool = False
    limit: int = 6_000_000
    mutant: frozenset[str] = frozenset()
    receiver_class: type[ReceiverMachine] = ReceiverMachine
    sender_class: type[SenderMachine] = SenderMachine
    pool_class: type[BlockPool] = BlockPool
    policy: dict[str, object] = field(default_factory=dict, compare=False)

    @property
    def senders(self) -> int:
        return 1 if self.ranks > 1 or self.one_sender else self.rooms

    @property
    def doubtful(self) -> bool:
        """Some process may believe for good that another is lost: deadlines have to end what they had in common."""
        return bool(self.faults.cr or self.faults.rl or self.faults.ps)

    def serves(self, room: int) -> int:
        return 0 if self.senders == 1 else room

    def build(self) -> Build:
        policy = ReceiverPolicy(
            block_size=1, first_grant=self.first_grant or 1, optimistic=self.first_grant > 0, window=self.window,
            budget=self.budget, max_bumps=1 << 20, **self.policy,  # type: ignore[arg-type]
        )  # fmt: skip

        def receiver(rank: int, incarnation: int) -> ReceiverMachine:
            pool = self.pool_class(self.pool, -(-self.pool // self.slabs))
            group = SOLO if self.ranks == 1 else Group(rank, self.ranks, LEADER)
            return self.receiver_class(self._hello(incarnation, f"r{rank}", self.pool, self.slabs), pool, policy, group)

        def sender(number: int, incarnation: int) -> SenderMachine:
            return self.sender_class(self._hello(incarnation, f"s{number}", 0, 0))

        return Build(self.ranks, self.senders, receiver, sender)

    def _hello(self, incarnation: int, name: str, pool: int, slabs: int) -> m.Hello:
        return m.Hello(
            src=incarnation, dst=0, min_live=1, version=m.PROTOCOL_VERSION, name=name, layout=b"L" * 16, block_size=1,
            pool_blocks=pool, slabs=slabs, generations=m.pack_generations([1] * slabs),
            offers=(m.Offer("explored", 1, "", b"", b""),), revision=1, ack=0,
        )  # fmt: skip
