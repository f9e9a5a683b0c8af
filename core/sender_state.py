"""What a sender remembers, how it says things, and its canonical snapshot. Every decision is in sender.py."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tensorferry.core import errors as e
from tensorferry.core import messages as m
from tensorferry.core.effects import Effect, Send
from tensorferry.core.ledger import Ranges, runs_of
from tensorferry.core.policy import SenderPolicy
from tensorferry.core.transfer import Facts, Status

Snapshot = tuple[Any, ...]

EVERY_EPOCH = (1 << 32) - 1

MOST_TOMBSTONES = 1 << 16
"""Ranges of closed transfers of one receiver's incarnation, above its `min_live`: at most one more than it can have
rooms live at once, which is far below this (MSG-5)."""


MOST_ABANDONED = 1 << 16
"""Receivers whose writes were given up and that may come back: two numbers each, about 7 MB together. Each of them has
cost a room of the caller's, peer_timeout and a minute."""


@dataclass(slots=True)
class Binding:
    """One rank's transfer. `pending` is granted and not readable yet; `posted` and `done` are of this epoch."""

    route: str
    receiver: int
    xfer: int
    rank: int
    dummy: bool
    epoch: int = 0
    revoked: int = 0
    pending: dict[int, tuple[int, int]] = field(default_factory=dict)  # index -> (block, region generation)
    posted: Ranges = field(default_factory=Ranges)
    done: dict[int, int] = field(default_factory=dict)  # index -> digest, until the receiver's prefix passes it
    trouble: tuple[str, str] | None = None  # (code, cause): nothing more is posted in this epoch
    vote: bool | None = None
    closed: str | None = None  # the code of its Close, "" for delivered
    high: int = 0  # not protocol state: indices below it have been granted once
    prefix: int = 0  # not protocol state either: how far the receiver says that its rows reach

    @property
    def key(self) -> tuple[int, int]:
        return self.receiver, self.xfer


@dataclass(slots=True)
class Offer:
    """What the caller sends under a room number, from `send` until the last rank has closed."""

    serial: int
    room: int
    facts: Facts
    ready: int
    status: Status = Status.BOOTSTRAPPING
    error: e.FerryError | None = None
    told: bool = False


@dataclass(slots=True)
class Slot:
    """One use of a room: an offer, bindings, or both."""

    id: int
    room: int
    offer: Offer | None = None
    ranks: int = 0  # 0 until somebody opens
    bindings: dict[int, Binding] = field(default_factory=dict)  # by rank
    admitted: bool = False  # rank 0 has its destination
    decision: str | None = None  # "commit" or "abort", sticky (TP-4)
    abort: tuple[str, str] = ("", "")
    rival: m.Open | None = None  # of another receiver, for a rank which is taken
    touched: int = 0
    lost: str | None = None  # not protocol state: why nobody has the room open any more


WriteId = tuple[int, int, int, int]
"""(receiver incarnation, xfer, epoch, first index)"""


@dataclass(slots=True)
class Write:
    """Indices of one grant that were handed to the transport and may still land."""

    serial: int
    receiver: int
    xfer: int
    epoch: int
    outstanding: set[int]


@dataclass(slots=True)
class Receiver:
    """A receiver's incarnation. `closed` are tombstones: transfers at or above `min_live` that are over."""

    route: str
    name: str
    hello: m.Hello
    min_live: int = 1
    closed: Ranges = field(default_factory=Ranges)
    revoked: dict[int, int] = field(default_factory=dict)  # xfer not opened here -> revoked up to (L4)
    usable: bool = False
    gone: bool = False
    problem: tuple[str, str] | None = None  # (code, cause): the transport cannot reach it, so that no room is served
    generations: list[int] = field(default_factory=list)
    via: str = ""  # the transport that carries to it
    path: str = ""  # by which way, as its engine tells
    waiting: int = 1 << 60  # granted blocks that wait, at most: counted anew when that would be too many


