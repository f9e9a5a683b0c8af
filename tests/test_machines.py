"""The rules of protocol.md section 7 that concern one sender and one receiver, on the machines alone: no thread, no
clock, no memory. Rules about messages are in test_machines_messages.py, about ranks in test_machines_group.py."""

from __future__ import annotations

from typing import Any

import pytest
from ferry import SENDER, Ferry, facts, hello

from tensorferry.core import effects as fx
from tensorferry.core import errors as e
from tensorferry.core import messages as m
from tensorferry.core import sender
from tensorferry.core.policy import SenderPolicy
from tensorferry.core.receiver import ReceiverMachine
from tensorferry.core.sender import SenderMachine
from tensorferry.core.transfer import Phase, Status


def met(**options: Any) -> Ferry:
    """A ferry whose two sides know each other."""
    ferry = Ferry(**options)
    ferry.send(999, 0)
    ferry.receive(999)
    ferry.deliver()
    ferry.resend()
    ferry.assert_clean()
    ferry.ended.clear()
    ferry.sent.clear()
    ferry.released.clear()
    return ferry


def said(ferry: Ferry, kind: type) -> list[Any]:
    return [message for _, message in ferry.sent if isinstance(message, kind)]


def granted_indices(grants: list[m.Grant]) -> list[int]:
    return [first + k for g in grants for first, _, count, _ in m.unpack_grant(g.runs) for k in range(count)]


def finish(ferry: Ferry) -> None:
    """Everything is said again until nothing is left."""
    ferry.hold_writes = False
    ferry.deliver()
    for _ in range(4):
        ferry.resend()
    ferry.assert_clean()


def rows(ferry: Ferry, xfer: int, who: str = "rank0") -> dict[int, tuple[int, int]]:
    return ferry.rows.get((who, xfer), {})


def whole(serial: int, blocks: int) -> dict[int, tuple[int, int]]:
    return {index: (serial, index) for index in range(blocks)}


# ---------------------------------------------------------------- lengths, watermark (WM, GR-5, GR-6, AL-2)


