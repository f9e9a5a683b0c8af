"""Messages may be lost, doubled, late, reordered, foreign or hostile (MSG-1 to MSG-5, ID-2, ID-3): on the machines."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import msgspec
import pytest
from ferry import SENDER, Ferry, hello
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_wire import KINDS, messages

from tensorferry.core import effects as fx
from tensorferry.core import errors as e
from tensorferry.core import messages as m
from tensorferry.core.sender_state import MOST_TOMBSTONES

SEEDS = st.randoms(use_true_random=False)

SHAPES: dict[str, dict[str, Any]] = {
    "loans": {"pool": 3, "first_grant": 2, "window": 2},
    "announced": {"pool": 3, "window": 2, "optimistic": False},
    "rounds": {"pool": 4, "slabs": 2, "first_grant": 2, "window": "rounds", "budget": 1},
    "one block": {"pool": 1, "first_grant": 1, "window": 1},
    "two ranks": {"pool": 3, "first_grant": 2, "window": 2, "ranks": 2},
}


class Sea(Ferry):
    """A network that keeps every message for ever and delivers any of them at any time, any number of times; writes
    land late or in another order. What must hold in every state is checked after every step."""

    def __init__(self, chance: Random, **options: Any) -> None:
        super().__init__(**options)
        self.chance = chance
        self.ever: list[tuple[str, str, m.Message]] = []
        self.marks: dict[tuple[str, int], int] = {}
        self.seen: dict[tuple[str, int], str] = {}

    def carry_out(self, who: str, effects: list[fx.Effect]) -> None:
        super().carry_out(who, effects)
        self.ever.extend(self.queue)
        self.queue.clear()

    def turn(self) -> None:
        if self.writes and self.chance.random() < 0.3:
            k = self.chance.randrange(len(self.writes))
            write = self.writes[k]
            del self.writes[k]
            self.outcome(*write)
        elif self.ever:
            self.queue.append(self.chance.choice(self.ever[-self.chance.choice((1, 3, 10, 10_000)) :]))
            self.step()
        self.check()

    def outcome(self, write: fx.PostWrite, index: int, block: int) -> None:
        self.land(write, index, block)

    def check(self) -> None:
        for name, r in self.receivers.items():
            r.pool.audit()
            for t in r.transfers.values():
                assert r.sent_tokens(t) >= self.marks.get((name, t.xfer), 0)  # WM-1
                self.marks[name, t.xfer] = r.sent_tokens(t)
                order = ["BOOTSTRAPPING", "WAITING_FOR_INPUT", "TRANSFERRING", "SUCCESS", "FAILED"]
                assert order.index(t.status) >= order.index(self.seen.get((name, t.xfer), "BOOTSTRAPPING"))
                self.seen[name, t.xfer] = t.status
        for write, index, block in self.writes:  # WS-6: no write can land in a block that is free or another's
            r = self.receivers[write.route]
            tenant = r.pool.granted.get(block) or r.pool.quarantined.get(block)
            assert tenant is not None, f"a write to block {block} is out and the block is free"
            assert (tenant.xfer, tenant.sender, tenant.epoch, tenant.at) == (
                *write.write[1:2],
                1000,
                write.write[2],
                index,
            )

    def deadlines(self) -> None:
        for slot in list(self.sender.slots.values()):
            if slot.offer is not None:
                self.carry_out("sender", self.sender.cancel(slot.offer.serial, e.DeadlineExceeded("too late")))
            self.carry_out("sender", self.sender.force_end(slot.id))
        for name, r in self.receivers.items():
            for xfer in list(r.transfers):
                self.carry_out(name, r.fail(xfer, e.DeadlineExceeded("too late")))

    def calm(self, *, deadlines: bool = False) -> None:
        """From now on the network is a good one: every message that was lost is lost, and things are said again."""
        self.ever.clear()
        for turn in range(60):
            if deadlines and turn > 20:  # who never met has nobody to hear of a cancel from
                self.deadlines()
            for name, r in self.receivers.items():
                for xfer in list(r.transfers):
                    self.carry_out(name, r.resend(xfer))
            for slot in list(self.sender.slots):
                self.carry_out("sender", self.sender.resend(slot))
            while self.ever or self.writes:
                if self.ever:
                    self.queue.append(self.ever.pop(0))
                    self.step()
                else:
                    self.land(*self.writes.popleft())
                self.check()
            if not self.sender.slots and not any(r.transfers for r in self.receivers.values()):
                return
        raise AssertionError("it does not end")


def voyage(chance: Random, shape: str, lengths: list[int], turns: int) -> Sea:
    """Rooms of these lengths, opened and offered at some time."""
    sea = Sea(chance, **SHAPES[shape])
    begin: list[Callable[[], object]] = []
    for room, total in enumerate(lengths):
        begin.append(lambda room=room, total=total: sea.send(room, total))
        begin += [lambda room=room, rank=rank: sea.receive(room, rank) for rank in sea.receivers]
    chance.shuffle(begin)
    for _ in range(turns):
        if begin and chance.random() < 0.3:
            begin.pop()()
        sea.turn()
    while begin:
        begin.pop()()
    return sea


def assert_all_delivered(sea: Sea, lengths: list[int]) -> None:
    serials = {key for who, key in sea.ended if who == "sender"}
    assert len(serials) == len(lengths)
    assert set(sea.ended.values()) == {None}
    assert len(sea.ended) == len(lengths) * (1 + sea.ranks)
    got = sorted(tuple(sorted(rows.items())) for rows in sea.rows.values())
    for rows in got:
        assert [index for index, _ in rows] == list(range(len(rows)))
        assert len({serial for _, (serial, _) in rows}) == 1
    assert sorted(map(len, got)) == sorted(n for n in lengths for _ in range(sea.ranks) if n)
    sea.assert_clean()


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=40)
@given(chance=SEEDS, lengths=st.lists(st.integers(0, 6), min_size=1, max_size=3), turns=st.integers(0, 150))
def test_msg_1_any_order_any_number_of_times_delivers_the_same(
    shape: str, chance: Random, lengths: list[int], turns: int
) -> None:
    sea = voyage(chance, shape, lengths, turns)
    sea.calm()
    assert_all_delivered(sea, lengths)


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=25)
@given(chance=SEEDS, lengths=st.lists(st.integers(0, 6), min_size=1, max_size=3))
def test_msg_1_a_transcript_replayed_after_the_end_changes_nothing(
    shape: str, chance: Random, lengths: list[int]
) -> None:
    sea = voyage(chance, shape, lengths, 50)
    everything: list[tuple[str, str, m.Message]] = []
    keep = sea.carry_out

    def recording(who: str, effects: list[fx.Effect]) -> None:
        keep(who, effects)
        everything.extend(x for x in sea.ever if x not in everything)

    everything.extend(sea.ever)
    sea.carry_out = recording  # type: ignore[method-assign]
    sea.calm()
    assert_all_delivered(sea, lengths)

    def state() -> object:
        return sea.sender.snapshot(), [r.snapshot() for r in sea.receivers.values()]

    def replay() -> None:
        for item in chance.choices(everything, k=2 * len(everything)) + chance.sample(everything, len(everything)):
            sea.queue.append(item)
            sea.step()
            sea.check()
            while sea.ever:
                sea.queue.append(sea.ever.pop(0))
                sea.step()

    ended, released = dict(sea.ended), list(sea.released)
    replay()  # answers may tell a side that its tombstones are not needed any more: from then on, nothing at all
    assert (sea.ended, sea.released) == (ended, released)
    before = state()
    replay()
    assert state() == before
    assert (sea.ended, sea.released) == (ended, released)
    assert not sea.writes
    sea.assert_clean()


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=40)
@given(chance=SEEDS, lengths=st.lists(st.integers(0, 6), min_size=1, max_size=3), loss=st.floats(0.05, 0.9))
def test_msg_2_whatever_is_lost_is_said_again(shape: str, chance: Random, lengths: list[int], loss: float) -> None:
    ferry = Ferry(**SHAPES[shape])
    ferry.drop = lambda to, message: chance.random() < loss
    for room, total in enumerate(lengths):
        ferry.send(room, total)
        for rank in ferry.receivers:
            ferry.receive(room, rank)
    for _ in range(10):
        ferry.resend()
    ferry.drop = lambda to, message: False
    for _ in range(40):
        ferry.resend()
    assert set(ferry.ended.values()) == {None}
    assert len(ferry.ended) == len(lengths) * (1 + ferry.ranks)
    ferry.assert_clean()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_msg_2_no_kind_of_message_is_essential_once(kind: type[m.Message]) -> None:
    """The first of its kind is always lost."""
    for shape in SHAPES.values():
        ferry = Ferry(**shape)
        lost: list[m.Message] = []

        def drop(to: str, message: m.Message, lost: list[m.Message] = lost) -> bool:
            if isinstance(message, kind) and len(lost) < 2:
                lost.append(message)
                return True
            return False

        ferry.drop = drop
        for room, total in enumerate((5, 0, 3)):
            ferry.send(room, total)
            for rank in ferry.receivers:
                ferry.receive(room, rank)
        for _ in range(20):
            ferry.resend()
        assert set(ferry.ended.values()) == {None}
        ferry.assert_clean()


class Storm(Sea):
    """Writes fail, have unknown outcomes, or land spoilt."""

    calmed = False

    def outcome(self, write: fx.PostWrite, index: int, block: int) -> None:
        dice = self.chance.random()
        if dice < 0.6:
            self.land(write, index, block)
        elif dice < 0.7:
            self.carry_out("sender", self.sender.write_failed(write.write, {index}, e.TransportError("no")))
        elif dice < 0.8:
            self.memory[write.route, block] = (write.serial, -1)
            self.carry_out("sender", self.sender.write_done(write.write, {index: index}))
        elif dice < 0.9:
            self.carry_out("sender", self.sender.write_unknown(write.write, e.UnknownInFlight("?")))
            self.writes.append((write, index, block))  # may land, and is drained then
        else:
            self.carry_out("sender", self.sender.write_drained(write.write, {index}))
            if self.chance.random() < 0.5:
                self.carry_out("sender", self.sender.write_unknown(write.write, e.UnknownInFlight("?")))

    def turn(self) -> None:
        for name, r in self.receivers.items():
            for xfer in list(r.transfers):
                dice = self.chance.random()
                if dice < 0.01:
                    self.carry_out(name, r.suspect(xfer, e.TransportError("suspicion")))
                elif dice < 0.02:
                    self.carry_out(name, r.resend(xfer))
        super().turn()


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow], phases=[Phase.generate])
@given(chance=SEEDS, lengths=st.lists(st.integers(0, 5), min_size=1, max_size=3), cancel=st.booleans())
def test_failing_writes_in_a_bad_network_end_delivered_or_cancelled(
    shape: str, chance: Random, lengths: list[int], cancel: bool
) -> None:
    """LV-1, LV-2, WS-6: faults stop, and every transfer ends with nothing left; what was delivered is right."""
    sea = Storm(chance, **{**SHAPES[shape], "max_bumps": 10_000})
    for room, total in enumerate(lengths):
        sea.send(room, total)
        for rank in sea.receivers:
            sea.receive(room, rank)
    for _ in range(150):
        sea.turn()
        if cancel and chance.random() < 0.01:
            name, r = chance.choice(list(sea.receivers.items()))
            for xfer in list(r.transfers)[:1]:
                sea.carry_out(name, r.cancel(xfer, e.Cancelled("enough")))
    # A drained index whose outcome nobody told is granted again only in a new epoch: suspicion is what starts it.
    for _ in range(3):
        for name, r in sea.receivers.items():
            for xfer, t in list(r.transfers.items()):
                if t.out:
                    sea.carry_out(name, r.suspect(xfer, e.TransportError("suspicion")))
    sea.calm(deadlines=cancel)
    sea.assert_clean()
    for (who, xfer), rows in sea.rows.items():
        assert who != "sender"
        assert sea.ended[who, xfer] is None
        assert [index for index, _ in sorted(rows.items())] == list(range(len(rows)))
        assert all(found == index for index, (_, found) in rows.items())
        assert len({serial for serial, _ in rows.values()}) == 1
    if not cancel:
        assert set(sea.ended.values()) == {None}


# ---------------------------------------------------------------- MSG-3: looking changes nothing


def test_msg_3_looking_any_number_of_times_changes_nothing() -> None:
    ferry = Ferry(**SHAPES["loans"])
    xfer = ferry.receive(1)
    ferry.send(1, 5)
    t = ferry.receiver.transfers[xfer]
    going = True
    while going:
        before = ferry.sender.snapshot(), ferry.receiver.snapshot()
        for _ in range(20):
            assert t.status is t.status
            ferry.receiver.sent_tokens(t)
            assert ferry.receiver.min_live in (xfer, ferry.receiver.next_xfer)
            t.log.finished(1, 5)
            assert ferry.receiver.pool.free_count >= ferry.receiver.pool.grantable
        assert (ferry.sender.snapshot(), ferry.receiver.snapshot()) == before
        going = ferry.step()
    assert ferry.ended["rank0", xfer] is None


# ---------------------------------------------------------------- late, foreign and hostile messages


def halfway(**options: Any) -> tuple[Ferry, int]:
    """A transfer of 6 blocks in the middle, one finished before it."""
    ferry = Ferry(**{"pool": 3, "window": 2, "optimistic": False, **options})
    ferry.send(1, 1)
    ferry.receive(1)
    ferry.deliver()
    ferry.resend()
    ferry.send(2, 6)
    xfer = ferry.receive(2)
    while ferry.receiver.transfers[xfer].have.prefix < 2:
        ferry.step()
    ferry.hold_writes = True
    ferry.deliver()
    return ferry, xfer


FOREIGN = st.sampled_from(KINDS).flatmap(messages)


@settings(max_examples=300)
@given(FOREIGN, st.sampled_from([SENDER, "rank0", "somebody"]))
def test_a_foreign_message_changes_neither_machine(message: m.Message, route: str) -> None:
    """ID-2, ID-3, MSG-4: incarnations that are not ours, or transfers that never were. A sender keeps, by design,
    two things of strangers, both bounded: that a receiver introduced itself, and tombstones (L4)."""
    ferry, _ = halfway()
    for machine, own in ((ferry.receiver, 10), (ferry.sender, 1000)):
        before = machine.snapshot()
        for dst in (message.dst, own):
            if message.src in (10, 1000):
                continue
            foreign = msgspec.structs.replace(message, dst=dst)
            if isinstance(foreign, m.Hello) and dst in (0, own):
                continue
            effects = machine.on_message(route, foreign)
            assert all(isinstance(effect, fx.Send) for effect in effects)
            assert machine.snapshot() == before
    ferry.hold_writes = False
    ferry.deliver()
    ferry.resend()
    ferry.assert_clean()


@settings(max_examples=300)
@given(FOREIGN, st.integers(100, 10_000))
def test_a_transfer_that_never_was_leaves_at_most_a_tombstone(message: m.Message, xfer: int) -> None:
    """The peer is the right one, the transfer is not: nothing is granted, written, gathered or ended."""
    ferry, _ = halfway()
    if isinstance(message, m.Hello | m.Query | m.Verdict):
        return
    changes: dict[str, Any] = {"xfer": xfer} if hasattr(message, "xfer") else {}
    if isinstance(message, m.FromReceiver):
        changes["min_live"] = 1
    to_receiver = msgspec.structs.replace(message, src=1000, dst=10, **changes)
    to_sender = msgspec.structs.replace(message, src=10, dst=1000, **changes)
    before = ferry.receiver.snapshot()
    effects = ferry.receiver.on_message(SENDER, to_receiver)
    assert all(isinstance(effect, fx.Send) for effect in effects)
    assert ferry.receiver.snapshot() == before
    slots, writes = dict(ferry.sender.slots), dict(ferry.sender.writes)
    before = ferry.sender.snapshot()
    effects = ferry.sender.on_message("rank0", to_sender)
    assert all(isinstance(effect, fx.Send) for effect in effects)
    if isinstance(message, m.Open):
        return  # a room that is wanted before it is offered: that is what Open is for
    assert (ferry.sender.slots, ferry.sender.writes) == (slots, writes)
    receiver = ferry.sender.receivers[10]
    if isinstance(message, m.Close):
        assert xfer in receiver.closed
    elif isinstance(message, m.Revoke):
        assert receiver.revoked == {xfer: message.upto}
    else:
        assert ferry.sender.snapshot() == before


@pytest.mark.parametrize("late", [m.Open, m.Grant, m.Revoke, m.Complete, m.Admitted, m.Close])
@pytest.mark.parametrize("told", [False, True])
def test_late_messages_of_a_closed_transfer_create_no_state_and_post_no_write(
    late: type[m.ToSender], told: bool
) -> None:
    """ID-3, R1: with `told`, min_live has passed it and its tombstone is gone; without, the tombstone answers."""
    ferry = Ferry(pool=3, window=2, optimistic=False)
    old_serial = ferry.send(1, 2)
    xfer = ferry.receive(1)
    ferry.deliver()
    if told:
        ferry.send(5, 1)
        ferry.receive(5)
        ferry.deliver()
        assert xfer not in ferry.sender.receivers[10].closed
        assert ferry.sender.receivers[10].min_live > xfer
    else:
        assert xfer in ferry.sender.receivers[10].closed
    offered = ferry.send(1, 2)  # the room's next use waits for its receiver
    fields = dict.fromkeys(late.__struct_fields__, 0) | {
        "src": 10, "dst": 1000, "min_live": 1, "xfer": xfer, "room": 1, "ranks": 1, "dummy": False, "ok": True,
        "code": "", "cause": "", "runs": m.pack_grant([(0, 0, 2, 1)]), "epoch": 1, "upto": 1,
    }  # fmt: skip
    message = late(**{name: fields[name] for name in late.__struct_fields__})
    before = ferry.sender.snapshot()
    for _ in range(3):
        effects = ferry.sender.on_message("rank0", message)
        assert all(isinstance(effect, fx.Send) for effect in effects)
    assert ferry.sender.snapshot() == before
    assert not ferry.writes
    assert ("sender", offered) not in ferry.ended
    again = ferry.receive(1)
    ferry.deliver()
    ferry.resend()
    assert ferry.ended["rank0", again] is ferry.ended["sender", offered] is None
    assert ferry.released == sorted({old_serial, *ferry.released})


def test_tombstones_go_with_min_live() -> None:
    """Defect 8 at the sender: after any number of rooms nothing of them is left."""
    ferry = Ferry(pool=3)
    for room in range(50):
        ferry.send(room, 2)
        ferry.receive(room)
        ferry.deliver()
        ferry.resend()
    receiver = ferry.sender.receivers[10]
    assert receiver.min_live == 50
    assert list(receiver.closed) == [50]
    assert not receiver.revoked
    ferry.assert_clean()


def test_tombstones_are_bounded() -> None:
    ferry = Ferry(pool=3)
    ferry.send(1, 1)
    ferry.receive(1)
    ferry.deliver()
    most = ferry.sender.policy.max_rooms
    for xfer in range(100, 100 + 2 * (most + 10), 2):
        common = {"src": 10, "dst": 1000, "min_live": 1, "xfer": xfer}
        ferry.sender.on_message("rank0", m.Revoke(**common, upto=1))
    receiver = ferry.sender.receivers[10]
    assert len(receiver.revoked) <= most
    for xfer in range(100_000, 100_000 + 2 * (MOST_TOMBSTONES + 10), 2):
        common = {"src": 10, "dst": 1000, "min_live": 1, "xfer": xfer}
        ferry.sender.on_message("rank0", m.Close(**common, code="", cause=""))
    assert receiver.closed.pieces == MOST_TOMBSTONES


def test_grants_of_a_hostile_receiver_are_bounded() -> None:
    """MSG-5: before the length is known a grant is kept for later; no peer makes us keep more than its own pool."""
    ferry = Ferry(pool=3, first_grant=2)
    ferry.receive(1)
    ferry.deliver()
    (slot,) = ferry.sender.slots.values()
    for first in range(0, 3000, 3):
        grant = m.Grant(
            src=10, dst=1000, min_live=1, xfer=1, epoch=1, prefix=0, runs=m.pack_grant([(first, 0, 3, 1)] * 2)
        )  # fmt: skip
        ferry.sender.on_message("rank0", grant)
    assert len(slot.bindings[0].pending) <= 3


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"generations": b"tor"}, id="torn generations"),
        pytest.param({"generations": m.pack_generations([1] * 2)}, id="too many generations"),
        pytest.param({"generations": b""}, id="no generations"),
        pytest.param({"pool_blocks": 0}, id="no pool"),
        pytest.param({"slabs": 0, "generations": b""}, id="no slabs"),
        pytest.param({"slabs": 4, "generations": m.pack_generations([1] * 4)}, id="more slabs than blocks"),
        pytest.param({"pool_blocks": (1 << 32) - 1}, id="an absurd pool"),
        pytest.param({"version": 2}, id="another version"),
        pytest.param({"layout": b"x" * 16}, id="another layout"),
        pytest.param({"block_size": 7}, id="another block size"),
    ],
)
def test_a_hello_that_cannot_be_served_creates_no_state(change: dict[str, Any]) -> None:
    ferry = Ferry(pool=3)
    good = ferry.receiver.hello
    before = ferry.sender.snapshot()
    effects = ferry.sender.on_message("rank0", msgspec.structs.replace(good, **change))
    assert [type(effect) for effect in effects] == [fx.Send]  # our Hello: that side says what is wrong
    assert ferry.sender.snapshot() == before
    assert ferry.sender.refused
    ferry.carry_out("sender", ferry.sender.on_message("rank0", good))
    assert 10 in ferry.sender.receivers


def test_an_older_incarnation_is_not_heard_again() -> None:
    ferry = Ferry(pool=3)
    ferry.add_receiver("rank0", 20)
    new = ferry.receiver.hello
    ferry.carry_out("sender", ferry.sender.on_message("rank0", new))
    before = ferry.sender.snapshot()
    assert ferry.sender.on_message("rank0", msgspec.structs.replace(new, src=10)) == []
    assert ferry.sender.snapshot() == before
    ferry.receive(1)
    ferry.deliver()
    before = ferry.receiver.snapshot()
    assert ferry.receiver.on_message(SENDER, msgspec.structs.replace(ferry.sender.hello, src=900, dst=20)) == []
    assert ferry.receiver.snapshot() == before


# ---------------------------------------------------------------- strangers


def stranger(number: int, **change: Any) -> m.Hello:
    made = hello(5000 + number, f"stranger {number}", pool=3, slabs=1)
    return msgspec.structs.replace(made, **change)


def test_only_the_sender_itself_speaks_for_a_transfer() -> None:
    """Whoever connects to a leader's port can write any incarnation into a message; the route tells who it is."""
    ferry = Ferry(pool=3)
    ferry.hold_writes = True
    serial, xfer = ferry.send(1, 2), ferry.receive(1)
    ferry.deliver()
    ferry.carry_out("rank0", ferry.receiver.cancel(xfer, e.Cancelled("enough")))
    held = ferry.receiver.pool.free_count
    about = {"src": 1000, "dst": 10, "xfer": xfer}
    abort = m.Abort(**about, code="x", cause="x")
    for forged in (m.Fenced(**about, upto=9), abort, m.Closed(**about), m.Commit(**about)):
        assert not ferry.receiver.on_message("00a1", forged)
    assert ferry.receiver.pool.free_count == held < 3
    assert ferry.receiver.ignored["not from its sender"] == 4
    ferry.hold_writes = False
    ferry.deliver()
    assert isinstance(ferry.ended["sender", serial], e.Cancelled)
    ferry.assert_clean()


