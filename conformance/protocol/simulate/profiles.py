"""What a simulated world may do to the machines, and how large it is. Times are in simulated seconds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random
from typing import Literal

from tensorferry.conformance.explore.setup import Setup
from tensorferry.core.allocator import BlockPool
from tensorferry.core.receiver import ReceiverMachine
from tensorferry.core.sender import SenderMachine

Choice = Literal["lowest", "random", "hot"]


@dataclass(frozen=True)
class Shape:
    """The sizes of one world. `ranks` above 1: the receivers are one group; else each has rooms of its own."""

    receivers: int = 1
    ranks: int = 1
    senders: int = 1
    rooms: int = 1
    least_blocks: int = 0
    most_blocks: int = 6
    block_size: int = 1
    pool: int = 2
    slabs: int = 1
    window: int | Literal["rounds", "auto"] = 2
    first_grant: int = 0  # blocks of a loan; 0: announced mode
    budget: int = 9  # destinations at once
    dummies: tuple[int, ...] = ()
    choice: Choice = "lowest"  # which free blocks are granted; hot: the ones that were freed last
    pause: bool = False  # granting waits a moment after a bump
    trickle: bool = False  # rows become readable little by little
    one_by_one: bool = False  # room 0 is offered only after the others have ended


@dataclass(frozen=True)
class Profile:
    """Chances are per message, per block or per write; numbers of crashes and the like are the most in one run."""

    name: str
    about: str
    # the network
    loss: float = 0.0
    double: float = 0.0
    ghost: float = 0.0  # an old message comes again
    damage: float = 0.0  # a flipped bit: the checksum has to notice
    slow: float = 0.0  # a message takes up to `slowest`
    slowest: float = 3.0
    blackhole: tuple[float, float] | None = None  # seconds on, seconds off
    partitions: int = 0
    longest_partition: float = 2.0  # below peer_timeout nobody is believed lost
    # the transport
    failed: float = 0.0
    unknown: float = 0.0
    torn: float = 0.0
    retry: float = 0.0  # the library posts a write twice
    invisible: float = 0.0  # placed, and visible only after a while or a flush
    late: float = 0.0  # a write takes up to `latest`
    latest: float = 2.0
    slow_gather: float = 0.3
    # processes
    sender_crashes: int = 0
    receiver_crashes: int = 0
    proof: float = 0.7  # a crash is proved (F4); else slabs are replaced (F3)
    suspicious: bool = True  # drivers act on silence and on overdue fences; else only on proofs
    same: float = 0.5  # a restarted sender offers the same content
    # applications
    cancels: int = 0
    sender_cancels: int = 0
    suspicions: int = 0
    overdue: int = 0
    exposes: int = 0
    reuse: float = 0.0
    spread: float = 0.6  # seconds over which rooms are offered and wanted
    storm: tuple[float, float] = (0.3, 3.0)  # how long faults go on
    # sizes
    groups: float = 0.15  # the receivers are ranks of one group
    most_rooms: int = 3
    most_pool: int = 6
    shape: Shape | None = None  # instead of drawing one


@dataclass(frozen=True)
class Mutation:
    """What is broken in a world. Production is `SOUND`."""

    world: frozenset[str] = frozenset()
    receiver_class: type[ReceiverMachine] = ReceiverMachine
    sender_class: type[SenderMachine] = SenderMachine
    pool_class: type[BlockPool] = BlockPool
    policy: dict[str, object] = field(default_factory=dict, compare=False)


SOUND = Mutation()

_CHAOS = Profile(
    "chaos", "everything at once", loss=0.08, double=0.08, ghost=0.1, damage=0.01, slow=0.1, partitions=1,
    longest_partition=6.0, failed=0.03, unknown=0.03, torn=0.03, retry=0.15, invisible=0.2, late=0.1, sender_crashes=2,
    receiver_crashes=1, cancels=1, sender_cancels=1, suspicions=2, overdue=1, exposes=1, reuse=0.2, groups=0.25,
)  # fmt: skip

PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile("calm", "no fault at all", storm=(0.0, 0.0), slow_gather=0.0),
        Profile("quic2", "2 % loss, repetition, reordering", loss=0.02, double=0.02, slow=0.05),
        Profile("quic30", "30 % loss", loss=0.3, double=0.1, slow=0.1, storm=(1.0, 6.0)),
        Profile("blackhole", "5 s of network, 2 s of none", loss=0.01, blackhole=(5.0, 2.0), slow=0.05,
                spread=9.0, storm=(8.0, 14.0)),
        Profile("ghosts", "whatever was ever said comes again", loss=0.05, double=0.2, ghost=0.4, slow=0.2,
                suspicions=2, cancels=1, reuse=0.3),
        Profile("transport", "late, double, torn, failed and unknown writes", loss=0.01, failed=0.06, unknown=0.06,
                torn=0.06, retry=0.3, invisible=0.4, late=0.3, suspicions=2, overdue=1, cancels=1),
        Profile("crashes", "either side dies and comes back", loss=0.03, double=0.05, ghost=0.05, slow=0.1, late=0.3,
                sender_crashes=2, receiver_crashes=2, suspicions=1),
        Profile("zombies", "senders that stay silent, die unproved, and still write", loss=0.02, slow=0.05, late=0.5,
                latest=6.0, sender_crashes=1, partitions=2, longest_partition=9.0, proof=0.2, unknown=0.05,
                storm=(2.0, 8.0)),
        Profile("proofs", "no timer frees anything: every crash is proved, once", loss=0.03, ghost=0.15, slow=0.2,
                late=0.2, sender_crashes=2, receiver_crashes=2, proof=1.0, suspicious=False, suspicions=1, cancels=1),
        Profile("successors", "rooms are wanted when their sender is dead and its successor has not spoken", loss=0.03,
                double=0.05, ghost=0.05, slow=0.1, late=0.3, sender_crashes=6, cancels=4, suspicions=1, proof=1.0,
                suspicious=False, spread=6.0, storm=(3.0, 7.0), groups=0.0),
        Profile("heirs", "receivers die with their first words still on their way", ghost=0.3, slow=0.6, slowest=2.0,
                late=0.3, receiver_crashes=3, proof=1.0, suspicious=False, spread=0.2, storm=(0.5, 2.0), groups=0.0),
        Profile("cancels", "both sides change their minds, rooms are used again", loss=0.05, double=0.05, ghost=0.1,
                slow=0.1, cancels=2, sender_cancels=2, reuse=0.6, exposes=1, late=0.1),
        Profile("tiny", "many rooms through one or two blocks", loss=0.02, slow=0.05, most_rooms=5, most_pool=2,
                suspicions=2, cancels=1, torn=0.02, groups=0.0),
        Profile("groups", "ranks that decide together", loss=0.08, double=0.08, ghost=0.08, slow=0.1, groups=1.0,
                cancels=1, sender_cancels=1, suspicions=1, reuse=0.3, late=0.1),
        Profile("rank-crashes", "ranks and senders of groups die and come back", loss=0.05, double=0.05, slow=0.1,
                groups=1.0, sender_crashes=1, receiver_crashes=1, cancels=1, late=0.1),
        Profile("rank-partitions", "ranks that are cut off for long", loss=0.02, ghost=0.05, groups=1.0, partitions=3,
                longest_partition=8.0, suspicions=1, spread=2.0, storm=(3.0, 9.0)),
        Profile("deaf", "links that carry little, and one way only for long", loss=0.4, partitions=3,
                longest_partition=7.0, late=0.4, spread=2.0, storm=(3.0, 8.0), groups=0.05),
        _CHAOS,
    )
}  # fmt: skip


def draw(profile: Profile, rng: Random) -> Shape:
    """A shape for one seed: small, and often too small."""
    if profile.shape is not None:
        return profile.shape
    group = rng.random() < profile.groups
    receivers = rng.choice((2, 2, 3)) if group else rng.choice((1, 1, 1, 2))
    pool = rng.randint(1, profile.most_pool)
    rooms = rng.randint(1, 2 if group else profile.most_rooms)
    dummies = tuple(rank for rank in range(receivers) if group and rng.random() < 0.2)
    return Shape(
        receivers=receivers, ranks=receivers if group else 1, senders=rng.choice((1, 1, 2)), rooms=rooms,
        least_blocks=0, most_blocks=rng.choice((2, 4, 9)), block_size=rng.choice((1, 1, 2, 5)), pool=pool,
        slabs=rng.randint(1, min(pool, 3)), window=rng.choice((1, 2, 3, "rounds", "auto")),
        first_grant=rng.choice((0, 1, 2, pool)), budget=rng.choice((1, 1, 2, 9)),
        dummies=dummies if len(dummies) < receivers else dummies[1:], choice=rng.choice(("lowest", "random", "hot")),
        pause=rng.random() < 0.5, trickle=rng.random() < 0.3, one_by_one=rooms > 1 and rng.random() < 0.2,
    )  # fmt: skip


def shaped_like(setup: Setup, profile: Profile) -> Profile:
    """`profile` in the sizes of a configuration of the exhaustive search."""
    shape = Shape(
        receivers=setup.ranks, ranks=setup.ranks, senders=setup.senders, rooms=setup.rooms, least_blocks=setup.blocks,
        most_blocks=setup.blocks, pool=setup.pool, slabs=setup.slabs, window=setup.window,
        first_grant=setup.first_grant, budget=setup.budget, dummies=setup.dummies, trickle=setup.trickle,
        one_by_one=setup.one_by_one,
    )  # fmt: skip
    return replace(profile, shape=shape)


def mutation(setup: Setup) -> Mutation:
    """What is broken in a configuration of the exhaustive search."""
    return Mutation(setup.mutant, setup.receiver_class, setup.sender_class, setup.pool_class, setup.policy)