@pytest.mark.parametrize("window", ["rounds", "auto", 1, 2])
@pytest.mark.parametrize("pool", [1, 2, 5])
@pytest.mark.parametrize("total", [0, 1, 3, 4, 5, 23, 24, 25])
@pytest.mark.parametrize("optimistic", [True, False])
def test_any_length_goes_through_any_pool(total: int, pool: int, window: Any, optimistic: bool) -> None:
    ferry = Ferry(pool=pool, block_size=4, window=window, first_grant=2, optimistic=optimistic)
    serial, xfer = ferry.send(1, total), ferry.receive(1)
    ferry.deliver()
    assert ferry.ended == {("rank0", xfer): None, ("sender", serial): None}
    assert rows(ferry, xfer) == whole(serial, -(-total // 4))
    finish(ferry)
    needed = -(-total // 4)
    for grant in said(ferry, m.Grant):
        if not optimistic:
            assert max(granted_indices([grant])) < needed  # GR-6: nothing at or beyond ceil(T / B)
    writes = [index for message in said(ferry, m.Done) for index, _ in m.unpack_done(message.runs, message.digests)]
    assert sorted(set(writes)) == list(range(needed))


@pytest.mark.parametrize(("total", "sent"), [(10, [4, 8, 10]), (12, [4, 8, 12]), (1, [1]), (4, [4])])
def test_sent_tokens_counts_whole_blocks_and_ends_at_the_length(total: int, sent: list[int]) -> None:
    """GR-5: tokens(i) = min(B, T - B i); the watermark moves by what was gathered and never beyond T."""
    ferry = Ferry(pool=4, block_size=4, window=1, optimistic=False)
    ferry.send(1, total)
    xfer = ferry.receive(1)
    t = ferry.receiver.transfers[xfer]
    seen = []
    while ferry.step():
        seen.append(ferry.receiver.sent_tokens(t))
    assert seen == sorted(seen)
    assert [n for k, n in enumerate(seen) if n and n not in seen[:k]] == sent
    assert t.log.watermarks == sent


def test_the_watermark_is_the_prefix_without_a_gap() -> None:
    ferry = Ferry(pool=4, window=4, optimistic=False)
    ferry.hold_writes = True
    ferry.send(1, 4)
    xfer = ferry.receive(1)
    ferry.deliver()
    t = ferry.receiver.transfers[xfer]
    writes = {index: (write, index, block) for write, index, block in ferry.writes}
    ferry.writes.clear()
    for index, prefix in ((2, 0), (0, 1), (3, 1), (1, 4)):
        ferry.land(*writes[index])
        ferry.deliver()
        assert ferry.receiver.sent_tokens(t) == prefix
    finish(ferry)


@pytest.mark.parametrize(("window", "most"), [(1, 1), (3, 3), ("auto", 16), (50, 20)])
def test_never_more_blocks_out_than_the_window(window: Any, most: int) -> None:
    ferry = Ferry(pool=20, window=window, optimistic=False)
    ferry.hold_writes = True
    ferry.send(1, 100)
    xfer = ferry.receive(1)
    held = []
    while ferry.queue or ferry.writes:
        while ferry.queue:
            ferry.step()
            if xfer in ferry.receiver.transfers:
                held.append(ferry.receiver.transfers[xfer].holds)
        if ferry.writes:
            ferry.land(*ferry.writes.popleft())
    assert max(held) == most
    finish(ferry)


@pytest.mark.parametrize(
    ("total", "first", "pool", "rounds"),
    [
        (500, 1024, 64, [500]),
        (1024, 1024, 64, [1024]),
        (2000, 1024, 64, [1024, 976]),
        (10_000, 1024, 8, [1024] * 9 + [784]),
        (12_000, 8192, 64, [8192, 3808]),
        (50_000, 8192, 64, [8192] * 6 + [848]),
        (50_000, 8192, 400, [8192, 16384, 25424]),
        (1000, 300, 64, [384, 616]),
    ],
)
def test_rounds_grow_as_the_requirements_say(total: int, first: int, pool: int, rounds: list[int]) -> None:
    ferry = Ferry(pool=pool, slabs=1, block_size=128, window="rounds", first_grant=-(-first // 128))
    xfer = ferry.receive(1)
    t = ferry.receiver.transfers[xfer]
    ferry.deliver()
    ferry.send(1, total)
    ferry.deliver()
    assert [r.tokens for r in t.log.finished(128, total)] == rounds
    assert t.log.watermarks == [sum(rounds[: k + 1]) for k in range(len(rounds))]
    finish(ferry)


def test_the_status_moves_forward_as_the_requirements_say() -> None:
    """R6: TRANSFERRING begins with a grant after the first; DONE and bumps change no status."""
    for total, expected in ((2, ["BOOTSTRAPPING", "WAITING_FOR_INPUT", "SUCCESS"]), (5, list(Status)[:4])):
        ferry = Ferry(pool=2, window="rounds", first_grant=2)
        serial = ferry.send(1, total)
        seen: dict[str, list[str]] = {"r": [], "s": []}
        xfer = ferry.receive(1)
        t, slot = ferry.receiver.transfers[xfer], next(iter(ferry.sender.slots.values()))
        seen["r"].append("BOOTSTRAPPING")
        while True:
            seen["r"].append(t.status)
            seen["s"].append(slot.offer.status)
            if not ferry.step():
                break
        for side in seen.values():
            assert [s for k, s in enumerate(side) if k == 0 or s != side[k - 1]] == expected
        assert ferry.ended["sender", serial] is None


# ---------------------------------------------------------------- identity and epochs (ID-4, ID-5, WS-1)


def test_a_bump_starts_an_epoch_and_nothing_of_the_old_one_counts() -> None:
    ferry = met(pool=4, window=2, optimistic=False)
    ferry.hold_writes = True
    serial, xfer = ferry.send(1, 2), ferry.receive(1)
    ferry.deliver()
    t = ferry.receiver.transfers[xfer]
    before = t.epoch
    late = list(ferry.writes)
    old = m.Done(src=1000, dst=10, xfer=xfer, epoch=t.epoch, runs=m.pack_done([(0, 2)]),
                 digests=m.pack_digests([0, 1]), path="")  # fmt: skip
    ferry.carry_out("rank0", ferry.receiver.suspect(xfer, e.TransportError("suspicion")))
    assert t.epoch == before + 1
    assert len(ferry.receiver.pool.quarantined) == 2
    assert ferry.receiver.on_message(SENDER, old) == []
    assert not t.have
    ferry.deliver()
    assert [write.write[2] for write, _, _ in ferry.writes] == [before] * 2 + [t.epoch] * 2
    blocks = {block for write, _, block in ferry.writes if write.write[2] == t.epoch}
    assert not blocks & {block for _, _, block in late}  # the old ones are in quarantine still
    finish(ferry)
    assert ferry.ended["rank0", xfer] is None
    assert rows(ferry, xfer) == whole(serial, 2)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"total": 4}, id="length"),
        pytest.param({"total": 2}, id="a shorter length"),
        pytest.param({"content_id": b"d" * 16}, id="content"),
        pytest.param({"present": 3}, id="components"),
        pytest.param({"aux": b"x" * 128}, id="aux"),
        pytest.param({"integrity": "off"}, id="integrity"),
    ],
)
def test_what_was_announced_cannot_change(change: dict[str, Any]) -> None:
    ferry = met(pool=4, window=2, optimistic=False)
    ferry.hold_writes = True
    ferry.send(1, 3)
    xfer = ferry.receive(1)
    ferry.deliver()
    announce = said(ferry, m.Announce)[-1]
    assert ferry.receiver.on_message(SENDER, announce) == []  # the same again
    import msgspec

    ferry.carry_out("rank0", ferry.receiver.on_message(SENDER, msgspec.structs.replace(announce, **change)))
    assert isinstance(ferry.ended["rank0", xfer], e.ProtocolViolation)
    finish(ferry)


def test_ready_only_grows() -> None:
    ferry = met(pool=4, window=4, optimistic=False)
    serial = ferry.send(1, 4, ready=2)
    xfer = ferry.receive(1)
    ferry.deliver()
    t = ferry.receiver.transfers[xfer]
    assert t.have.prefix == 2
    assert not t.out  # announced mode grants nothing that cannot be read (R3)
    ferry.carry_out("sender", ferry.sender.extend(serial, 1))
    ferry.carry_out("sender", ferry.sender.extend(serial, 3))
    first = said(ferry, m.Announce)[0]
    ferry.deliver()
    ferry.carry_out("rank0", ferry.receiver.on_message(SENDER, first))  # late: ready 2
    assert t.ready == 3
    assert t.have.prefix == 3
    ferry.carry_out("sender", ferry.sender.extend(serial, 4))
    finish(ferry)
    assert ferry.ended["rank0", xfer] is None


def test_a_grant_is_posted_once_in_its_epoch() -> None:
    """WS-1: at most one post per (epoch, index), however often the grant is said."""
    ferry = met(pool=4, window=4, optimistic=False)
    ferry.hold_writes = True
    ferry.send(1, 4)
    ferry.receive(1)
    ferry.deliver()
    for _ in range(3):
        ferry.resend()
        for grant in said(ferry, m.Grant):
            ferry.carry_out("sender", ferry.sender.on_message("rank0", grant))
    assert sorted(index for _, index, _ in ferry.writes) == [0, 1, 2, 3]
    finish(ferry)


@pytest.mark.parametrize(
    "runs",
    [
        pytest.param([(0, 6, 1, 1)], id="beyond the pool"),
        pytest.param([(0, 5, 2, 1)], id="out of the pool"),
        pytest.param([(0, 2, 2, 1)], id="across slabs"),
        pytest.param([(0, 0, 1, 1), (1, 4_000_000_000, 1, 1)], id="one of two"),
        pytest.param([(0, 0, 0, 1)], id="an empty run"),
        pytest.param([(0, 0, 1 << 20, 1)], id="very long"),
    ],
)
def test_a_grant_outside_the_pool_is_not_written(runs: list[tuple[int, int, int, int]]) -> None:
    ferry = met(pool=6, slabs=2, window=1, optimistic=False)
    ferry.hold_writes = True
    ferry.send(1, 4)
    xfer = ferry.receive(1)
    ferry.deliver()
    before = ferry.sender.snapshot()
    grant = m.Grant(src=10, dst=1000, min_live=1, xfer=xfer, epoch=1, prefix=0, runs=m.pack_grant(runs))
    assert ferry.sender.on_message("rank0", grant) == []
    assert ferry.sender.snapshot() == before
    assert ferry.sender.ignored["grant outside the pool"] + ferry.sender.ignored["malformed"] == 1
    finish(ferry)


def test_a_grant_of_another_generation_waits_for_the_hello_that_names_it() -> None:
    ferry = met(pool=2, window=2, optimistic=False)
    ferry.hold_writes = True
    ferry.send(1, 2)
    xfer = ferry.receive(1)
    ferry.drop = lambda to, message: isinstance(message, m.Grant)
    ferry.deliver()
    ferry.drop = lambda to, message: False
    grant = m.Grant(src=10, dst=1000, min_live=1, xfer=xfer, epoch=1, prefix=0, runs=m.pack_grant([(0, 0, 1, 2)]))
    ferry.carry_out("sender", ferry.sender.on_message("rank0", grant))
    assert not ferry.writes
    news = ferry.receiver.hello.__class__(
        **{**{f: getattr(ferry.receiver.hello, f) for f in ferry.receiver.hello.__struct_fields__},
           "revision": 2, "generations": m.pack_generations([2])}
    )  # fmt: skip
    ferry.carry_out("sender", ferry.sender.on_message("rank0", news))
    assert [(index, block) for _, index, block in ferry.writes] == [(0, 0)]


# ---------------------------------------------------------------- what a write's outcome does (WS-2 to WS-6)


def outstanding(ferry: Ferry) -> tuple[fx.PostWrite, list[int]]:
    write = ferry.writes[0][0]
    return write, [index for w, index, _ in ferry.writes if w is write]


def test_failed_writes_are_written_again_in_a_new_epoch() -> None:
    ferry = met(pool=4, window=2, optimistic=False)
    ferry.hold_writes = True
    serial, xfer = ferry.send(1, 2), ferry.receive(1)
    ferry.deliver()
    write, indices = outstanding(ferry)
    ferry.writes.clear()
    ferry.carry_out("sender", ferry.sender.write_failed(write.write, set(indices), e.TransportError("no")))
    finish(ferry)
    assert rows(ferry, xfer) == whole(serial, 2)
    assert ferry.ended == {("rank0", xfer): None, ("sender", serial): None}


def test_unknown_is_not_failure_nothing_is_freed_or_fenced_until_it_is_drained() -> None:
    """WS-3, WS-4: Fenced is computed from the write table; in that epoch nothing is posted again."""
    ferry = met(pool=2, window=2, optimistic=False)
    ferry.hold_writes = True
    serial, xfer = ferry.send(1, 2), ferry.receive(1)
    ferry.deliver()
    write, indices = outstanding(ferry)
    late = list(ferry.writes)
    ferry.writes.clear()
    ferry.carry_out("sender", ferry.sender.write_unknown(write.write, e.UnknownInFlight("a time-out")))
    for _ in range(3):
        ferry.deliver()
        ferry.resend()
    assert said(ferry, m.Revoke)
    assert not said(ferry, m.Fenced)
    assert len(ferry.receiver.pool.quarantined) == 2
    assert not ferry.writes  # the pool is in quarantine: no grant, no post
    for landing in late:  # they land after all: into blocks that are nobody's
        ferry.memory[landing[0].route, landing[2]] = (landing[0].serial, landing[1])
    ferry.carry_out("sender", ferry.sender.write_drained(write.write, set(indices)))
    assert said(ferry, m.Fenced)
    finish(ferry)
    assert rows(ferry, xfer) == whole(serial, 2)


def test_a_fence_waits_for_every_write_of_its_epochs_and_for_no_other() -> None:
    ferry = met(pool=4, window=1, optimistic=False)
    ferry.hold_writes = True
    ferry.send(1, 1)
    xfer = ferry.receive(1)
    ferry.deliver()
    for _ in range(2):  # three epochs, one write each
        ferry.carry_out("rank0", ferry.receiver.suspect(xfer, e.TransportError("suspicion")))
        ferry.deliver()
    assert [write.write[2] for write, _, _ in ferry.writes] == [1, 2, 3]
    assert not said(ferry, m.Fenced)
    one, two, three = ferry.writes
    ferry.writes.clear()
    ferry.carry_out("sender", ferry.sender.write_drained(two[0].write, {0}))
    assert not said(ferry, m.Fenced)  # of epochs up to 2: that of 1 is still out
    ferry.carry_out("sender", ferry.sender.write_drained(one[0].write, {0}))
    assert [fenced.upto for fenced in said(ferry, m.Fenced)] == [2]
    ferry.deliver()
    assert not ferry.receiver.pool.quarantined
    ferry.land(*three)
    finish(ferry)


def test_nothing_of_a_revoked_epoch_is_posted_afterwards() -> None:
    """WS-3: a grant that is overtaken by its revocation is refused."""
    ferry = met(pool=4, window=2, optimistic=False)
    ferry.send(1, 2)
    xfer = ferry.receive(1)
    held: list[m.Message] = []
    ferry.drop = lambda to, message: isinstance(message, m.Grant) and not held.append(message)
    ferry.deliver()
    ferry.carry_out("rank0", ferry.receiver.cancel(xfer, e.Cancelled("enough")))
    (revoke,) = said(ferry, m.Revoke)
    ferry.carry_out("sender", ferry.sender.on_message("rank0", revoke))
    assert said(ferry, m.Fenced)
    before = ferry.sender.snapshot()
    for grant in held:
        assert ferry.sender.on_message("rank0", grant) == []
    assert ferry.sender.snapshot() == before
    ferry.drop = lambda to, message: False
    finish(ferry)


def test_an_incarnation_fences_its_own_writes_alone() -> None:
    """WS-5: the successor of a sender cannot vouch for its predecessor."""
    ferry = met(pool=2, window=2, optimistic=False)
    ferry.hold_writes = True
    ferry.send(1, 2)
    xfer = ferry.receive(1)
    ferry.deliver()
    ferry.sender = SenderMachine(hello(2000, "sender"))
    ferry.writes.clear()
    ferry.resend()
    ferry.send(1, 2)
    ferry.resend()
    quarantined = dict(ferry.receiver.pool.quarantined)
    assert {t.sender for t in quarantined.values()} == {1000}
    for src in (2000, 3000):
        fenced = m.Fenced(src=src, dst=10, xfer=xfer, upto=(1 << 32) - 1)
        ferry.carry_out("rank0", ferry.receiver.on_message(SENDER, fenced))
    assert ferry.receiver.pool.quarantined == quarantined
    ferry.carry_out("rank0", ferry.receiver.peer_gone(1000))
    assert not ferry.receiver.pool.quarantined
    finish(ferry)
    assert ferry.ended["rank0", xfer] is None


def test_settling_what_is_not_outstanding_is_refused() -> None:
    ferry = met(pool=2, window=2, optimistic=False)
    ferry.hold_writes = True
    ferry.send(1, 2)
    ferry.receive(1)
    ferry.deliver()
    write, _ = outstanding(ferry)
    before = ferry.sender.snapshot()
    for key, indices in ((write.write, {0, 7}), ((9, 9, 9, 9), {0})):
        with pytest.raises(e.InternalError):
            ferry.sender.write_done(key, dict.fromkeys(indices, 0))
    assert ferry.sender.snapshot() == before
    finish(ferry)


def test_the_callers_rows_are_kept_while_a_write_may_read_them() -> None:
    """WM-6: Closed and ReleaseSource wait for the last outstanding write."""
    ferry = met(pool=2, window=2, optimistic=False)
    ferry.hold_writes = True
    serial, xfer = ferry.send(1, 2), ferry.receive(1)
    ferry.deliver()
    ferry.carry_out("rank0", ferry.receiver.cancel(xfer, e.Cancelled("enough")))
    ferry.deliver()
    assert isinstance(ferry.ended["sender", serial], e.Cancelled)  # told at once
    assert not ferry.released
    assert not said(ferry, m.Closed)
    assert ferry.receiver.transfers  # its blocks are in quarantine
    ferry.hold_writes = False
    ferry.deliver()
    assert ferry.released == [serial]
    finish(ferry)


# ---------------------------------------------------------------- corruption (INT-1, LV-3)


def spoil(ferry: Ferry, times: int) -> None:
    """The next `times` writes land wrongly."""
    land, left = ferry.land, [times]

    def bad(write: fx.PostWrite, index: int, block: int) -> None:
        if left[0]:
            left[0] -= 1
            ferry.memory[write.route, block] = (write.serial, -1)
            ferry.carry_out("sender", ferry.sender.write_done(write.write, {index: index}))
        else:
            land(write, index, block)

    ferry.land = bad  # type: ignore[method-assign]


def test_a_corrupt_block_is_sent_again_and_never_delivered() -> None:
    ferry = met(pool=4, window=2, optimistic=False)
    spoil(ferry, 3)
    serial, xfer = ferry.send(1, 5), ferry.receive(1)
    t = ferry.receiver.transfers[xfer]
    finish(ferry)
    assert rows(ferry, xfer) == whole(serial, 5)
    assert ferry.ended["rank0", xfer] is None
    assert 1 <= t.bumps <= 3  # two of the three may have been of one epoch
    assert t.status is Status.SUCCESS


@pytest.mark.parametrize("most", [0, 1, 4])
def test_corruption_without_end_is_an_error_after_max_bumps(most: int) -> None:
    ferry = met(pool=4, window=1, optimistic=False, max_bumps=most)
    spoil(ferry, 10**6)
    serial, xfer = ferry.send(1, 3), ferry.receive(1)
    t = ferry.receiver.transfers[xfer]
    finish(ferry)
    assert t.bumps == most + 1
    assert isinstance(ferry.ended["rank0", xfer], e.IntegrityError)
    assert isinstance(ferry.ended["sender", serial], e.IntegrityError)
    assert not rows(ferry, xfer)


def test_after_a_bump_granting_pauses_until_the_driver_says_so() -> None:
    ferry = met(pool=4, window=1, optimistic=False, pause_after_bump=True)
    spoil(ferry, 1)
    ferry.send(1, 3)
    xfer = ferry.receive(1)
    ferry.deliver()
    ferry.resend()
    t = ferry.receiver.transfers[xfer]
    assert t.paused
    assert not t.out
    ferry.carry_out("rank0", ferry.receiver.resume_grants(xfer))
    assert ferry.receiver.resume_grants(xfer) == []
    finish(ferry)
    assert ferry.ended["rank0", xfer] is None


# ---------------------------------------------------------------- loans (R2)


def test_l1_a_loan_is_what_is_free_at_most_the_first_grant_and_once() -> None:
    ferry = met(pool=5, first_grant=3)
    one, two, three = (ferry.receive(room) for room in (1, 2, 3))
    ferry.deliver()
    held = [len(ferry.receiver.transfers[x].out) for x in (one, two, three)]
    assert held == [3, 2, 0]
    assert all(ferry.receiver.transfers[x].lent for x in (one, two, three))
    ferry.carry_out("rank0", ferry.receiver.cancel(one, e.Cancelled("enough")))
    ferry.deliver()
    assert len(ferry.receiver.transfers[three].out) == 0  # never lent to again
    for room in (2, 3):
        ferry.send(room, 4)
    ferry.send(1, 1)
    finish(ferry)
    assert ferry.ended["rank0", two] is ferry.ended["rank0", three] is None


def test_l1_nobody_borrows_while_somebody_with_a_destination_waits() -> None:
    ferry = met(pool=2, first_grant=2, window=2)
    ferry.hold_writes = True
    ferry.send(1, 9)
    ferry.send(2, 9)
    first, second = ferry.receive(1), ferry.receive(2)
    ferry.deliver()
    assert len(ferry.receiver.transfers[first].out) == 2
    third = ferry.receive(3)
    ferry.deliver()
    assert second in ferry.receiver.line
    assert not ferry.receiver.transfers[third].out
    ferry.land(*ferry.writes.popleft())
    ferry.deliver()
    assert not ferry.receiver.transfers[third].out
    assert ferry.receiver.transfers[second].out
    ferry.send(3, 1)
    finish(ferry)


def test_l2_what_was_lent_beyond_the_length_is_free_at_once() -> None:
    ferry = met(pool=8, first_grant=8)
    ferry.hold_writes = True
    xfer = ferry.receive(1)
    ferry.deliver()
    assert ferry.receiver.pool.free_count == 0
    ferry.send(1, 3)
    ferry.deliver()
    t = ferry.receiver.transfers[xfer]
    assert sorted(t.out) == [0, 1, 2]
    assert ferry.receiver.pool.free_count == 5
    assert not ferry.receiver.pool.quarantined
    assert not said(ferry, m.Revoke)
    assert sorted(index for _, index, _ in ferry.writes) == [0, 1, 2]  # GR-6: nothing beyond
    finish(ferry)


def test_l2_a_loan_does_not_wait_for_a_destination() -> None:
    """AL-1: at its announcement a transfer that finds no budget gives the loan back and queues holding nothing."""
    ferry = met(pool=8, first_grant=4, budget=1)
    one, two = ferry.receive(1), ferry.receive(2)
    ferry.deliver()
    ferry.hold_writes = True
    ferry.send(1, 6)
    ferry.deliver()
    ferry.send(2, 6)
    ferry.deliver()
    t = ferry.receiver.transfers[two]
    assert t.phase is Phase.QUEUED
    assert t.holds == 0
    assert ferry.receiver.transfers[one].phase is Phase.ACTIVE
    finish(ferry)
    assert ferry.ended["rank0", one] is ferry.ended["rank0", two] is None


def test_l3_loans_come_back_youngest_first_when_somebody_starves() -> None:
    ferry = met(pool=4, first_grant=2)
    old, young = ferry.receive(1), ferry.receive(2)
    ferry.deliver()
    ferry.send(3, 2)
    third = ferry.receive(3)
    ferry.deliver()
    assert ferry.ended[("rank0", third)] is None
    assert ferry.receiver.transfers[old].out
    assert not ferry.receiver.transfers[young].out
    assert ferry.receiver.transfers[young].lent
    for room in (1, 2):
        ferry.send(room, 3)
    finish(ferry)


def test_l4_a_revocation_that_comes_before_the_open_leaves_a_tombstone() -> None:
    ferry = met(pool=2, first_grant=2)
    opens: list[m.Message] = []
    grants: list[m.Message] = []
    ferry.drop = lambda to, x: (
        (isinstance(x, m.Open) and not opens.append(x)) or (isinstance(x, m.Grant) and not grants.append(x))
    )
    ferry.send(1, 2)
    xfer = ferry.receive(1)
    ferry.send(2, 1)
    other = ferry.receive(2)  # 1 has the whole pool on loan
    ferry.deliver()
    ferry.drop = lambda to, x: isinstance(x, m.Open | m.Grant) and x.xfer == xfer
    ferry.resend()
    assert ferry.ended["rank0", other] is None  # the loan came back: the sender had not seen its transfer
    ferry.drop = lambda to, x: False
    ferry.hold_writes = True
    for message in (*opens, *grants):
        ferry.carry_out("sender", ferry.sender.on_message("rank0", message))
    assert all(write.write[2] > 1 for write, _, _ in ferry.writes)  # nothing of the revoked epoch is posted
    finish(ferry)
    assert ferry.ended["rank0", xfer] is None


def test_l5_what_arrived_on_a_loan_counts_from_the_announcement_on() -> None:
    """DONE may overtake ANNOUNCE: it is said again, and counted once the destination is there."""
    ferry = met(pool=4, first_grant=2)
    xfer = ferry.receive(1)
    ferry.deliver()
    held: list[m.Message] = []
    ferry.drop = lambda to, x: isinstance(x, m.Announce) and not held.append(x)
    serial = ferry.send(1, 2)
    ferry.deliver()
    t = ferry.receiver.transfers[xfer]
    assert said(ferry, m.Done)
    assert not t.have
    assert not rows(ferry, xfer)
    ferry.drop = lambda to, x: False
    finish(ferry)
    assert rows(ferry, xfer) == whole(serial, 2)


def test_a_loan_of_rows_that_cannot_be_read_yet_comes_back_too() -> None:
    """R3: grants beyond `ready` are loans."""
    ferry = met(pool=2, first_grant=2, window=2)
    serial = ferry.send(1, 4, ready=0)
    xfer = ferry.receive(1)
    ferry.deliver()
    assert ferry.receiver.transfers[xfer].out
    ferry.send(2, 2)
    other = ferry.receive(2)
    ferry.deliver()
    assert ferry.ended["rank0", other] is None
    ferry.carry_out("sender", ferry.sender.extend(serial, 4))
    finish(ferry)
    assert ferry.ended["rank0", xfer] is None


# ---------------------------------------------------------------- the pool and the budget (AL, R9)


def test_the_head_of_the_line_gets_the_next_block() -> None:
    """AL-3: with R rooms on a pool of one block, each is served once before any is served again."""
    ferry = met(pool=1, window=1, optimistic=False)
    for room in range(5):
        ferry.send(room, 3)
        ferry.receive(room)
    ferry.deliver()
    order = [(grant.xfer, index) for grant in said(ferry, m.Grant) for index in granted_indices([grant])]
    assert [xfer for xfer, _ in order[:5]] == sorted({xfer for xfer, _ in order})
    assert [xfer for xfer, _ in order] == [xfer for xfer, _ in order[:5]] * 3
    finish(ferry)


def test_a_free_pool_is_shared_by_those_who_wait() -> None:
    ferry = met(pool=8, window=8, optimistic=False)
    ferry.hold_writes = True
    for room in range(3):
        ferry.receive(room)
        ferry.send(room, 100)
    ferry.deliver()
    first, *_ = ferry.receiver.transfers.values()
    assert first.holds == 8  # alone, it took the pool
    for _ in range(8):
        ferry.land(*ferry.writes.popleft())
        ferry.deliver()
    assert all(t.holds >= 2 for t in ferry.receiver.transfers.values())
    finish(ferry)


@pytest.mark.parametrize("budget", [1, 2])
def test_a_destination_comes_before_any_block_and_in_order(budget: int) -> None:
    ferry = met(pool=8, window=2, optimistic=False, budget=budget)
    ferry.hold_writes = True
    xfers = [ferry.receive(room) for room in range(4)]
    for room in range(4):
        ferry.send(room, 2)
    ferry.deliver()
    served = []
    while ferry.writes or ferry.queue:
        active = [
            x for x in xfers if x in ferry.receiver.transfers and ferry.receiver.transfers[x].phase is Phase.ACTIVE
        ]
        assert len(active) <= budget
        assert ferry.receiver.budget_used <= budget
        served += [x for x in active if x not in served]
        assert all(not ferry.receiver.transfers[x].holds for x in ferry.receiver.queue)
        if ferry.queue:
            ferry.step()
        else:
            ferry.land(*ferry.writes.popleft())
    assert served == xfers
    finish(ferry)


def test_what_needs_more_than_the_whole_budget_is_too_large() -> None:
    ferry = met(pool=8, window=2, budget=3, cost=lambda total, present: total)
    serial, xfer = ferry.send(1, 4), ferry.receive(1)
    finish(ferry)
    assert isinstance(ferry.ended["rank0", xfer], e.TooLarge)
    assert isinstance(ferry.ended["sender", serial], e.TooLarge)
    serial, xfer = ferry.send(1, 3), ferry.receive(1)
    finish(ferry)
    assert ferry.ended["rank0", xfer] is ferry.ended["sender", serial] is None


def test_on_exhausted_fail_says_so_at_once_for_budget_and_pool() -> None:
    for options in ({"budget": 1}, {"pool": 2}):
        ferry = met(**{"pool": 8, "window": 2, "optimistic": False, "fail_when_exhausted": True, **options})
        ferry.hold_writes = True
        one, two = ferry.receive(1), ferry.receive(2)
        ferry.send(1, 4)
        ferry.deliver()
        ferry.send(2, 4)
        ferry.deliver()
        assert isinstance(ferry.ended["rank0", two], e.PoolTimeout)
        assert ("rank0", one) not in ferry.ended
        finish(ferry)
        assert ferry.ended["rank0", one] is None


def test_on_exhausted_wait_is_the_default_and_no_error() -> None:
    """AL-6: exhaustion is a wait; it frees nothing and fails nobody."""
    ferry = met(pool=1, window=1, optimistic=False)
    ferry.hold_writes = True
    for room in (1, 2):
        ferry.receive(room)
        ferry.send(room, 2)
    ferry.deliver()
    for _ in range(5):
        ferry.resend()
    assert not ferry.ended
    assert not ferry.receiver.pool.quarantined
    finish(ferry)


def test_a_fence_that_does_not_come_costs_a_slab_and_not_the_transfer() -> None:
    """R4: the slab is replaced; late bytes land in the old memory and are counted against their sender."""
    ferry = met(pool=4, slabs=2, window=2, optimistic=False, quarantine_quota=1)
    ferry.hold_writes = True
    serial, xfer = ferry.send(1, 2), ferry.receive(1)
    ferry.deliver()
    stuck = list(ferry.writes)
    ferry.writes.clear()
    ferry.carry_out("sender", ferry.sender.write_unknown(stuck[0][0].write, e.UnknownInFlight("time-out")))
    ferry.deliver()
    assert len(ferry.receiver.pool.quarantined) == 2
    ferry.carry_out("rank0", ferry.receiver.fence_overdue(1000))
    assert not ferry.receiver.pool.quarantined
    assert ferry.receiver.peers[SENDER].buried == {1000: 2}
    ferry.hold_writes = False
    ferry.deliver()
    ferry.resend()
    assert ferry.ended["rank0", xfer] is None
    assert rows(ferry, xfer) == whole(serial, 2)
    with pytest.raises(e.Overloaded, match="lost processes"):
        ferry.receiver.receive(5, SENDER)
    ferry.carry_out("sender", ferry.sender.write_drained(stuck[0][0].write, {0, 1}))
    ferry.carry_out("rank0", ferry.receiver.peer_gone(1000))
    assert not ferry.receiver.peers[SENDER].buried
    finish(ferry)


def given_up(ferry: Ferry, receiver: int) -> None:
    """Writes that were lost on the way, long ago."""
    ferry.writes.clear()
    ferry.carry_out("sender", ferry.sender.abandon(receiver))
    assert not ferry.sender.writes
    assert receiver not in ferry.sender.receivers


def test_writes_that_were_given_up_are_never_fenced_and_forgotten_when_the_receiver_is_through_with_them() -> None:
    """R4: it replaces the memory. Kept for a receiver until it says that all of that is over (R1)."""
    ferry = met(pool=4, slabs=2, window=2, optimistic=False)
    ferry.hold_writes = True
    ferry.send(1, 2)
    xfer = ferry.receive(1)
    ferry.deliver()
    ferry.carry_out("rank0", ferry.receiver.cancel(xfer, e.Cancelled("enough")))
    ferry.deliver()
    given_up(ferry, 10)
    for _ in range(3):
        ferry.resend()
    assert not said(ferry, m.Fenced)
    assert len(ferry.receiver.pool.quarantined) == 2
    ferry.carry_out("rank0", ferry.receiver.fence_overdue(1000))
    ferry.resend()
    assert not ferry.receiver.transfers  # Closed is said: it frees no block
    assert ferry.sender.abandoned == {10: xfer}
    ferry.hold_writes = False
    serial, second = ferry.send(2, 2), ferry.receive(2)
    finish(ferry)
    assert rows(ferry, second) == whole(serial, 2)
    assert not ferry.sender.abandoned
    assert not said(ferry, m.Fenced)


def test_a_transfer_whose_writes_were_given_up_is_over_when_its_receiver_comes_back() -> None:
    """It asks for the very blocks that the old writes may still land in: WS-1, at most one post per (epoch, index)."""
    ferry = met(pool=2, first_grant=2)
    ferry.hold_writes = True
    ferry.drop = lambda to, message: isinstance(message, m.Announce)
    ferry.send(1, 2)
    xfer = ferry.receive(1)
    ferry.deliver()
    assert len(ferry.writes) == 2  # to blocks that were lent
    ferry.carry_out("sender", ferry.sender.receiver_lost(10, e.PeerLost("silence"), gone=False))
    given_up(ferry, 10)
    ferry.drop = lambda to, message: False
    for _ in range(3):
        ferry.resend()
    assert not ferry.writes
    assert isinstance(ferry.ended["rank0", xfer], e.PeerLost)
    assert len(ferry.receiver.pool.quarantined) == 2


def test_no_more_writes_are_given_up_than_can_be_kept_in_mind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "MOST_ABANDONED", 1)
    ferry = met(pool=2, window=2, optimistic=False)
    ferry.add_receiver("other", 50)
    ferry.hold_writes = True
    for room, rank in ((1, "rank0"), (2, "other")):
        ferry.send(room, 2)
        xfer = ferry.receive(room, rank)
        ferry.deliver()
        ferry.carry_out(rank, ferry.receivers[rank].cancel(xfer, e.Cancelled("enough")))
        ferry.deliver()
    ferry.carry_out("sender", ferry.sender.abandon(10))
    ferry.carry_out("sender", ferry.sender.abandon(50))
    assert list(ferry.sender.abandoned) == [10]
    assert [w.receiver for w in ferry.sender.writes.values()] == [50]
    assert not ferry.sender.may_abandon(50)
    ferry.carry_out("sender", ferry.sender.write_drained(next(iter(ferry.sender.writes)), {0, 1}))
    ferry.deliver()
    assert [fenced.dst for fenced in said(ferry, m.Fenced)] == [50]


