"""The 33 defects of the first design, one test each: every one is impossible here, and this is where it would show.

The number is the defect's place in the list; the docstring quotes it and says what makes it impossible.
"""

from __future__ import annotations

import inspect
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import zmq
from ferry import SENDER, Ferry, hello

sys.path.insert(0, str(Path(__file__).with_name("scenarios")))

from fault_kit import FAULTY, HOLD, WRITE, let_go, proxy, script
from scenario_kit import LAYOUT, PATIENCE, SMALL, Quay, assert_clean, assert_same, books, eventually, lowest_first, rows
from side import Side

import tensorferry as tf
from tensorferry.core import endpoint as endpoint_module
from tensorferry.core import errors as e
from tensorferry.core import messages as m
from tensorferry.core.allocator import BlockPool, Tenant
from tensorferry.core.control import Control
from tensorferry.core.errors import FerryError, InternalError
from tensorferry.core.layout import Component, Geometry, slab_plan
from tensorferry.core.source import Source, write_plan
from tensorferry.core.transfer import Phase, Status
from tensorferry.core.wire import BadFrame, decode, encode


def said(ferry: Ferry, kind: type) -> list[Any]:
    return [message for _, message in ferry.sent if isinstance(message, kind)]


def finish(ferry: Ferry) -> None:
    """Everything is said again until nothing is left."""
    ferry.hold_writes = False
    ferry.deliver()
    for _ in range(4):
        ferry.resend()
    ferry.assert_clean()


def granted(grants: list[m.Grant]) -> list[tuple[int, int]]:
    """(index, block) of every block of these grants."""
    return [(first + k, block + k) for g in grants for first, block, n, _ in m.unpack_grant(g.runs) for k in range(n)]


def whole(serial: int, blocks: int) -> dict[int, tuple[int, int]]:
    return {index: (serial, index) for index in range(blocks)}


def delivered(ferry: Ferry, serial: int, xfer: int, blocks: int, who: str = "rank0") -> None:
    assert ferry.ended[who, xfer] is None
    assert ferry.rows.get((who, xfer), {}) == whole(serial, blocks)


# ================================================================ memory


def test_defect_01_blocks_listed_twice_and_shared_by_two_requests() -> None:
    """The defect: "Free, fail to allocate, try again, free again: blocks listed twice, two requests share
    them." A block is freed by its tenant, once (GR-4), and exhaustion is a wait that frees nothing (AL-6)."""
    pool = BlockPool(2)
    tenants = [Tenant(1, 9, 1, 0), Tenant(1, 9, 1, 1)]
    blocks = pool.grant(tenants)
    pool.free(blocks[0], tenants[0])
    with pytest.raises(InternalError):  # fail to allocate
        pool.grant([Tenant(2, 9, 1, 0), Tenant(2, 9, 1, 1)])
    with pytest.raises(InternalError):  # free again
        pool.free(blocks[0], tenants[0])
    assert pool.grant([Tenant(3, 9, 1, 0)]) == [blocks[0]]
    with pytest.raises(InternalError):
        pool.free(blocks[0], tenants[0])  # it is another's by now
    pool.audit()

    ferry = Ferry(pool=2, window=2, first_grant=1)  # and in the machine, at every step of a pool that is too small
    rooms = {ferry.send(room, 5): ferry.receive(room) for room in range(4)}
    steps = 0
    while ferry.step():
        steps += 1
        held = [block for t in ferry.receiver.transfers.values() for block in t.out.values()]
        held += [block for t in ferry.receiver.transfers.values() for block, _, _ in t.gathering.values()]
        assert len(held) == len(set(held)) == 2 - ferry.receiver.pool.free_count
        if steps % 20 == 0:
            for xfer in rooms.values():
                ferry.carry_out("rank0", ferry.receiver.resend(xfer))  # try again
    for serial, xfer in rooms.items():
        delivered(ferry, serial, xfer, 5)


def test_defect_02_the_first_grant_takes_the_whole_pool_and_the_second_waits_for_ever() -> None:
    """The defect: "The first grant takes the whole pool, and the second is allocated before the first is
    freed." The next grant uses what the last one gave back; a loan is never waited for (L3)."""
    for window in ("rounds", "auto"):
        ferry = Ferry(pool=64, slabs=8, first_grant=64, window=window)  # the defaults, and 50,000 tokens twice
        rooms = {ferry.send(room, 391): ferry.receive(room) for room in range(2)}
        ferry.deliver()
        for serial, xfer in rooms.items():
            delivered(ferry, serial, xfer, 391)
        finish(ferry)


def test_defect_03_two_requests_that_each_hold_half_the_pool_wait_for_each_other() -> None:
    """The defect: "Two requests each hold half the pool and both want more: deadlock." A held block comes
    back by itself, and what does not (a loan) is taken back (R2): no block's return needs another block
    (AL-5)."""
    for ready in (9, 0):
        ferry = Ferry(pool=4, first_grant=2, window=4)
        ferry.hold_writes = True
        xfers = [ferry.receive(room) for room in (1, 2)]
        ferry.deliver()
        assert [ferry.receiver.transfers[x].holds for x in xfers] == [2, 2]
        serials = [ferry.send(room, 9, ready=ready) for room in (1, 2)]
        ferry.hold_writes = False
        ferry.deliver()
        for serial in serials:
            ferry.carry_out("sender", ferry.sender.extend(serial, 9))
        finish(ferry)
        for serial, xfer in zip(serials, xfers, strict=True):
            delivered(ferry, serial, xfer, 9)


