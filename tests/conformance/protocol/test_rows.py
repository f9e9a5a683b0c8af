"""Real rows through real memory, whatever the transport does: they arrive bit for bit or not at all (WM-4, WS-7)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import conformance_dock
import pytest
import torch
from conformance_dock import Dock, assert_same, rows_of
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tensorferry.conformance.explore.mutants import FencesEarly, FreeOnBump
from tensorferry.conformance.fault_policy import Policy
from tensorferry.core.allocator import lowest_runs
from tensorferry.core.errors import InternalError

FAULTS = ("late", "reordered", "partial", "duplicated", "snapshot", "unknown", "failed", "refuse", "deaf")

WHERE = st.floats(0.0, 0.999)


@dataclass
class Room:
    rows: dict[str, torch.Tensor] | None = None
    content: int = 0
    xfer: int = 0
    cancelled: bool = False
    contents: list[dict[str, torch.Tensor]] = field(default_factory=list)


class RowsMachine(RuleBasedStateMachine):
    dock: Dock

    @initialize(
        pool=st.integers(1, 6), slabs=st.integers(1, 3), block_size=st.sampled_from([1, 4, 16]),
        window=st.sampled_from([1, 2, "rounds", "auto"]), first_grant=st.integers(0, 4), seed=st.integers(0, 999),
        rate=st.sampled_from([0.0, 0.3, 0.6]), last=st.booleans(),
    )  # fmt: skip
    def begin(self, pool: int, slabs: int, seed: int, rate: float, last: bool, **sizes: Any) -> None:
        choose = (lambda p, n: [b for start, stop in p for b in range(start, stop)][-n:]) if last else lowest_runs
        self.dock = Dock(
            pool=pool, slabs=min(slabs, pool), choose=choose, policy=Policy.seeded(seed, FAULTS, rate=rate), **sizes
        )
        self.rooms: dict[int, Room] = {room: Room() for room in range(3)}

    def _content(self, room: int, total: int, extra: bool) -> dict[str, torch.Tensor]:
        state = self.rooms[room]
        state.content += 1
        state.rows = rows_of(total, 100 * room + state.content, extra)
        state.contents.append(state.rows)
        return state.rows

    def _id(self, room: int) -> bytes:
        return bytes([room, self.rooms[room].content] * 8)

    # ---- applications -------------------------------------------------------------------------------------------

    @rule(room=st.integers(0, 2), total=st.integers(0, 70), extra=st.booleans(), part=WHERE)
    def offer(self, room: int, total: int, extra: bool, part: float) -> None:
        if self.rooms[room].rows is None:
            rows = self._content(room, total, extra)
            self.dock.sender.offer(room, rows, self._id(room), int(total * min(1.0, 2 * part)))

    @rule(room=st.integers(0, 2))
    def put_rest(self, room: int) -> None:
        rows = self.rooms[room].rows
        if rows is not None and room in self.dock.sender.rooms:
            self.dock.sender.put_rest(room, rows)

    @rule(room=st.integers(0, 2))
    def receive(self, room: int) -> None:
        if not self.rooms[room].xfer:
            xfer, effects = self.dock.machine.receive(room, "tcp://sender")
            self.rooms[room].xfer = xfer
            self.dock.do(effects)

    @rule(room=st.integers(0, 2))
    def cancel(self, room: int) -> None:
        state = self.rooms[room]
        if state.xfer and state.rows is not None and state.xfer not in self.dock.ended:
            state.cancelled = True
            self.dock.cancel(state.xfer)
            assert self.dock.ended[state.xfer] is not None

    # ---- the network and the transport --------------------------------------------------------------------------

    @precondition(lambda self: self.dock.mail)
    @rule(where=WHERE, keep=st.booleans())
    def deliver(self, where: float, keep: bool) -> None:
        self.dock.deliver(int(where * len(self.dock.mail)), keep=keep)

    @precondition(lambda self: self.dock.mail)
    @rule(count=st.integers(1, 12))
    def deliver_many(self, count: int) -> None:
        for _ in range(count):
            if self.dock.mail:
                self.dock.deliver(0)
            self.dock.progress()

    @precondition(lambda self: self.dock.mail)
    @rule(where=WHERE)
    def lose(self, where: float) -> None:
        del self.dock.mail[int(where * len(self.dock.mail))]

    @rule(turns=st.integers(1, 6))
    def progress(self, turns: int) -> None:
        for _ in range(turns):
            self.dock.progress()

    @rule()
    def resend(self) -> None:
        self.dock.resend()

    # ---- what goes wrong ----------------------------------------------------------------------------------------

    @rule(room=st.integers(0, 2))
    def suspect(self, room: int) -> None:
        self.dock.suspect(self.rooms[room].xfer)

    @rule()
    def overdue(self) -> None:
        self.dock.overdue()

    @precondition(lambda self: len(self.dock.dead) < 2)
    @rule(same=st.booleans(), total=st.integers(0, 70))
    def restart_sender(self, same: bool, total: int) -> None:
        ended, rooms = self.dock.sender.ended, self.dock.sender.rooms
        self.dock.restart_sender()
        for room, serial in rooms.items():
            if serial not in ended:
                rows = self.rooms[room].rows if same else self._content(room, total, extra=False)
                assert rows is not None
                self.dock.sender.offer(room, rows, self._id(room), len(rows["ids"]))

    @precondition(lambda self: self.dock.dead)
    @rule()
    def prove(self) -> None:
        self.dock.prove()

    # ---- what has to be true ------------------------------------------------------------------------------------

    @invariant()
    def whole(self) -> None:
        if hasattr(self, "dock"):
            self.dock.check()
            self._compare()

    def _compare(self) -> None:
        for state in self.rooms.values():
            result = self.dock.results.get(state.xfer)
            if result is not None:
                total = len(result["ids"])
                given = next(rows for rows in reversed(state.contents) if len(rows["ids"]) == total
                             and torch.equal(rows["ids"], result["ids"]))  # fmt: skip
                assert_same(result, given)

    def teardown(self) -> None:
        if not hasattr(self, "dock"):
            return
        dock = self.dock
        try:
            for room, state in self.rooms.items():
                self.receive(room)
                if state.rows is None:
                    self.offer(room, 5, False, 0.9)
                self.put_rest(room)
            dock.calm(lambda: all(state.xfer in dock.ended for state in self.rooms.values()))
            for state in self.rooms.values():
                assert (dock.ended[state.xfer] is None) or state.cancelled, dock.ended[state.xfer]
            self._compare()
            assert dock.machine.pool.free_count == dock.machine.pool.blocks
            assert not dock.sender.machine.writes
            assert not dock.sender.poster.sources
        finally:
            dock.close()


def test_rows_arrive_bit_for_bit_whatever_happens() -> None:
    run_state_machine_as_test(
        RowsMachine,
        settings=settings(
            max_examples=100, stateful_step_count=70, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
        ),
    )  # fmt: skip


def suspected(policy: Policy) -> Dock:
    """Writes are under way when the path is suspected; all that is said about it is heard before they land."""
    grants = []

    def elsewhere(pieces: list[tuple[int, int]], n: int) -> list[int]:
        """First from below, then from above: the blocks of the first grant are nobody's after a wrong release."""
        free = [block for start, stop in pieces for block in range(start, stop)]
        grants.append(n)
        return free[:n] if len(grants) == 1 else free[-n:]

    dock = Dock(pool=8, slabs=1, block_size=4, window=4, first_grant=0, choose=elsewhere, policy=policy)
    dock.sender.offer(1, rows_of(14, 1, extra=True), bytes(16), 14)
    xfer, effects = dock.machine.receive(1, "tcp://sender")
    dock.do(effects)

    def hear() -> None:
        while dock.mail:
            dock.deliver(0)

    hear()
    dock.progress()
    dock.suspect(xfer)
    hear()
    return dock


def run_on(dock: Dock) -> None:
    try:
        for _ in range(40):
            dock.progress()
            dock.check()
        dock.calm(lambda: bool(dock.ended))
        assert_same(dock.results[1], rows_of(14, 1, extra=True))
    finally:
        dock.close()


LATE = Policy.scripted({0: "late=5 pieces=3"})


def test_a_write_that_is_revoked_while_it_is_out_harms_nobody() -> None:
    run_on(suspected(LATE))


@pytest.mark.parametrize(("side", "mutant"), [("SenderMachine", FencesEarly), ("ReceiverMachine", FreeOnBump)])
def test_a_machine_that_frees_blocks_too_early_is_found_by_the_poison(
    monkeypatch: pytest.MonkeyPatch, side: str, mutant: type
) -> None:
    monkeypatch.setattr(conformance_dock, side, mutant)
    dock = suspected(LATE)
    with pytest.raises(InternalError, match="written to"):
        run_on(dock)