def test_rooms_are_bounded_on_both_sides() -> None:
    ferry = met(pool=4, max_rooms=3)
    for room in range(3):
        ferry.receive(room)
    with pytest.raises(e.Overloaded):
        ferry.receiver.receive(9, SENDER)
    machine = SenderMachine(hello(1, "s"), SenderPolicy(max_rooms=2))
    machine.offer(1, facts(1))
    machine.offer(2, facts(1))
    with pytest.raises(e.Overloaded):
        machine.offer(3, facts(1))


# ---------------------------------------------------------------- rooms


def test_a_room_is_used_by_one_transfer_at_a_time_and_again_afterwards() -> None:
    ferry = met(pool=2)
    ferry.send(1, 2)
    ferry.receive(1)
    with pytest.raises(e.RoomInUse):
        ferry.receiver.receive(1, SENDER)
    with pytest.raises(e.RoomInUse):
        ferry.sender.offer(1, facts(2))
    finish(ferry)
    serial, xfer = ferry.send(1, 3), ferry.receive(1)
    finish(ferry)
    assert rows(ferry, xfer) == whole(serial, 3)


def test_the_next_use_of_a_room_waits_for_the_end_of_this_one_at_the_sender() -> None:
    """A receiver that cancels and receives again meets the next offer, not the one that it cancelled."""
    ferry = met(pool=2, window=2, optimistic=False)
    ferry.hold_writes = True
    one = ferry.send(1, 2)
    ferry.receive(1)
    ferry.deliver()
    ferry.carry_out("rank0", ferry.receiver.cancel(max(ferry.receiver.transfers), e.Cancelled("again")))
    again = ferry.receive(1)
    ferry.deliver()
    assert isinstance(ferry.ended["sender", one], e.Cancelled)
    two = ferry.send(1, 1)
    finish(ferry)
    assert ferry.ended["rank0", again] is ferry.ended["sender", two] is None
    assert rows(ferry, again) == whole(two, 1)