def test_defect_04_a_remainder_larger_than_the_pool_waits_for_ever() -> None:
    """The defect: "The remainder is larger than the pool: it waits for ever." A grant is what is free, at
    least one block (R9)."""
    for pool in (1, 2, 3):
        for window in ("rounds", "auto"):
            ferry = Ferry(pool=pool, first_grant=1, window=window)
            serial, xfer = ferry.send(1, 50), ferry.receive(1)
            finish(ferry)
            delivered(ferry, serial, xfer, 50)


def test_defect_05_a_record_that_is_a_view_of_a_block_of_somebody_else() -> None:
    """The defect: "A cached record is a view of a block that has since been given to someone else." Rows are
    copied out of the pool before their block is free; results share no memory with it."""
    with Quay(block_size=16, pool_blocks=2, first_grant=32, choose=lambda: lowest_first) as quay:
        results = [quay.carry(30, room, seed=room).result() for room in range(4)]  # the same two blocks, four times
        for room, result in enumerate(results):
            assert_same(result, rows(30, room))
        slabs = [slab.memory for slab in quay.receiver._buffers._slabs]
        for result in results:
            for tensor in (result[name] for name in result):
                assert tensor is not None
                at = tensor.data_ptr()
                assert all(not slab.address <= at < slab.address + slab.nbytes for slab in slabs)


def test_defect_06_blocks_are_freed_while_a_write_to_them_is_in_flight() -> None:
    """The defect: "Blocks are freed on failure or abort while a write to them may still be in flight." They
    go through quarantine and come back by a proof alone (GR-2, GR-3)."""
    with Quay(block_size=16, pool_blocks=4, slabs=1, first_grant=32, sender_transport=FAULTY["memory"]) as quay:
        script(quay.sender, lambda n: HOLD if n == 0 else WRITE)
        given = rows(30)
        quay.sender.send(1, **given)
        first = quay.receive(1)
        eventually(lambda: proxy(quay.sender).held)
        first.cancel()
        assert first.status == "FAILED"  # at once; and the write is still out
        second = quay.carry(60, room=2, seed=2)  # goes through what is left of the pool
        assert quay.receiver.free_blocks == 2
        let_go(quay.sender)  # the old write lands now, in blocks that are nobody's
        eventually(lambda: quay.receiver.free_blocks == 4)
        assert_same(second.result(), rows(60, 2))


def test_defect_07_the_encoder_is_never_told_that_the_language_side_gave_up() -> None:
    """The defect: "The encoder is never told that the language side gave up; its source blocks stay
    allocated." Close is said until it is heard, and an offer that comes later learns it too."""
    with Quay(block_size=16, pool_blocks=4) as quay:
        for offered_before in (True, False):
            room = int(offered_before)
            if offered_before:
                sending = quay.sender.announce(room, 100)
            receiving = quay.receive(room)
            eventually(lambda: receiving.status != "BOOTSTRAPPING" and not quay.receiver._control.dropped)  # noqa: B023
            receiving.cancel()
            if not offered_before:
                eventually(lambda: quay.sender._call(lambda: dict(quay.sender.machine.given_up)))
                sending = quay.sender.announce(room, 100)
            with pytest.raises(e.Cancelled):
                sending.wait(PATIENCE)
        eventually(lambda: not books(quay.sender))  # the rows, too, are let go


def leaves(thing: object) -> int:
    return sum(map(leaves, thing)) if isinstance(thing, tuple) else 1


def test_defect_08_bookkeeping_of_finished_rooms_grows_for_ever() -> None:
    """The defect: "Bookkeeping for finished rooms is never removed; memory grows with every request." What is
    over and heard is forgotten on both sides (LV-2); tombstones end with min_live; a caller who never polls
    keeps nothing alive."""
    for ranks in (1, 2):
        ferry = Ferry(pool=3, ranks=ranks)
        sizes = []
        for room in range(60):
            ferry.send(room, 3)
            for rank in ferry.receivers:
                xfer = ferry.receive(room, rank)
            ferry.hold_writes = True
            ferry.deliver()
            ferry.hold_writes = False
            if room % 3 == 0:
                ferry.carry_out("rank0", ferry.receivers["rank0"].cancel(xfer, e.Cancelled("enough")))
            for _ in range(3):
                ferry.resend()
            machines = [ferry.sender, *ferry.receivers.values()]
            sizes.append(sum(leaves(machine.snapshot()) for machine in machines))
        assert max(sizes[30:]) <= max(sizes[:6])
        ferry.assert_clean()
    with Quay(block_size=16, pool_blocks=4) as quay:
        sizes = []
        for room in range(30):
            quay.carry(20, room)
            assert_clean(*quay.ends)
            sizes.append([len(quay.sender._changed), len(quay.receiver._changed), len(quay.sender._heard)])
            sizes[-1] += [len(quay.receiver._heard), len(quay.receiver._known)]
        assert sizes[-1] <= sizes[3]


# ================================================================ arithmetic


