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