def test_a_second_receiver_of_a_live_room_is_refused() -> None:
    ferry = met(pool=2, window=2, optimistic=False)
    ferry.add_receiver("other", 50)
    ferry.hold_writes = True
    ferry.send(1, 2)
    first = ferry.receive(1)
    ferry.deliver()
    second = ferry.receive(1, "other")
    ferry.deliver()
    ferry.resend()
    assert isinstance(ferry.ended["other", second], e.RoomInUse)
    finish(ferry)
    assert ferry.ended["rank0", first] is None


def test_the_successor_of_a_dead_receiver_gets_the_room() -> None:
    """The rank is taken; whether its holder lives decides, and a lost one is unbound."""
    ferry = met(pool=2, window=2, optimistic=False)
    ferry.add_receiver("other", 50)
    ferry.hold_writes = True
    serial = ferry.send(1, 2)
    ferry.receive(1)
    ferry.deliver()
    dead = ferry.receivers.pop("rank0")
    ferry.drop = lambda to, message: to == "rank0"
    second = ferry.receive(1, "other")
    ferry.deliver()
    assert ("other", second) not in ferry.ended
    ferry.carry_out("sender", ferry.sender.receiver_lost(dead.inc, e.PeerLost("silence"), gone=True))
    ferry.writes = type(ferry.writes)(w for w in ferry.writes if w[0].receiver != dead.inc)
    for write in [key for key, w in ferry.sender.writes.items() if w.receiver == dead.inc]:
        ferry.carry_out("sender", ferry.sender.write_drained(write, set(ferry.sender.writes[write].outstanding)))
    finish(ferry)
    assert ferry.ended["other", second] is ferry.ended["sender", serial] is None
    assert rows(ferry, second, "other") == whole(serial, 2)