def test_strangers_do_not_keep_receivers_away() -> None:
    ferry = Ferry(pool=3)
    ferry.send(1, 2)
    ferry.receive(1)
    ferry.hold_writes = True
    ferry.deliver()
    most = ferry.sender.policy.max_peers
    for number in range(most + 10):
        ferry.sender.on_message(f"{number:04x}", stranger(number))
    assert len(ferry.sender.receivers) == most
    assert 10 in ferry.sender.receivers  # who is being served is not forgotten
    ferry.hold_writes = False
    ferry.deliver()
    ferry.assert_clean()
    assert 10 in ferry.sender.receivers  # those of no use go first
    for number in range(most, 3 * most):
        ferry.sender.on_message(f"{number:04x}", stranger(number))
        ferry.sender.connected(5000 + number, None)
    assert 10 not in ferry.sender.receivers  # who has nothing here may be
    serial, xfer = ferry.send(2, 3), ferry.receive(2)  # and introduces itself again
    ferry.deliver()
    ferry.resend()
    ferry.deliver()
    assert ferry.ended["sender", serial] is ferry.ended["rank0", xfer] is None


def test_of_offers_that_are_of_no_use_only_the_name_is_kept() -> None:
    ferry = Ferry(pool=3)
    offers = (m.Offer("acme", 1, "x", bytes(60_000), bytes(8)), m.Offer("fake", 1, "", b"d" * 100, bytes(8)))
    ferry.sender.on_message("0001", stranger(1, offers=offers))
    kept = {o.name: len(o.descriptor) for o in ferry.sender.receivers[5001].hello.offers}
    assert kept == {"acme": 0, "fake": 100}