class SenderState:
    """The books of one embedding-side endpoint. `hello` is the template of our Hello."""

    def __init__(self, hello: m.Hello, policy: SenderPolicy | None = None) -> None:
        self.inc = hello.src
        self.hello = hello
        self.policy = policy or SenderPolicy()
        self.slots: dict[int, Slot] = {}  # by id
        self.serials: dict[int, int] = {}  # offer -> slot
        self.rooms: dict[int, int] = {}  # room -> the slot that a new offer or Open would join
        self.where: dict[tuple[int, int], int] = {}  # (receiver, xfer) -> slot
        self.given_up: dict[int, e.FerryError] = {}  # rooms that the receiver ended before there was an offer
        self.abandoned: dict[int, int] = {}  # receiver -> the last transfer of it whose writes are not waited for
        self.withdrawn: dict[int, e.FerryError] = {}  # rooms whose offer ended before anybody had opened them
        self.contested: set[int] = set()  # slots with a rival
        self.receivers: dict[int, Receiver] = {}
        self.newest: dict[str, int] = {}  # receiver name -> its newest incarnation
        self.writes: dict[WriteId, Write] = {}
        self.orphans: set[int] = set()  # ended offers whose rows may still be read
        self.next_slot = 1
        self.next_serial = 1
        self.ignored: Counter[str] = Counter()
        self.refused = ""  # why the last Hello was refused, for people
        self._effects: list[Effect] = []

    def _new_slot(self, room: int) -> Slot:
        slot = self.slots[self.next_slot] = Slot(self.next_slot, room)
        self.rooms[room] = slot.id
        self.next_slot += 1
        return slot

    def _slot_at(self, room: int) -> Slot | None:
        slot_id = self.rooms.get(room)
        return self.slots[slot_id] if slot_id is not None else None

    def _slot_of(self, serial: int) -> Slot | None:
        slot_id = self.serials.get(serial)
        return self.slots[slot_id] if slot_id is not None else None

    def _slots_of(self, receiver: int) -> list[Slot]:
        return [s for s in self.slots.values() if any(b.receiver == receiver for b in s.bindings.values())]

    def _binding_at(self, key: tuple[int, int]) -> Binding | None:
        slot_id = self.where.get(key)
        if slot_id is None:
            return None
        return next((b for b in self.slots[slot_id].bindings.values() if b.key == key), None)

    def _binding(self, w: Write) -> Binding | None:
        return self._binding_at((w.receiver, w.xfer))

    def _is_abandoned(self, key: tuple[int, int]) -> bool:
        """Of its writes, or of those of a later transfer, some may still be under way, and nobody watches them."""
        return key[1] <= self.abandoned.get(key[0], 0)

    def _is_drained(self, key: tuple[int, int], upto: int) -> bool:
        if self._is_abandoned(key):
            return False
        return not any((w.receiver, w.xfer) == key and w.epoch <= upto for w in self.writes.values())

    def _take_effects(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects

    # ---- saying things ------------------------------------------------------------------------------------------

    def _send(self, route: str, message: m.Message) -> None:
        self._effects.append(Send(route, message))

    def _ping(self, receiver: int) -> None:
        r = self.receivers.get(receiver)
        if r is not None:
            self._send(r.route, m.Ping(src=self.inc, dst=receiver))

    def _refuse(self, route: str, key: tuple[int, int], error: e.FerryError) -> None:
        self._send(route, m.Refused(src=self.inc, dst=key[0], xfer=key[1], code=error.code, cause=error.cause[:1000]))

    def _send_announce(self, slot: Slot, b: Binding) -> None:
        assert slot.offer is not None
        f = slot.offer.facts
        self._send(b.route, m.Announce(
            src=self.inc, dst=b.receiver, xfer=b.xfer, total=f.total, content_id=f.content_id, present=f.present,
            aux=f.aux, integrity=f.integrity, ready=slot.offer.ready, via=self.receivers[b.receiver].via,
        ))  # fmt: skip

    def _send_done(self, b: Binding, digests: dict[int, int]) -> None:
        indices = sorted(digests)
        for k in range(0, len(indices), m.MAX_RUNS):
            part = indices[k : k + m.MAX_RUNS]
            self._send(b.route, m.Done(
                src=self.inc, dst=b.receiver, xfer=b.xfer, epoch=b.epoch, runs=m.pack_done(runs_of(part)),
                digests=m.pack_digests(digests[i] for i in part), path=self.receivers[b.receiver].path,
            ))  # fmt: skip

    def _send_trouble(self, b: Binding) -> None:
        assert b.trouble is not None
        code, cause = b.trouble
        self._send(b.route, m.Trouble(src=self.inc, dst=b.receiver, xfer=b.xfer, epoch=b.epoch, code=code, cause=cause))

    def _send_fenced(self, route: str, key: tuple[int, int], upto: int) -> None:
        self._send(route, m.Fenced(src=self.inc, dst=key[0], xfer=key[1], upto=upto))

    def _send_decision(self, slot: Slot) -> None:
        """COMMIT and ABORT go to the leader (R7); a lone receiver is its own leader and needs no COMMIT."""
        leader = slot.bindings.get(0)
        if leader is None or leader.closed is not None or slot.decision is None:
            return
        about = {"src": self.inc, "dst": leader.receiver, "xfer": leader.xfer}
        if slot.decision == "abort":
            self._send(leader.route, m.Abort(**about, code=slot.abort[0], cause=slot.abort[1]))
        elif slot.ranks > 1:
            self._send(leader.route, m.Commit(**about))

    # ---- for exploration: protocol state only (R11) -------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        return (
            tuple(
                (
                    s.id, s.room, s.ranks, s.admitted, s.decision, s.abort, s.rival,
                    s.offer and (s.offer.serial, s.offer.facts, s.offer.ready, s.offer.told,
                                 s.offer.error and s.offer.error.code),
                    tuple(
                        (b.route, b.receiver, b.xfer, b.rank, b.dummy, b.epoch, b.revoked,
                         tuple(sorted(b.pending.items())), b.posted.ranges(), tuple(sorted(b.done.items())),
                         b.trouble, b.vote, b.closed)
                        for _, b in sorted(s.bindings.items())
                    ),
                )
                for s in self.slots.values()
            ),
            tuple(
                (inc, r.route, r.name, r.hello, r.min_live, r.closed.ranges(), tuple(sorted(r.revoked.items())),
                 r.usable, r.gone, r.problem, r.via, r.path)
                for inc, r in sorted(self.receivers.items())
            ),
            tuple(sorted(self.newest.items())),
            tuple(
                (key, w.serial, w.receiver, w.xfer, w.epoch, tuple(sorted(w.outstanding)))
                for key, w in sorted(self.writes.items())
            ),
            tuple(sorted(self.rooms.items())), tuple((room, x.code) for room, x in sorted(self.given_up.items())),
            tuple((room, x.code) for room, x in sorted(self.withdrawn.items())), tuple(sorted(self.abandoned.items())),
            tuple(sorted(self.orphans)), self.next_slot, self.next_serial,
        )  # fmt: skip

    def restore(self, snapshot: Snapshot) -> None:
        slots, receivers, newest, writes, rooms, given_up, withdrawn, abandoned, orphans = snapshot[:9]
        self.next_slot, self.next_serial = snapshot[9:]
        self.abandoned = dict(abandoned)
        self.slots, self.serials, self.where, self.contested = {}, {}, {}, set()
        for id_, room, ranks, admitted, decision, abort, rival, offer, bindings in slots:
            slot = Slot(id_, room, None, ranks, {}, admitted, decision, abort, rival)
            if offer is not None:
                serial, facts, ready, told, code = offer
                error = e.from_code(code, "restored") if code else None
                slot.offer = Offer(serial, room, facts, ready, told=told, error=error)
            for row in bindings:
                b = Binding(*row[:7])
                pending, posted, done, b.trouble, b.vote, b.closed = row[7:]
                b.pending, b.posted, b.done = dict(pending), Ranges(posted), dict(done)
                slot.bindings[b.rank] = b
                self.where[b.key] = id_
            self.slots[id_] = slot
            if slot.offer is not None:
                self.serials[slot.offer.serial] = id_
            if rival is not None:
                self.contested.add(id_)
        self.receivers = {}
        for inc, route, name, hello, min_live, closed, revoked, usable, gone, problem, via, path in receivers:
            generations = m.unpack_generations(hello.generations)
            self.receivers[inc] = Receiver(
                route, name, hello, min_live, Ranges(closed), dict(revoked), usable, gone, problem, generations, via,
                path,
            )  # fmt: skip
        self.newest, self.rooms, self.orphans = dict(newest), dict(rooms), set(orphans)
        self.writes = {key: Write(a, b, c, d, set(outstanding)) for key, a, b, c, d, outstanding in writes}
        self.given_up = {room: e.from_code(code, "restored") for room, code in given_up}
        self.withdrawn = {room: e.from_code(code, "restored") for room, code in withdrawn}
        self._effects = []