@pytest.mark.parametrize("waits", [True, False])
def test_a_successor_that_waits_when_the_loss_is_known_is_let_in_without_a_word_more(waits: bool) -> None:
    ferry = met(pool=2, window=2, optimistic=False)
    ferry.add_receiver("other", 50)
    serial = ferry.send(1, 2, ready=0)
    ferry.receive(1)
    ferry.deliver()
    dead = ferry.receivers.pop("rank0")
    ferry.drop = lambda to, message: to == "rank0"
    second = ferry.receive(1, "other")
    ferry.deliver()
    if not waits:
        ferry.carry_out("other", ferry.receivers["other"].cancel(second, e.Cancelled("enough")))
        ferry.deliver()
    ferry.drop = lambda to, message: to == "rank0" or isinstance(message, m.Open)
    ferry.carry_out("sender", ferry.sender.receiver_lost(dead.inc, e.PeerLost("silence"), gone=True))
    slot = next(iter(ferry.sender.slots.values()))
    assert [b.receiver for b in slot.bindings.values()] == ([50] if waits else [])
    assert slot.rival is None
    if waits:
        ferry.carry_out("sender", ferry.sender.extend(serial, 2))
        finish(ferry)
        assert ferry.ended["other", second] is ferry.ended["sender", serial] is None
    else:
        assert ("sender", serial) not in ferry.ended  # whoever comes next may have it