def test_a_grant_costs_no_more_than_the_room_needs() -> None:
    ferry = Ferry(pool=3)
    ferry.send(1, 2)
    most = m.MAX_BLOCKS_IN_MESSAGE
    ferry.sender.on_message("0001", stranger(1, pool_blocks=most))
    ferry.sender.connected(5001, None)
    about = {"src": 5001, "dst": 1000, "min_live": 1, "xfer": 1}
    ferry.sender.on_message("0001", m.Open(**about, room=1, rank=0, ranks=1, dummy=False))
    binding = next(iter(ferry.sender.slots.values())).bindings[0]
    ferry.sender.receivers[5001].usable = False  # nothing is posted: what is granted stays pending
    ferry.sender.on_message("0001", m.Grant(**about, epoch=1, prefix=0, runs=m.pack_grant([(0, 0, most, 1)])))
    assert sorted(binding.pending) == [0, 1]


def test_a_sender_that_nothing_is_wanted_from_is_forgotten_and_can_be_met_again() -> None:
    ferry = Ferry(pool=3)
    ferry.send(1, 2)
    ferry.receive(1)
    assert not ferry.receiver.forget_peer(SENDER)
    ferry.deliver()
    assert ferry.receiver.forget_peer(SENDER)
    assert not ferry.receiver.forget_peer(SENDER)
    assert not ferry.receiver.peers
    serial, xfer = ferry.send(2, 3), ferry.receive(2)
    ferry.deliver()
    assert ferry.ended["sender", serial] is ferry.ended["rank0", xfer] is None


