"""The configurations that are explored."""

from __future__ import annotations

from tensorferry.conformance.explore.setup import Faults, Setup

P = [
    Setup("P1", "loss, repetition, reordering", blocks=3),
    Setup("P2", "stop and wait through one block", blocks=3, pool=1, window=1, faults=Faults(bu=2)),
    Setup("P3", "cancel and suspicion", faults=Faults(ca=1, bu=1)),
    Setup("P4", "UNKNOWN or FAILED, suspicion", faults=Faults(tr=1, bu=1)),
    Setup("P5", "corruption, suspicion", faults=Faults(co=1, bu=1)),
    Setup("P6", "sender crash, suspicion", faults=Faults(cs=1, bu=1)),
    Setup("P7", "receiver crash", faults=Faults(cr=1)),
    Setup("P8", "both crash", window=1, faults=Faults(cs=1, cr=1)),
    Setup("P9", "completion before visibility, suspicion", split=True, faults=Faults(bu=1)),
    Setup("P10", "the library posts twice, suspicion", retry=True, faults=Faults(bu=1)),
    Setup("P11", "two rooms, one block", rooms=2, pool=1, window=1),
    Setup("P12", "two rooms, two blocks", rooms=2),
    Setup("P13", "two rooms, one destination", rooms=2, blocks=1, window=1, budget=1, faults=Faults(bu=1)),
    Setup("P14", "two rooms, one block, cancel, suspicion", rooms=2, pool=1, window=1, faults=Faults(ca=1, bu=1)),
]

BIG = [
    Setup("P15", "cancel, crash, UNKNOWN", pool=3, faults=Faults(ca=1, cs=1, tr=1), big=True),
    Setup("P16", "two suspicions, window of three", blocks=4, pool=3, window=3, faults=Faults(bu=2), big=True),
    Setup("P17", "a long stream through a small window", blocks=8, pool=3, window=3, big=True),
    Setup("P18", "two rooms, crash, suspicion", rooms=2, faults=Faults(cs=1, bu=1), big=True),
    Setup("P19", "three rooms, two destinations", rooms=3, window=1, budget=2, big=True),
    Setup("P20", "visibility and double posts, suspicion, cancel", split=True, retry=True, faults=Faults(ca=1, bu=1),
          big=True),
    Setup("P21", "every fault once", window=1, faults=Faults(cs=1, cr=1, tr=1, co=1, ca=1, bu=1), big=True),
    Setup("P22", "crash, UNKNOWN, cancel, suspicion through one block", pool=1, window=1,
          faults=Faults(cs=1, tr=1, ca=1, bu=1), big=True),
    Setup("P23", "two rooms, cancel, UNKNOWN, crash", rooms=2, window=1, faults=Faults(ca=1, tr=1, cs=1), big=True),
    Setup("P24", "two rooms, one destination, suspicion", rooms=2, blocks=3, budget=1, faults=Faults(bu=1), big=True),
    Setup("P25", "both crash, cancel, suspicion", faults=Faults(cs=1, cr=1, ca=1, bu=1), big=True),
    Setup("R10", "two ranks, sender crash", blocks=1, pool=1, ranks=2, budget=1, faults=Faults(cs=1), big=True),
    Setup("R11", "two ranks, two rooms, cancel", rooms=2, blocks=1, pool=1, ranks=2, budget=1, faults=Faults(ca=1),
          big=True),
    Setup("R14", "two ranks, a sender believed lost", blocks=1, pool=1, ranks=2, budget=1, dummies=(0,), collect=False,
          faults=Faults(ps=1), big=True),
]  # fmt: skip

LOANS = [
    Setup("O1", "two rooms, one destination", rooms=2, window=1, first_grant=2, budget=1, late_offers=True),
    Setup("O2", "the first grant is the whole pool", rooms=2, first_grant=2, budget=2, late_offers=True),
    Setup("O3", "longer, one destination", rooms=2, blocks=3, window=1, first_grant=2, budget=1, late_offers=True),
    Setup("O4", "a loan larger than needed, cancel", blocks=1, pool=3, window=1, first_grant=3, faults=Faults(ca=1),
          late_offers=True),
    Setup("O5", "one destination, cancel", rooms=2, blocks=1, window=1, first_grant=2, budget=1, faults=Faults(ca=1),
          late_offers=True),
    Setup("O6", "one room announces only after the other", rooms=2, window=1, first_grant=2, budget=2,
          one_by_one=True),
    Setup("O7", "three rooms, one destination", rooms=3, blocks=1, window=1, first_grant=2, budget=1,
          late_offers=True),
    Setup("O8", "three rooms, two blocks each", rooms=3, window=1, first_grant=2, budget=2, late_offers=True),
    Setup("O9", "sender crash", rooms=2, blocks=1, window=1, first_grant=2, budget=1, faults=Faults(cs=1),
          late_offers=True),
    Setup("O10", "receiver crash", rooms=2, blocks=1, window=1, first_grant=2, budget=1, faults=Faults(cr=1),
          late_offers=True),
    Setup("O11", "rows become readable one by one", rooms=2, window=2, first_grant=2, budget=2, trickle=True,
          late_offers=True),
    Setup("O12", "rounds, crash, cancel", blocks=3, window="rounds", first_grant=1, faults=Faults(cs=1, ca=1),
          late_offers=True),
]  # fmt: skip