def test_a_room_given_up_before_its_offer_fails_the_offer_once() -> None:
    """Defect 7's other half: an offer that comes after the receiver has cancelled learns it at once."""
    ferry = met(pool=2)
    xfer = ferry.receive(1)
    ferry.deliver()
    ferry.carry_out("rank0", ferry.receiver.cancel(xfer, e.Cancelled("enough")))
    ferry.deliver()
    serial = ferry.send(1, 2)
    assert isinstance(ferry.ended["sender", serial], e.Cancelled)
    assert not ferry.sender.given_up
    finish(ferry)
    serial, xfer = ferry.send(1, 2), ferry.receive(1)
    finish(ferry)
    assert ferry.ended["sender", serial] is None


def test_a_room_given_up_and_opened_again_is_not_given_up_any_more() -> None:
    ferry = met(pool=2)
    xfer = ferry.receive(1)
    ferry.deliver()
    ferry.carry_out("rank0", ferry.receiver.cancel(xfer, e.Cancelled("enough")))
    ferry.deliver()
    assert 1 in ferry.sender.given_up
    again = ferry.receive(1)
    ferry.deliver()
    serial = ferry.send(1, 2)
    finish(ferry)
    assert ferry.ended["sender", serial] is ferry.ended["rank0", again] is None
    assert not ferry.sender.given_up


