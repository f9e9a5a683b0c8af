"""Transports that do to the runner what only a bad one does: crash it, hang it, raise anywhere."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from typing import Any

from tensorferry.backends.memory import MemoryTransport
from tensorferry.core.transport import Copy, Probe, Readiness, Region


class Crashing(MemoryTransport):
    """A second retire takes the process along."""

    name = "crashing"
    contract_version = 1

    def retire(self, region: Region) -> None:
        if self._live.get(region.id) != region:
            signal.raise_signal(signal.SIGSEGV)  # in this thread, as a real one: what follows is not run
        super().retire(region)


class CrashingOverNothing(MemoryTransport):
    """A copy of no bytes takes the process along: no rule says MUST of it."""

    name = "crashing-over-nothing"
    contract_version = 1

    def post(self, peer: Any, copies: Sequence[Copy]) -> int:
        if copies and not copies[0].nbytes:
            signal.raise_signal(signal.SIGSEGV)  # in this thread, as a real one: what follows is not run
        return super().post(peer, copies)


class Exiting(MemoryTransport):
    """Ends the program where it should raise."""

    name = "exiting"
    contract_version = 1

    def post(self, peer: Any, copies: Sequence[Copy]) -> int:
        if not copies:
            raise SystemExit(0)
        return super().post(peer, copies)


class Hanging(MemoryTransport):
    """The answer to an empty post never comes."""

    name = "hanging"
    contract_version = 1

    def post(self, peer: Any, copies: Sequence[Copy]) -> int:
        while not copies:
            time.sleep(0.01)
        return super().post(peer, copies)


class Raising(MemoryTransport):
    """Has errors of its own."""

    name = "raising"
    contract_version = 1

    def post(self, peer: Any, copies: Sequence[Copy]) -> int:
        if not copies:
            raise ZeroDivisionError("no copies")
        return super().post(peer, copies)


class Dead(MemoryTransport):
    """Opens, and that is all."""

    name = "dead"
    contract_version = 1

    def post(self, peer: Any, copies: Sequence[Copy]) -> int:
        raise RuntimeError("not today")


class Absent(MemoryTransport):
    """Cannot work here."""

    name = "absent"
    contract_version = 1

    @classmethod
    def probe(cls) -> Probe:
        return Probe(Readiness.UNAVAILABLE, "no such card", "Buy one")


class Hooked:
    """Hooks with one method."""

    def peek(self, transport: Any, region: Region) -> bytes:
        return bytes(region.memory.view())