EXTRA = [
    Setup("X1", "gathers take their time, corruption, suspicion", slow_gather=True, faults=Faults(co=1, bu=1)),
    Setup("X2", "gathers take their time, sender crash", slow_gather=True, faults=Faults(cs=1, co=1)),
    Setup("X3", "a fence is overdue: slabs are replaced", slabs=2, faults=Faults(bu=1, ov=1)),
    Setup("X4", "a crashed sender is never proved gone: slabs are replaced", slabs=2, proof=False,
          faults=Faults(cs=1, bu=1)),
    Setup("X5", "the same content after a crash", same=True, faults=Faults(cs=1, co=1)),
    Setup("X6", "a live receiver is believed lost", late_offers=True, collect=False, faults=Faults(rl=1)),
    Setup("X7", "a live sender is believed lost", late_offers=True, collect=False, faults=Faults(ps=1)),
    Setup("X8", "cancelled on both sides", late_offers=True, faults=Faults(ca=1, sa=1)),
    Setup("X9", "a room is used again", blocks=1, pool=1, late_offers=True, faults=Faults(ca=1, sa=1, re=1)),
    Setup("X10", "two sender crashes", blocks=1, faults=Faults(cs=2)),
    Setup("X11", "two receiver crashes", blocks=1, faults=Faults(cr=2)),
    Setup("X12", "one sender serves two rooms", rooms=2, pool=1, window=1, one_sender=True, faults=Faults(cs=1)),
    Setup("X13", "one sender, two rooms, receiver crash", rooms=2, blocks=1, window=1, one_sender=True,
          faults=Faults(cr=1)),
    Setup("X14", "no rows at all, crash, cancel", blocks=0, late_offers=True, faults=Faults(cs=1, ca=1)),
    Setup("X15", "slow gathers, visibility, cancel, suspicion", split=True, slow_gather=True,
          faults=Faults(ca=1, bu=1)),
    Setup("X16", "slow gathers, replaced slabs, corruption", slabs=2, slow_gather=True,
          faults=Faults(co=1, bu=1, ov=1)),
    Setup("X17", "double posts, UNKNOWN or FAILED, suspicion", retry=True, faults=Faults(tr=1, bu=1)),
    Setup("X18", "no proof of a crash, both crash, suspicion", blocks=1, slabs=2, proof=False,
          faults=Faults(cs=1, cr=1, bu=1)),
    Setup("X19", "loans, replaced slabs, cancel, suspicion", slabs=2, first_grant=2, late_offers=True,
          faults=Faults(ca=1, bu=1, ov=1)),
    Setup("X20", "a room used again, both cancel, loans", blocks=1, pool=1, first_grant=1, late_offers=True,
          faults=Faults(ca=1, sa=1, re=1)),
    Setup("X21", "a sender believed lost, crash", blocks=1, collect=False, faults=Faults(cs=1, ps=1)),
    Setup("X22", "a receiver believed lost, crash", blocks=1, collect=False, faults=Faults(cr=1, rl=1)),
]  # fmt: skip

RANKS = [
    Setup("R1", "two ranks", blocks=1, pool=1, ranks=2, budget=1),
    Setup("R2", "two ranks, two rooms, one destination", rooms=2, blocks=1, pool=1, ranks=2, budget=1),
    Setup("R3", "two ranks, cancel", blocks=1, pool=1, ranks=2, budget=1, faults=Faults(ca=1)),
    Setup("R4", "two ranks, the sender cancels", blocks=1, pool=1, ranks=2, budget=1, faults=Faults(sa=1)),
    Setup("R5", "two ranks, a dummy leads, sender crash", blocks=1, pool=1, ranks=2, budget=1, dummies=(0,),
          faults=Faults(cs=1)),
    Setup("R6", "two ranks, a receiver crashes", blocks=1, pool=1, ranks=2, budget=1, faults=Faults(cr=1)),
    Setup("R7", "three ranks, one without data", blocks=1, pool=1, ranks=3, budget=1, dummies=(2,)),
    Setup("R8", "two ranks, a dummy leads, cancel", blocks=1, pool=1, ranks=2, budget=1, dummies=(0,),
          faults=Faults(ca=1)),
    Setup("R9", "two ranks, the room is used again", blocks=1, pool=1, ranks=2, budget=1, faults=Faults(re=1)),
    Setup("R12", "two ranks, loans, cancel before there is an offer", blocks=1, pool=1, ranks=2, budget=1,
          first_grant=1, late_offers=True, dummies=(0,), faults=Faults(ca=1)),
    Setup("R13", "two ranks, one believed lost", blocks=1, pool=1, ranks=2, budget=1, dummies=(0,), collect=False,
          faults=Faults(rl=1)),
]  # fmt: skip

REQUIRED = [*P, *LOANS, *RANKS, *EXTRA]
EVERY = [*REQUIRED, *BIG]


def by_name(name: str) -> Setup:
    return next(setup for setup in EVERY if setup.name == name)