def test_an_offer_withdrawn_before_anybody_opened_the_room_ends_the_receiver_once() -> None:
    """The same in the other direction: a receiver that comes late is told, and does not wait for its deadline."""
    ferry = met(pool=2)
    serial = ferry.send(1, 2)
    ferry.carry_out("sender", ferry.sender.cancel(serial, e.Cancelled("enough")))
    xfer = ferry.receive(1)
    finish(ferry)
    assert isinstance(ferry.ended["rank0", xfer], e.Cancelled)
    assert not ferry.sender.withdrawn
    serial, xfer = ferry.send(1, 2), ferry.receive(1)
    finish(ferry)
    assert ferry.ended["sender", serial] is ferry.ended["rank0", xfer] is None


def test_a_room_withdrawn_and_offered_again_is_not_withdrawn_any_more() -> None:
    ferry = met(pool=2)
    ferry.carry_out("sender", ferry.sender.cancel(ferry.send(1, 2), e.Cancelled("enough")))
    serial, xfer = ferry.send(1, 2), ferry.receive(1)
    finish(ferry)
    assert ferry.ended["sender", serial] is ferry.ended["rank0", xfer] is None


def test_every_rank_of_a_withdrawn_room_is_told() -> None:
    ferry = Ferry(pool=2, ranks=2)
    ferry.carry_out("sender", ferry.sender.cancel(ferry.send(1, 2), e.Cancelled("enough")))
    xfers = {rank: ferry.receive(1, rank) for rank in ("rank0", "rank1")}
    finish(ferry)
    for rank, xfer in xfers.items():
        assert isinstance(ferry.ended[rank, xfer], e.Cancelled)
    assert not ferry.sender.slots


def test_what_was_withdrawn_long_ago_is_forgotten() -> None:
    ferry = met(pool=2)
    ferry.carry_out("sender", ferry.sender.cancel(ferry.send(1, 2), e.Cancelled("enough")))
    assert 1 in ferry.sender.withdrawn
    ferry.sender.forget_ended(1)
    assert not ferry.sender.withdrawn


# ---------------------------------------------------------------- cancel (CN-1 to CN-3)


def steps_of(options: dict[str, Any], total: int) -> int:
    ferry = Ferry(**options)
    ferry.send(1, total)
    ferry.receive(1)
    count = 0
    while ferry.step():
        count += 1
    return count