def test_defect_09_resuming_at_a_count_that_is_no_multiple_of_the_block_size() -> None:
    """The defect: "Resuming at a token count that is not a multiple of the block size resends or skips
    tokens." The unit on the wire is the block (GR-5); no message but Announce has a count of tokens."""
    for total, wish in ((75, 20), (75, 1), (33, 31), (49, 17)):
        with Quay(block_size=16, pool_blocks=8, first_grant=wish) as quay:
            given = rows(total)
            receiving = quay.receive(1)
            eventually(lambda: quay.receiver.free_blocks < 8)  # the loan is out before the length is known
            quay.sender.send(1, **given)
            assert_same(receiving.result(PATIENCE), given)
            assert receiving.rounds[0].tokens == min(-(-wish // 16) * 16, total)
            assert all(sent % 16 == 0 for sent in receiving.history[:-1])
            assert receiving.history[-1] == total
            assert [r.start for r in receiving.rounds] == [0, *receiving.history[:-1]]
            assert sum(r.tokens for r in receiving.rounds) == total
    in_tokens = [k.__name__ for k in m.AnyMessage.__args__ if {"tokens", "total", "ready"} & set(k.__struct_fields__)]
    assert in_tokens == ["Announce"]


def test_defect_10_allocated_tokens_is_the_wish_and_not_the_blocks_capacity() -> None:
    """The defect: "`allocated_tokens` is the wish, not the blocks' capacity: rows of garbage are accepted,
    real rows are lost." What arrives is counted in blocks and cut at the announced length, whatever was
    wished."""
    for wish, total, tokens in ((300, 310, [310]), (300, 400, [384, 16]), (384, 384, [384]), (10_000, 129, [129])):
        with Quay(block_size=128, pool_blocks=4, first_grant=wish, layout=SMALL) as quay:
            receiving = quay.receive(1)
            eventually(lambda: quay.receiver.free_blocks < 4)
            given = rows(total, layout=SMALL)
            quay.sender.send(1, **given)
            result = receiving.result(PATIENCE)
            assert [r.tokens for r in receiving.rounds] == tokens
            assert all(len(tensor) == total for name in result if (tensor := result[name]) is not None)
            assert_same(result, given)


def test_defect_11_nothing_moves_and_the_result_says_success() -> None:
    """The defect: "The already sent count is subtracted twice: nothing moves, and the result says success."
    Success is that every block was gathered (WM-5); no message and no count can stand for it."""
    ferry = Ferry(pool=2, window="rounds", first_grant=2)
    serial, xfer = ferry.send(1, 6), ferry.receive(1)
    t = ferry.receiver.transfers[xfer]
    while len(t.log.watermarks) < 1:
        ferry.step()
    ferry.hold_writes = True
    ferry.deliver()  # round 2 is granted, and nothing moves
    common = {"src": 1000, "dst": 10, "xfer": xfer}
    for claim in (m.Commit(**common), m.Closed(**common), m.Fenced(**common, upto=99)):
        ferry.carry_out("rank0", ferry.receiver.on_message(SENDER, claim))
    for _ in range(5):
        ferry.resend()
    assert not ferry.ended
    assert ferry.receiver.sent_tokens(t) == 2
    assert t.phase is Phase.ACTIVE
    finish(ferry)
    delivered(ferry, serial, xfer, 6)


def test_defect_12_a_channel_major_component_is_scrambled_by_a_split_inside_a_block() -> None:
    """The defect: "A component stored channel-major inside a block is scrambled by any split inside that
    block." Rows are tokens in every component; a tensor that is not token-major is refused, with the
    permutation that would help."""
    for size in (1, 3, 7, 16):
        with Quay(block_size=size, pool_blocks=4, layout=SMALL) as quay:
            for total in (size - 1, size + 1, 3 * size + size // 2, 23):
                if total > 0:
                    quay.carry(total, room=total, seed=total)
    with Quay(block_size=16, pool_blocks=4, layout=SMALL) as quay:
        given = rows(20, layout=SMALL)
        with pytest.raises(e.BadTensor, match="permute"):
            quay.sender.send(1, **{**given, "mrope_positions": given["mrope_positions"].T.contiguous()})


def test_defect_13_a_source_list_shorter_than_needed_is_silently_truncated() -> None:
    """The defect: "A source list shorter than needed is silently truncated by pairing it with the
    destinations." Components have one length, rows beyond what was put are never planned, and a transfer
    waits for the rows that it announced."""
    given = rows(20, layout=SMALL)
    source = Source(SMALL, 40, SMALL.names)
    source.put(0, **given)
    with pytest.raises(e.BadTensor, match="length"):
        source.put(20, **{**given, "fill_ids": given["fill_ids"][:-1]})
    with pytest.raises(e.BadCall, match="20 are ready"):
        list(source.block_views(1, 16))
    large = tf.Layout([Component("x", "float32", (1024,))])
    source = Source(large, 40, ["x"])
    source.put(0, x=torch.zeros(20, 1024))
    with pytest.raises(e.BadCall, match="20 are ready"):
        write_plan(source, slab_plan(large, Geometry(16, 8, 1), 0), 0, 0, 2, None)
    with Quay(block_size=16, pool_blocks=4, layout=SMALL) as quay:
        sending, receiving = quay.sender.announce(1, 40), quay.receive(1)
        everything = rows(40, layout=SMALL)
        sending.put(0, **{name: tensor[:25] for name, tensor in everything.items()})
        eventually(lambda: receiving.sent_tokens == 16)  # whole blocks; the rest is waited for
        assert not receiving.done
        sending.put(25, **{name: tensor[25:] for name, tensor in everything.items()})
        assert_same(receiving.result(PATIENCE), everything)


def test_defect_14_the_length_is_read_from_a_record_that_later_rounds_do_not_carry() -> None:
    """The defect: "The received length is read from a record that only the first block of the first round
    carries." Length and aux come once, in Announce, never out of the pool (ID-5), so that no block's old
    content can be taken for them."""
    with Quay(block_size=16, pool_blocks=2, first_grant=32, choose=lambda: lowest_first) as quay:
        for room, total in enumerate((200, 5, 0, 33, 199)):  # the same two blocks, full of the one before
            given = rows(total, room)
            sending = quay.sender.send(room, mrope_delta=-room, aux=[room] * 14, **given)
            receiving = quay.receive(room)
            result = receiving.result(PATIENCE)
            assert receiving.total_tokens == total
            assert list(result.aux) == [total, -room, *[room] * 14]
            assert_same(result, given)
            assert receiving.history[-1:] == ((total,) if total else ())
            sending.wait(PATIENCE)


def test_defect_15_optional_values_are_inherited_from_the_request_before() -> None:
    """The defect: "Optional values are not reset between requests: the next request inherits them." What is
    present stands in each Announce; what is not is None, whatever the pool still holds."""
    with Quay(block_size=16, pool_blocks=2, choose=lambda: lowest_first) as quay:
        for room, names in enumerate((LAYOUT.names, ("input_embeds",), ("input_embeds", "fill_ids"), LAYOUT.names)):
            given = rows(30, room, names=tuple(names))
            quay.sender.send(room, **given, **({"mrope_delta": 7, "aux": [1, 2]} if room == 0 else {}))
            result = quay.receive(room).result(PATIENCE)
            assert {name for name in result if result[name] is not None} == set(names)
            assert_same(result, given)
            assert list(result.aux) == [30, 7, 1, 2] + [0] * 12 if room == 0 else [30] + [0] * 15


def test_defect_16_the_sides_disagree_on_block_size_or_layout_and_nobody_notices() -> None:
    """The defect: "The two sides disagree on block size or layout, and nobody notices." Both stand in Hello,
    which comes before everything else; a mismatch is a typed error and costs no block."""
    with Quay(block_size=16, pool_blocks=4) as quay:
        for change, error in (
            ({"block_size": 32}, e.GeometryMismatch),
            ({"layout": tf.embedding_layout(65)}, e.LayoutMismatch),
            ({"layout": tf.embedding_layout(64, "float16")}, e.LayoutMismatch),
            ({"layout": tf.embedding_layout(64, mrope=False)}, e.LayoutMismatch),
        ):
            other = quay.add_receiver(**change)
            with pytest.raises(error):
                other.receive(1, quay.sender.address).wait(PATIENCE)
            assert other.free_blocks == other.pool_blocks
        quay.carry(50)


# ================================================================ protocol


def test_defect_17_a_resume_request_updates_a_table_but_starts_no_transfer() -> None:
    """The defect: "A resume request updates a table but starts no transfer." A grant is the work order:
    handling it posts the write."""
    ferry = Ferry(pool=2, window="rounds", first_grant=2)
    ferry.send(1, 6)
    ferry.receive(1)
    grants: list[m.Grant] = []
    carry_out = ferry.sender.on_message
    posted: list[list[int]] = []

    def on_message(route: str, message: m.Message) -> list[Any]:
        effects = carry_out(route, message)
        if isinstance(message, m.Grant):
            grants.append(message)
            posted.append([f + k for x in effects if hasattr(x, "runs") for f, _, n, _ in x.runs for k in range(n)])
        return effects

    ferry.sender.on_message = on_message  # type: ignore[method-assign]
    ferry.deliver()
    assert [sorted(index for index, _ in granted([grant])) for grant in grants] == [[0, 1], [2, 3], [4, 5]]
    assert posted == [[0, 1], [2, 3], [4, 5]]


def test_defect_18_message_kinds_are_told_apart_by_their_number_of_frames() -> None:
    """The defect: "Message kinds are told apart by the number of frames: adding one field turns one into
    another." Each has a tag; a field too many or too few makes it nothing at all."""
    revoke = m.Revoke(src=1, dst=2, min_live=3, xfer=4, upto=5)
    head, payload = encode(revoke)[:8], msgspec.msgpack.decode(encode(revoke)[12:])

    def kind(form: list[object]) -> object:
        import struct
        import zlib

        data = msgspec.msgpack.encode(form)
        return type(decode(head + struct.pack("<I", zlib.crc32(data)) + data))

    assert kind(payload) is m.Revoke
    by_length: dict[int, set[str]] = {}
    for each in m.AnyMessage.__args__:
        by_length.setdefault(len(each.__struct_fields__), set()).add(each.__name__)
    assert any(len(names) > 1 for names in by_length.values())  # equal numbers of fields, and no confusion
    for form in ([*payload, 0], [*payload, 0, 0], payload[:-1], payload[1:], [*payload[:1], 9, *payload[1:]]):
        with pytest.raises(BadFrame):
            kind(form)


def test_defect_19_partial_data_is_a_level_that_starts_a_resume_at_every_tick() -> None:
    """The defect: "'Partial data has arrived' is a level that stays true, so the event loop frees, allocates
    and resumes again at every tick." A Done counts once; looking has no effect; repetition says the same
    again."""
    ferry = Ferry(pool=8, window="rounds", first_grant=2)
    serial, xfer = ferry.send(1, 8), ferry.receive(1)
    t = ferry.receiver.transfers[xfer]
    while not t.log.watermarks:
        ferry.step()
    ferry.hold_writes = True
    ferry.deliver()
    assert t.status is Status.TRANSFERRING
    out, before = dict(t.out), ferry.receiver.snapshot()
    for _ in range(50):  # ticks of an event loop, timers, and every Done again
        assert t.status is Status.TRANSFERRING
        for done in said(ferry, m.Done):
            assert ferry.receiver.on_message(SENDER, done) == []
        ferry.resend()
    assert t.out == out
    assert ferry.receiver.snapshot() == before
    assert len({(grant.epoch, pair) for grant in said(ferry, m.Grant) for pair in granted([grant])}) == 2 + len(out)
    finish(ferry)
    delivered(ferry, serial, xfer, 8)


def test_defect_20_the_guard_compares_block_numbers_and_the_same_come_again() -> None:
    """The defect: "The guard against that compares block numbers, and the allocator hands out the same
    numbers again." A grant is named by (epoch, index); block numbers mean nothing (ID-4)."""
    ferry = Ferry(pool=4, window="rounds", first_grant=2)
    ferry.receiver.pool.choose = lowest_first
    serial, xfer = ferry.send(1, 20), ferry.receive(1)
    finish(ferry)
    delivered(ferry, serial, xfer, 20)
    blocks = [sorted({block for _, block in granted([grant])}) for grant in said(ferry, m.Grant)]
    assert blocks[-3:-1] == [[0, 1, 2, 3]] * 2


def test_defect_21_the_guard_never_advances_after_the_first_resume() -> None:
    """The defect: "The guard that replaced it never advances after the first resume: the second resume never
    happens." Nothing guards a resume: what is missing is granted, as often as it takes."""
    for choose in (lowest_first, None):
        ferry = Ferry(pool=2, window="rounds", first_grant=2)
        if choose is not None:
            ferry.receiver.pool.choose = choose
        serial, xfer = ferry.send(1, 40), ferry.receive(1)
        t = ferry.receiver.transfers[xfer]
        ferry.deliver()
        assert t.log.watermarks == list(range(2, 41, 2))
        finish(ferry)
        delivered(ferry, serial, xfer, 40)


def test_defect_22_a_late_resume_request_starts_a_round_that_nobody_waits_for() -> None:
    """The defect: "A duplicate or late resume request starts a round that nobody waits for." An index is
    posted at most once in its epoch (WS-1), never in one that is over, never after the end."""
    ferry = Ferry(pool=2, window=1, optimistic=False)
    serial, xfer = ferry.send(1, 5), ferry.receive(1)
    posted: list[tuple[int, int]] = []
    land = ferry.land

    def counted(write: Any, index: int, block: int) -> None:
        posted.append((write.write[2], index))
        land(write, index, block)

    ferry.land = counted  # type: ignore[method-assign]
    bumped = False
    going = True
    while going:
        going = ferry.step()
        for grant in said(ferry, m.Grant):
            ferry.carry_out("sender", ferry.sender.on_message("rank0", grant))
        if not bumped and len(posted) == 2:
            bumped = True
            ferry.carry_out("rank0", ferry.receiver.suspect(xfer, e.TransportError("suspicion")))
    finish(ferry)
    for grant in said(ferry, m.Grant):
        ferry.carry_out("sender", ferry.sender.on_message("rank0", grant))
    assert not ferry.writes
    assert bumped
    assert len(posted) == len(set(posted))
    delivered(ferry, serial, xfer, 5)


def test_defect_23_a_late_message_revives_a_room_or_turns_a_failure_into_a_success() -> None:
    """The defect: "A late status message revives a room that is finished, or turns a failure into a success."
    The end is told once and is final; what belongs to a transfer that is over creates no state (ID-3)."""
    for fails in (False, True):
        ferry = Ferry(pool=4, window=2, optimistic=False)
        ferry.hold_writes = True
        serial, xfer = ferry.send(1, 4), ferry.receive(1)
        ferry.deliver()
        t = ferry.receiver.transfers[xfer]
        if fails:
            ferry.carry_out("rank0", ferry.receiver.cancel(xfer, e.Cancelled("enough")))
        else:
            ferry.hold_writes = False
            ferry.deliver()
        end = Status.FAILED if fails else Status.SUCCESS
        common = {"src": 1000, "dst": 10, "xfer": xfer}
        late = [
            *said(ferry, m.Announce), *said(ferry, m.Done), m.Commit(**common),
            m.Refused(**common, code="config", cause=""),
            m.Abort(**common, code="cancelled", cause=""), m.Trouble(**common, epoch=1, code="transport", cause=""),
            m.Done(**common, epoch=1, runs=m.pack_done([(0, 4)]), digests=m.pack_digests(range(4)), path=""),
        ]  # fmt: skip
        for again in range(4):
            for message in late:
                ferry.carry_out("rank0", ferry.receiver.on_message(SENDER, message))
            if again:
                ferry.deliver()
            else:
                finish(ferry)
            for kind in (m.Complete, m.Close):
                fields = {"src": 10, "dst": 1000, "min_live": 1, "xfer": xfer, "code": "" if fails else "cancelled"}
                more = {"ok": fails} if kind is m.Complete else {}
                ferry.carry_out("sender", ferry.sender.on_message("rank0", kind(**fields, **more, cause="")))
            assert t.status is end
            assert 1 not in ferry.receiver.rooms
        ferry.assert_clean()
        assert (ferry.ended["rank0", xfer] is None) == (not fails)
        assert (ferry.ended["sender", serial] is None) == (not fails)


def test_defect_24_the_last_ranks_answer_alone_decides_for_all() -> None:
    """The defect: "Whether the transfer is complete is decided by the last rank's answer alone; another rank
    is cut short and reported as a success." COMMIT needs every rank's own vote that all its rows are here
    (TP-3)."""
    for short in (0, 1, 2):
        ferry = Ferry(pool=8, window=2, ranks=3, optimistic=False)
        serial = ferry.send(1, 4)
        xfers = {rank: ferry.receive(1, rank) for rank in ferry.receivers}
        slow = f"rank{short}"
        held: list[m.Message] = []
        ferry.drop = lambda to, x, slow=slow, held=held: to == slow and isinstance(x, m.Done) and not held.append(x)
        ferry.deliver()
        for _ in range(5):
            ferry.resend()
        others = [rank for rank in ferry.receivers if rank != slow]
        if short:
            assert all(ferry.receivers[rank].transfers[xfers[rank]].phase is Phase.VOTED for rank in others)
        assert not said(ferry, m.Commit)
        assert not ferry.ended
        ferry.drop = lambda to, x: False
        for _ in range(5):
            ferry.resend()
        for rank, xfer in xfers.items():
            delivered(ferry, serial, xfer, 4, rank)
        ferry.assert_clean()


def test_defect_25_ranks_agree_by_the_maximum_of_what_each_has_received() -> None:
    """The defect: "Ranks agree by taking the maximum of what each has received, so those that got less skip
    tokens; and the agreement is a collective." Each rank has its own grants and its own truth; no message
    between them has a count."""
    assert not {"total", "prefix", "epoch", "runs"} & {*m.Query.__struct_fields__, *m.Verdict.__struct_fields__}
    ferry = Ferry(pool=4, window=1, ranks=3, optimistic=False)
    serial = ferry.send(1, 9)
    xfers = {rank: ferry.receive(1, rank) for rank in ferry.receivers}
    turn = [0]

    def uneven(to: str, message: m.Message) -> bool:
        """rank1 gets every second Done, rank2 none until the others are through."""
        turn[0] += 1
        return isinstance(message, m.Done) and (
            (to == "rank1" and turn[0] % 2 == 0) or (to == "rank2" and turn[0] < 150)
        )

    ferry.drop = uneven
    for _ in range(40):
        ferry.resend()
        states = {rank: ferry.receivers[rank].transfers.get(xfer) for rank, xfer in xfers.items()}
        for rank, t in states.items():  # what a rank counts is what that rank has
            if t is not None:
                assert set(ferry.rows.get((rank, t.xfer), {})) == set(t.have)
    for rank, xfer in xfers.items():
        delivered(ferry, serial, xfer, 9, rank)
    ferry.assert_clean()


def test_defect_26_the_sender_trusts_the_receivers_offset() -> None:
    """The defect: "The sender trusts the receiver's offset without checking it against its own." It has no
    offset: positions come from grants, which are checked against the length, the pool and what was posted
    before (WM-3)."""
    ferry = Ferry(pool=4, window=2, optimistic=False)
    ferry.hold_writes = True
    serial, xfer = ferry.send(1, 4), ferry.receive(1)
    ferry.deliver()
    (slot,) = ferry.sender.slots.values()
    epoch = slot.bindings[0].epoch

    def grant(prefix: int, *runs: tuple[int, int, int, int]) -> list[Any]:
        message = m.Grant(src=10, dst=1000, min_live=1, xfer=xfer, epoch=epoch, prefix=prefix, runs=m.pack_grant(runs))
        return ferry.sender.on_message("rank0", message)

    before = len(ferry.sender.writes)
    for effects in (
        grant(0, (4, 2, 1, 1)),  # behind the end
        grant(0, (1 << 31, 2, 1, 1)),
        grant(0, (0, 2, 2, 1)),  # posted already, and into other blocks
        grant(3, (0, 2, 2, 1)),
        grant(1 << 31),  # "I have everything"
        grant(0, (2, 4, 1, 1)),  # outside the pool
        grant(0, (2, 3, 2, 1)),
    ):
        assert not [effect for effect in effects if hasattr(effect, "runs")]
    assert len(ferry.sender.writes) == before
    finish(ferry)
    delivered(ferry, serial, xfer, 4)


def test_defect_27_one_lost_message_hangs_both_sides_for_ever() -> None:
    """The defect: "One lost message hangs both sides for ever." Whatever is true is said again (MSG-2): each
    message of a whole transfer is lost in its turn, alone and with all behind it for a while."""
    for options in ({"first_grant": 2, "window": 2}, {"window": "rounds", "first_grant": 1, "ranks": 2}):
        for tail in (1, 5):
            n = lost = 0
            while lost == n:
                ferry = Ferry(pool=3, **options)
                count = [0]

                def drop(to: str, message: m.Message, count: list[int] = count, n: int = n, tail: int = tail) -> bool:
                    count[0] += 1
                    return n < count[0] <= n + tail

                ferry.drop = drop
                serial = ferry.send(1, 5)
                xfers = {rank: ferry.receive(1, rank) for rank in ferry.receivers}
                for _ in range(12):
                    ferry.resend()
                for rank, xfer in xfers.items():
                    delivered(ferry, serial, xfer, 5, rank)
                ferry.assert_clean()
                lost += count[0] > n
                n += 1
            assert n > 15


# ================================================================ threads and failure


class Spoilt:
    """An effect that fails, unless it has a list to stand in."""

    def __init__(self, carried: list[object] | None) -> None:
        self.carried = carried

    def run(self) -> None:
        if self.carried is None:
            raise ZeroDivisionError("a defect over one effect")
        self.carried.append(self)


def test_defect_28_an_exception_over_one_request_ends_the_worker_that_serves_all() -> None:
    """The defect: "An exception over one request ends the worker that serves all of them." What a message, a
    command or an effect raises ends the transfer that it is about; the thread, and the effects behind it, go
    on."""
    with Quay(block_size=16, pool_blocks=8, first_grant=32) as quay:
        for end in (quay.sender, quay.receiver):
            on_message, carry_out = end.machine.on_message, end._carry_out

            def spoilt(route: str, message: Any, on_message: Any = on_message) -> Any:
                if isinstance(message, m.Grant | m.Done) and message.xfer == 1:
                    raise ZeroDivisionError("a defect over one room")
                return on_message(route, message)

            end.machine.on_message = spoilt  # type: ignore[method-assign]
            bad, good = rows(100, 1), rows(100, 2)
            quay.sender.send(1, **bad)
            quay.sender.send(2, **good)
            one, two = quay.receive(1), quay.receive(2)
            assert_same(two.result(PATIENCE), good)
            if one._xfer == 1:
                with pytest.raises(FerryError):
                    one.wait(PATIENCE)
            assert end._thread.is_alive()
            end.machine.on_message = on_message  # type: ignore[method-assign]

            carried: list[object] = []
            end._carry_out = lambda x, real=carry_out: x.run() if isinstance(x, Spoilt) else real(x)  # type: ignore[method-assign]
            batch = [Spoilt(carried), Spoilt(None), Spoilt(carried)]
            with pytest.raises(ZeroDivisionError):
                end._call(lambda end=end, batch=batch: end._do(batch))
            assert len(carried) == 2
            end._carry_out = carry_out  # type: ignore[method-assign]
            eventually(lambda end=end: not books(end))
        quay.carry(100, room=3)
    deadlines = {"announce_deadline": 0.4, "transfer_deadline": 0.4}
    with Quay(block_size=16, pool_blocks=8, **deadlines) as quay:  # and so it is with what timers do
        one, two = quay.receive(1), quay.receive(2)
        three, four = quay.sender.announce(3, 5), quay.sender.announce(4, 5)
        for end, room in ((quay.sender, 3), (quay.receiver, 1)):
            machine, resend = end.machine, end.machine.resend

            def fails(key: int, machine: Any = machine, resend: Any = resend, room: int = room) -> Any:
                known = machine.slots if hasattr(machine, "slots") else machine.transfers
                return resend(key) if known[key].room != room else 1 / 0

            machine.resend = fails  # type: ignore[method-assign]
        for transfer, error in (
            (one, InternalError),
            (two, e.DeadlineExceeded),
            (three, InternalError),
            (four, FerryError),
        ):
            with pytest.raises(error):
                transfer.wait(PATIENCE)
        for end in (quay.sender, quay.receiver):
            del end.machine.resend


def test_defect_29_one_malformed_message_ends_the_control_thread() -> None:
    """The defect: "One malformed message ends the control thread." What does not decode is counted and
    dropped; what decodes and makes no sense changes nothing."""
    with ExitStack() as stack:
        quay = stack.enter_context(Quay(block_size=16, pool_blocks=4, ranks=2))
        address = quay.sender.address, quay.receivers[0].leader_address
        context = stack.enter_context(zmq.Context())
        good = encode(m.Ping(src=1, dst=2))
        nonsense = [encode(m.Revoke(src=1, dst=quay.sender.incarnation, min_live=9, xfer=9, upto=9)), good]
        nonsense += [encode(msgspec.structs.replace(hello(5, "x", pool=4, slabs=1), generations=b"tor"))]
        for to in address:
            stranger = context.socket(zmq.DEALER)
            stranger.setsockopt(zmq.LINGER, 0)
            stack.callback(stranger.close)
            stranger.connect(to)
            for frame in (b"", b"\0" * 12, good[:-1], good[:8] + b"\0\0\0\0" + good[12:], b"x" * 5000, *nonsense):
                stranger.send(frame)
            stranger.send_multipart([b"a", b"b", b"c"])
            host, port = to.removeprefix("tcp://").split(":")
            with socket.create_connection((host, int(port))) as raw:  # not even ZMQ
                raw.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
        for end in (quay.sender, quay.receivers[0]):
            eventually(lambda end=end: end._control.dropped["parts"] == 1)
            garbage = {reason: n for reason, n in end._control.dropped.items() if reason != "identity"}
            assert garbage == {"size": 1, "magic": 2, "checksum": 2, "parts": 1}
            assert end._thread.is_alive()
        given = rows(50)
        quay.sender.send(1, **given)
        transfers = [quay.receive(1, rank) for rank in (0, 1)]
        for transfer in transfers:
            assert_same(transfer.result(PATIENCE), given)


def test_defect_30_a_control_thread_starts_before_the_tables_that_it_uses_exist(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The defect: "A control thread starts before the tables that it uses exist." Starting the thread is the
    last thing that an endpoint's constructor does: no attribute appears after it."""
    there: dict[int, set[str]] = {}
    start = threading.Thread.start

    def starting(thread: threading.Thread) -> None:
        owner = getattr(getattr(thread, "_target", None), "__self__", None)
        if isinstance(owner, endpoint_module.Endpoint):
            there[id(owner)] = set(vars(owner))
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", starting)
    with Quay(block_size=16, pool_blocks=4, ranks=2) as quay:
        assert len(there) == 3
        for end in quay.ends:
            assert set(vars(end)) == there[id(end)]
            assert {"machine", "_transfers", "_control"} <= there[id(end)]


def test_defect_31_sockets_are_shared_between_threads_without_a_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The defect: "Sockets are shared between threads without a lock." One thread of each endpoint sends,
    receives, connects and closes; all others can only wake it."""
    users: dict[int, set[int]] = {}
    public = [name for name, _ in inspect.getmembers(Control, inspect.isfunction) if name[0] != "_" and name != "wake"]
    assert {"send", "receive", "connect", "disconnect", "trouble", "close"} == set(public)

    def watched(name: str) -> Any:
        real = getattr(Control, name)

        def call(self: Control, *arguments: Any) -> Any:
            users.setdefault(id(self), set()).add(threading.get_ident())
            return real(self, *arguments)

        return call

    with Quay(block_size=16, pool_blocks=8, layout=SMALL) as quay:
        for name in public:
            monkeypatch.setattr(Control, name, watched(name))
        problems: list[BaseException] = []

        def work(first: int) -> None:
            try:
                for room in range(first, first + 5):
                    given = rows(20, room, SMALL)
                    sending = quay.sender.send(room, **given)
                    receiving = quay.receive(room)
                    quay.receiver.poll()
                    if room % 2:
                        receiving.cancel()
                    else:
                        assert_same(receiving.result(PATIENCE), given)
                        sending.wait(PATIENCE)
            except BaseException as problem:  # noqa: BLE001 - shown below
                problems.append(problem)

        threads = [threading.Thread(target=work, args=(100 * k,)) for k in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not problems
        expected = {id(end._control): {end._thread.ident} for end in quay.ends}
    assert users == expected


def test_defect_32_the_first_failure_blacklists_a_peer_for_good() -> None:
    """The defect: "The first failure blacklists a peer for good; a peer that restarts is never registered
    again." Failure is of a transfer; who answers at an address is welcome, and a newer incarnation replaces
    the old one."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{reserved.getsockname()[1]}"
    with Quay(block_size=16, pool_blocks=4, peer_timeout=0.3, heartbeat=0.1, clean=False) as quay:
        with pytest.raises(e.PeerUnreachable):
            quay.receiver.receive(1, address).wait(PATIENCE)
        for life in range(3):  # nobody there, then there, then another, then another
            sender = quay.add_sender(bind=address)
            for room in (1, 2):
                given = rows(40, 10 * life + room)
                sender.send(room, **given)
                assert_same(quay.receiver.receive(room, address).result(PATIENCE), given)
            (quay.crash if life else lambda end: end.close())(sender)
            if life == 1:
                with pytest.raises(FerryError):
                    quay.receiver.receive(7, address).wait(PATIENCE)
        assert_clean(quay.receiver)


@pytest.fixture
def sides() -> Iterator[list[Side]]:
    started: list[Side] = []
    yield started
    for side in started:
        side.end()


@pytest.mark.parametrize("who", ["sender", "receiver"])
def test_defect_33_a_peer_that_hangs_is_never_noticed(sides: list[Side], who: str) -> None:
    """The defect: "A peer that hangs (alive, not answering) is never noticed." Whoever waits sends heartbeats
    and gives up after peer_timeout of silence; its blocks stay in quarantine until a proof."""
    import signal

    quick = {"peer_timeout": 0.5, "heartbeat": 0.1, "block_size": 16, "pool_blocks": 4}
    settings = {"transport": "shm", "layout": SMALL, **quick}
    side = Side(who, **quick)
    sides.append(side)
    given = rows(200, 3, SMALL)
    if who == "sender":
        address = side.address
        side.ask("announce", room=1, total=200, ready=32, seed=3)
        with tf.Receiver(**settings) as receiver:
            transfer = receiver.receive(1, address)
            eventually(lambda: transfer.sent_tokens == 32)
            side.signal(signal.SIGSTOP)
            with pytest.raises(e.PeerLost):
                transfer.wait(PATIENCE)
            side.signal(signal.SIGCONT)
            eventually(lambda: receiver.free_blocks == 4)
    else:
        with tf.Sender(**settings) as sender:
            sending = sender.announce(1, 200)
            sending.put(0, **{name: tensor[:32] for name, tensor in given.items()})
            side.ask("receive", room=1, sender=sender.address)
            side.ask("sent_tokens", room=1, least=32)
            side.signal(signal.SIGSTOP)
            with pytest.raises(e.PeerLost):
                sending.wait(PATIENCE)
            eventually(lambda: not books(sender))


def test_every_defect_has_its_test() -> None:
    numbers = sorted(name[12:14] for name in globals() if name.startswith("test_defect_"))
    assert numbers == [f"{n:02}" for n in range(1, 34)]