def test_a_question_without_a_pool_is_answered_and_nothing_is_kept() -> None:
    ferry = Ferry(pool=3)
    question = hello(77, "asking", layout=bytes(16))
    (answer,) = ferry.sender.on_message("0077", question)
    assert isinstance(answer, fx.Send)
    assert isinstance(answer.message, m.Hello)
    assert (answer.message.src, answer.message.dst) == (1000, 77)
    assert not ferry.sender.receivers
    assert not ferry.sender.refused


def test_grants_that_wait_are_bounded_for_each_receiver_whatever_the_number_of_rooms() -> None:
    """One run of 16 bytes for a room without an offer is as many entries as the peer says that its pool has blocks."""
    ferry = Ferry(pool=3)
    pool = 1000
    ferry.sender.on_message("0001", stranger(1, pool_blocks=pool))
    ferry.sender.connected(5001, None)
    for room in range(1, 11):
        about = {"src": 5001, "dst": 1000, "min_live": 1, "xfer": room}
        ferry.sender.on_message("0001", m.Open(**about, room=room, rank=0, ranks=1, dummy=False))
        ferry.sender.on_message("0001", m.Grant(**about, epoch=1, prefix=0, runs=m.pack_grant([(0, 0, pool, 1)])))

    def waiting() -> list[int]:
        return [len(b.pending) for slot in ferry.sender.slots.values() for b in slot.bindings.values()]

    assert waiting() == [pool, pool] + 8 * [0]
    assert ferry.sender.ignored["too many grants"] == 8
    first = {"src": 5001, "dst": 1000, "min_live": 1, "xfer": 1}
    ferry.sender.on_message("0001", m.Revoke(**first, upto=1))  # what is withdrawn makes room
    ferry.sender.on_message("0001", m.Grant(**about, epoch=1, prefix=0, runs=m.pack_grant([(0, 0, pool, 1)])))
    assert waiting() == [0, pool] + 7 * [0] + [pool]
    xfer, serial = ferry.receive(20), ferry.send(20, 2)  # and is nobody else's loss
    ferry.deliver()
    assert ferry.ended["sender", serial] is ferry.ended["rank0", xfer] is None


def test_a_room_is_refused_by_the_way_on_which_it_was_opened() -> None:
    """A receiver that knows us by two addresses speaks by two ways, and each room is waited for on its own."""
    ferry = Ferry(pool=3)
    ferry.sender.on_message("way 1", stranger(1))
    about = {"src": 5001, "dst": 1000, "min_live": 1}
    for room in (1, 2):
        ferry.sender.on_message(f"way {room}", m.Open(**about, xfer=room, room=room, rank=0, ranks=1, dummy=False))
    sent = [x for x in ferry.sender.connected(5001, e.TransportMismatch("no way")) if isinstance(x, fx.Send)]
    refused = [(x.route, x.message.xfer) for x in sent if isinstance(x.message, m.Refused)]
    assert refused == [("way 1", 1), ("way 2", 2)]