CANCELLED: dict[str, dict[str, Any]] = {
    "loan": {"pool": 3, "first_grant": 2, "window": 2},
    "announced": {"pool": 3, "window": 2, "optimistic": False},
}


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("who", ["rank0", "sender"])
@pytest.mark.parametrize("options", CANCELLED.values(), ids=CANCELLED)
def test_cancelled_after_any_number_of_steps_it_ends_once_and_cleanly(
    options: dict[str, Any], who: str, hold: bool
) -> None:
    """CN-1, CN-2, CN-3: told at once; one outcome, the same on both sides if they had met; nothing is left."""
    outcomes = set()
    for after in range(steps_of(options, 5) + 1):
        ferry = Ferry(**options)
        serial, xfer = ferry.send(1, 5), ferry.receive(1)
        for _ in range(after):
            ferry.step()
        met_before = bool(ferry.sender.where) or bool(ferry.ended)
        ferry.hold_writes = hold
        for _ in range(2):  # the second time changes nothing
            machine, key = (ferry.receiver, xfer) if who == "rank0" else (ferry.sender, serial)
            ferry.carry_out(who, machine.cancel(key, e.Cancelled("enough")))
            assert (who, key) in ferry.ended
        ferry.hold_writes = False
        ferry.resend()
        if not met_before:  # the other side has nobody to hear it from, and its own deadlines
            ferry.carry_out("rank0", ferry.receiver.fail(xfer, e.Cancelled("deadline")))
            ferry.carry_out("sender", ferry.sender.cancel(serial, e.Cancelled("deadline")))
        finish(ferry)
        here, there = ferry.ended["rank0", xfer], ferry.ended["sender", serial]
        # Whoever cancels is told at once, so that the sender's cancel may cross the delivery; the receiver decides.
        assert (here is None) == (there is None) or (who == "sender" and here is None)
        assert here is None or isinstance(here, e.Cancelled)
        if here is None:
            assert rows(ferry, xfer) == whole(serial, 5)
        assert ferry.released == [serial]
        outcomes.add(here is None)
    assert outcomes == {False, True}  # after the end, a cancel changes nothing


@pytest.mark.parametrize("known", [False, True])
def test_a_cancel_before_the_sender_has_heard_of_it_leaves_nothing(known: bool) -> None:
    ferry = met(pool=2) if known else Ferry(pool=2)
    xfer = ferry.receive(1)
    ferry.carry_out("rank0", ferry.receiver.cancel(xfer, e.Cancelled("enough")))
    assert isinstance(ferry.ended["rank0", xfer], e.Cancelled)
    finish(ferry)
    serial = ferry.send(7, 2)
    ferry.carry_out("sender", ferry.sender.cancel(serial, e.Cancelled("enough")))
    finish(ferry)
    assert ferry.released == [serial]


def test_a_cancel_of_what_is_over_or_never_was_changes_nothing() -> None:
    ferry = met(pool=2)
    serial, xfer = ferry.send(1, 2), ferry.receive(1)
    finish(ferry)
    before = ferry.sender.snapshot(), ferry.receiver.snapshot()
    for key in (xfer, serial, 12345):
        assert ferry.receiver.cancel(key, e.Cancelled("late")) == []
        assert ferry.receiver.fail(key, e.DeadlineExceeded("late")) == []
        assert ferry.sender.cancel(key, e.Cancelled("late")) == []
    assert (ferry.sender.snapshot(), ferry.receiver.snapshot()) == before


# ---------------------------------------------------------------- restarts (ID-2, R8)


@pytest.mark.parametrize("same", [True, False])
def test_a_restarted_sender_goes_on_with_equal_content_and_over_with_other(same: bool) -> None:
    ferry = met(pool=4, window=1, optimistic=False)
    ferry.send(1, 4)
    xfer = ferry.receive(1)
    t = ferry.receiver.transfers[xfer]
    while t.have.prefix < 2:
        ferry.step()
    ferry.queue.clear()
    ferry.writes.clear()
    old, ferry.sender = ferry.sender, SenderMachine(hello(2000, "sender"))
    ferry.carry_out("rank0", ferry.receiver.peer_gone(old.inc))
    ferry.sent.clear()
    serial = ferry.send(1, 4, content=b"c" * 16 if same else b"d" * 16)
    finish(ferry)
    assert ferry.ended["rank0", xfer] is None
    indices = granted_indices([g for g in said(ferry, m.Grant) if g.dst == 2000])
    assert sorted(set(indices)) == ([2, 3] if same else [0, 1, 2, 3])
    assert set(rows(ferry, xfer)) == {0, 1, 2, 3}
    assert ferry.ended["sender", serial] is None


def test_other_content_after_rows_were_shown_is_an_error() -> None:
    ferry = met(pool=4, window=1, optimistic=False)
    ferry.send(1, 4)
    xfer = ferry.receive(1)
    while ferry.receiver.transfers[xfer].have.prefix < 2:
        ferry.step()
    ferry.receiver.expose(xfer)
    ferry.queue.clear()
    ferry.writes.clear()
    ferry.sender = SenderMachine(hello(2000, "sender"))
    ferry.carry_out("rank0", ferry.receiver.peer_gone(1000))
    ferry.send(1, 4, content=b"d" * 16)
    finish(ferry)
    assert isinstance(ferry.ended["rank0", xfer], e.ContentChanged)


def test_a_restarted_receiver_under_its_name_takes_the_room_over() -> None:
    ferry = met(pool=2, window=2, optimistic=False)
    ferry.hold_writes = True
    serial = ferry.send(1, 2)
    ferry.receive(1)
    ferry.deliver()
    ferry.add_receiver("rank0", 77)
    xfer = ferry.receive(1)
    ferry.deliver()
    late = [w for w in ferry.writes if w[0].receiver == 10]
    assert late
    finish(ferry)
    assert ferry.ended["rank0", xfer] is ferry.ended["sender", serial] is None
    assert rows(ferry, xfer) == whole(serial, 2)


def test_the_two_sides_compare_what_they_speak_before_any_block_is_granted() -> None:
    for change, error in (
        ({"layout": b"M" * 16}, e.LayoutMismatch),
        ({"block_size": 2}, e.GeometryMismatch),
    ):
        ferry = Ferry(pool=2)
        ferry.sender = SenderMachine(hello(1000, "sender", **change))
        serial, xfer = ferry.send(1, 2), ferry.receive(1)
        ferry.deliver()
        assert isinstance(ferry.ended["rank0", xfer], error)
        assert ("sender", serial) not in ferry.ended  # a receiver that fits may come
        assert ferry.sender.refused
        assert not said(ferry, m.Grant)


def test_snapshots_restore_to_the_same_machine() -> None:
    """R11: what exploration puts back behaves as what it took; nothing of the protocol is left out."""
    ferry = Ferry(pool=3, window=2, first_grant=2, budget=1)
    spoil(ferry, 1)
    for room in (1, 2, 3):
        ferry.send(room, 4)
        ferry.receive(room)
    while ferry.step():
        for name, machine in (("receiver", ferry.receiver), ("sender", ferry.sender)):
            other: ReceiverMachine | SenderMachine
            if name == "receiver":
                twin = Ferry(pool=3, window=2, first_grant=2, budget=1)
                other = twin.receiver
            else:
                other = SenderMachine(hello(1000, "sender"))
            other.restore(machine.snapshot())
            assert other.snapshot() == machine.snapshot()
            if isinstance(other, ReceiverMachine):
                other.pool.audit()
                assert other.budget_used == ferry.receiver.budget_used
                assert other.rooms == ferry.receiver.rooms
    finish(ferry)
