"""A simulated world: processes, applications and faults on one clock, drawn from one seed.

Faults go on for a while (the storm), then they stop. From then on every transfer has to come to its end by itself;
what may end by a deadline is only what a crash, a cancel or a long silence has left without its other side (LV-1).

Long because what applications and faults do, and when they may end, is one story.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from tensorferry.conformance.explore.machines import LEADER
from tensorferry.conformance.explore.search import Violation
from tensorferry.conformance.explore.views import look
from tensorferry.conformance.protocol.simulate import judge as judging
from tensorferry.conformance.protocol.simulate.hosts import TICK, Host, ReceiverHost, SenderHost, why
from tensorferry.conformance.protocol.simulate.profiles import SOUND, Mutation, Profile, draw
from tensorferry.conformance.protocol.simulate.sea import Sea
from tensorferry.core import messages as m
from tensorferry.core.allocator import lowest_runs
from tensorferry.core.errors import Cancelled, DeadlineExceeded, FerryError, Overloaded, PeerLost, RoomInUse
from tensorferry.core.group import SOLO, Group
from tensorferry.core.policy import ReceiverPolicy
from tensorferry.core.receiver import ReceiverMachine
from tensorferry.core.sender import SenderMachine
from tensorferry.core.transfer import Facts, Phase

PATIENCE = 14.0
"""Simulated seconds after the storm for everything to end: several times the longest back-off and peer_timeout."""

MOST_EVENTS = 60_000

DOUBTS = frozenset({"peer_lost", "peer_unreachable", "deadline"})


@dataclass(slots=True)
class Want:
    """What a receiving application wants of a room. `end`: "" not called yet, "w" waits, else how it ended."""

    rank: int
    room: int
    use: int = 0
    end: str = ""
    xfer: int = 0
    promised: bool = False  # it had promised its rows when its caller left
    cancelled: bool = False


@dataclass(slots=True)
class Offering:
    room: int
    use: int = 0
    end: str = ""
    serial: int = 0
    content: int = 0
    ready: int = 0
    released: bool = False


class World:
    def __init__(
        self, profile: Profile, seed: int, *, trace: list[str] | None = None, mutation: Mutation = SOUND
    ) -> None:
        self.profile, self.seed, self.trace, self.mutation = profile, seed, trace, mutation
        self.rng = rng = Random(f"{profile.name}/{seed}")
        self.shape = draw(profile, rng)
        self.now, self.events, self.calm = 0.0, 0, profile.storm[1] <= 0
        self.heap: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self.queued = 0
        self.sea = Sea(self)
        self.counts: Counter[str] = Counter()
        self.excused: set[int] = set()  # rooms that may end by a deadline or an error
        self.totals: dict[int, int] = {}  # content -> tokens
        self.contents: dict[int, set[int]] = {}  # room -> contents that were ever offered under it
        self.doubtful = False
        self.dead: set[tuple[int, int]] = set()  # (who knows, incarnation): proved gone
        shape = self.shape
        self.hosts: list[Any] = [None] * (shape.receivers + shape.senders)
        self.wants = {
            (rank, room): Want(rank, room)
            for room in range(shape.rooms)
            for rank in (range(shape.ranks) if shape.ranks > 1 else (room % shape.receivers,))
        }
        self.offers = [Offering(room) for room in range(shape.rooms)]
        self.incs = [100 * (k + 1) if k < shape.receivers else 100_000 * (k + 1) for k in range(len(self.hosts))]

    # ---- names and time -----------------------------------------------------------------------------------------

    def name(self, number: int) -> str:
        return f"r{number}" if number < self.shape.receivers else f"s{number - self.shape.receivers}"

    def process(self, route: str) -> int:
        if route == LEADER:
            return 0
        return int(route[1:]) + (self.shape.receivers if route[0] == "s" else 0)

    def seen_from(self, number: int, route: str) -> str:
        """The route under which the process that is reached by `route` sees `number`."""
        return LEADER if number < self.shape.receivers and route[0] == "r" else self.name(number)

    def after(self, delay: float, do: Callable[..., object], *args: Any) -> None:
        self.queued += 1
        heapq.heappush(self.heap, (self.now + delay, self.queued, do, args))

    def say(self, what: str) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.now:10.6f} {what}")

    # ---- processes ----------------------------------------------------------------------------------------------

    def _hello(self, inc: int, name: str, pool: int, slabs: int) -> m.Hello:
        return m.Hello(
            src=inc, dst=0, min_live=1, version=m.PROTOCOL_VERSION, name=name, layout=b"L" * 16,
            block_size=self.shape.block_size, pool_blocks=pool, slabs=slabs,
            generations=m.pack_generations([1] * slabs), offers=(m.Offer("simulated", 1, "", b"", b""),), revision=1,
            ack=0,
        )  # fmt: skip

    def new_receiver(self, number: int, inc: int) -> ReceiverMachine:
        shape = self.shape
        per_slab = -(-shape.pool // shape.slabs)
        slabs = -(-shape.pool // per_slab)
        choose = {"lowest": lowest_runs, "random": self._choose_any, "hot": _choose_last}[shape.choice]
        policy = ReceiverPolicy(
            block_size=shape.block_size, first_grant=min(shape.first_grant, shape.pool) or 1,
            optimistic=shape.first_grant > 0, window=shape.window, budget=shape.budget, max_bumps=1 << 20,
            pause_after_bump=shape.pause, **self.mutation.policy,  # type: ignore[arg-type]
        )  # fmt: skip
        group = SOLO if shape.ranks == 1 else Group(number, shape.ranks, LEADER)
        hello = self._hello(inc, self.name(number), shape.pool, slabs)
        pool = self.mutation.pool_class(shape.pool, per_slab, choose)
        return self.mutation.receiver_class(hello, pool, policy, group)

    def new_sender(self, number: int, inc: int) -> SenderMachine:
        return self.mutation.sender_class(self._hello(inc, self.name(number), 0, 0))

    def _choose_any(self, pieces: list[tuple[int, int]], n: int) -> list[int]:
        return self.rng.sample([block for start, stop in pieces for block in range(start, stop)], n)

    def start(self, number: int) -> None:
        kind = ReceiverHost if number < self.shape.receivers else SenderHost
        host = self.hosts[number] = kind(self, number, self.incs[number])
        self.incs[number] += 1
        self.after(self.rng.uniform(0.05, TICK), self.tick, host)

    def tick(self, host: Host) -> None:
        if host.alive:
            host.tick()
            self.after(TICK * self.rng.uniform(0.8, 1.2), self.tick, host)

    def judge(self, host: Host) -> None:
        judging.judge(self, host)

    def judge_writes(self, target: int) -> None:
        host = self.hosts[target]
        if host is not None:
            judging.writes(self, host, host.machine.pool.granted, host.machine.pool.quarantined)

    def doubt(self, about: str) -> None:
        """Somebody has taken somebody for lost, who may be alive: from now on deadlines may have to end things."""
        self.doubtful = True
        self.counts[about] += 1
        self.say(about)

    # ---- the run ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """To the end. Raises Violation."""
        rng, profile = self.rng, self.profile
        for number in range(len(self.hosts)):
            self.start(number)
        for want in self.wants.values():
            self.after(rng.uniform(0.0, profile.spread), self.receive, want)
        for offer in self.offers:
            self.after(rng.uniform(0.0, profile.spread), self.offer, offer)
        storm = rng.uniform(*profile.storm)
        self._schedule_faults(storm)
        self.after(storm, self.quieten)
        while self.heap:
            self.now, _, do, args = heapq.heappop(self.heap)
            do(*args)
            if self.events > MOST_EVENTS:
                raise Violation(f"LV-1 stuck: {self.events} events and no end")
            if self.calm and self.over() and not self.left():
                self.finish()
                return
        raise Violation("LV-1 stuck: nothing happens any more")

    def quieten(self) -> None:
        """Faults stop. What was lost is lost."""
        self.say("the storm is over")
        self.calm = True
        self.sea.cut.clear()
        for number, host in enumerate(self.hosts):
            if host is None:
                self.start(number)
                self._restart_applications(number)
        self.after(PATIENCE, self.lose_patience, 1)

    def over(self) -> bool:
        return all(w.end not in ("", "w") for w in self.wants.values()) and all(
            o.end not in ("", "w") and o.released for o in self.offers
        )

    def left(self) -> str:
        """LV-2: what keeps the world from being clean."""
        parts = [f"{h.name}: {left}" for h in self.hosts if (left := look(h.machine, self.shape.window).left)]
        if not self.counts["receiver crashes"]:
            parts += [f"{h.name}: {left}" for h in self.hosts if (left := look(h.machine, self.shape.window).undecided)]
        parts += [f"rank {w.rank} still waits for room {w.room}" for w in self.wants.values() if w.end in ("", "w")]
        parts += [f"room {o.room} is still offered" for o in self.offers if o.end in ("", "w")]
        parts += [f"the source of room {o.room} is not released" for o in self.offers if o.end and not o.released]
        alive = {h for h in self.hosts if h is not None}
        parts += [f"a write is still out: {f}" for f in self.sea.flights if f.host in alive]
        return "; ".join(parts)

    def lose_patience(self, times: int) -> None:
        """Deadlines, where somebody may wait for nobody; elsewhere there must be no need of them."""
        left = self.left()
        if times > 3 or not self._deadlines():
            raise Violation(f"LV-1 stuck: {left or 'it does not end'}")
        self.after(PATIENCE, self.lose_patience, times + 1)

    def _deadlines(self) -> bool:
        """Let what is excused run into its deadline. False: nothing is, and something waits all the same."""
        due = False
        for offer in self.offers:
            if offer.end == "w" and (self._unwanted(offer) or self._excused(offer.room)):
                due = True
                self.call(self.hosts[self.server(offer.room)], "cancel", offer.serial, DeadlineExceeded("simulated"))
        for want in self.wants.values():
            if not self._excused(want.room):
                continue
            if want.end == "w":
                due = True
                host = self.hosts[want.rank]
                t = host.machine.transfers.get(want.xfer)
                if t is not None and (t.error is not None or t.plea is not None):
                    self.call(host, "resolve", want.xfer, False)
                else:
                    self.call(host, "fail", want.xfer, DeadlineExceeded("simulated"))
            self.after(3.0, self._framework_drops, want)
        for number in range(self.shape.receivers, len(self.hosts)):
            self.after(6.0, self._force_ends, number)
        return due or (self.over() and (self.doubtful or bool(self.excused)))

    def _framework_drops(self, want: Want) -> None:
        """A leader that came back cannot say what its predecessor decided, nor one that has ended the room what a rank
        that came back is to do: the framework, or a second deadline, tells the rank."""
        host = self.hosts[want.rank]
        t = host.machine.transfers.get(want.xfer)
        if want.end == "w" or (t is not None and t.live and t.told and self.shape.ranks > 1):
            self.call(host, "resolve", want.xfer, False)

    def _force_ends(self, number: int) -> None:
        for slot in list(self.hosts[number].machine.slots):
            self.call(self.hosts[number], "force_end", slot)

    def _unwanted(self, offer: Offering) -> bool:
        """A restarted sender offers what was delivered before its crash: nobody will come for it."""
        wants = [w for w in self.wants.values() if w.room == offer.room]
        gone = self.counts["sender crashes"] > 0 and all(w.end not in ("", "w") for w in wants)
        if gone:
            self.excused.add(offer.room)
        return gone

    def _excused(self, room: int) -> bool:
        waits = self.shape.one_by_one and room == 0  # for all others
        return self.doubtful or room in self.excused or (waits and bool(self.excused))

    def call(self, host: Host, kind: str, *args: Any) -> Any:
        try:
            return host.event(kind, *args)
        except (RoomInUse, Overloaded) as refused:
            self.counts[refused.code] += 1
            return None

    def finish(self) -> None:
        for offer in self.offers:
            wants = [w for w in self.wants.values() if w.room == offer.room]
            fine = [w for w in wants if w.end == "ok"]
            self.counts["delivered"] += len(fine)
            self.counts["ended early"] += len(wants) - len(fine)
            if offer.end == "ok" and not fine and not self.counts["receiver crashes"]:
                raise Violation(f"CN-2 the sender of room {offer.room} is told of a success that nobody has had")
            if not self._excused(offer.room) and (offer.end != "ok" or len(fine) != len(wants)):
                ends = [w.end for w in wants]
                raise Violation(f"LV-1 room {offer.room} ended as {offer.end} and {ends}, and nothing had happened")

    # ---- applications -------------------------------------------------------------------------------------------

    def server(self, room: int) -> int:
        return self.shape.receivers + room % self.shape.senders

    def receive(self, want: Want) -> None:
        host = self.hosts[want.rank]
        if host is None or want.end:
            return
        route = self.name(self.server(want.room))
        dummy = want.rank in self.shape.dummies and self.shape.ranks > 1
        want.end = "w"
        want.xfer = host.machine.next_xfer  # known before the call returns: it may end at once
        try:
            host.event("receive", want.room, route, dummy=dummy)
        except (RoomInUse, Overloaded):  # the use before is not over yet
            want.end, want.xfer = "", 0
            self.after(0.3, self.receive, want)

    def offer(self, offer: Offering) -> None:
        number = self.server(offer.room)
        host = self.hosts[number]
        if host is None or offer.end:
            return
        if self.shape.one_by_one and not offer.room and any(o.end in ("", "w") for o in self.offers[1:]):
            self.after(0.2, self.offer, offer)
            return
        if not offer.content:
            offer.content = self._new_content(offer.room)
        total = self.totals[offer.content]
        offer.ready = self.rng.randint(0, total) if self.shape.trickle else total
        facts = Facts(total, offer.content.to_bytes(16, "big"), 1, bytes(128), "full")
        offer.end, offer.serial, offer.released = "w", host.machine.next_serial, False
        try:
            host.event("offer", offer.room, facts, offer.ready)
        except (RoomInUse, Overloaded):
            offer.end, offer.serial = "", 0
            self.after(0.3, self.offer, offer)
            return
        if offer.ready < total:
            self.after(self.rng.uniform(0.0, 0.3), self.extend, host, offer, offer.serial)

    def _new_content(self, room: int) -> int:
        content = len(self.totals) + 1
        blocks = self.rng.randint(self.shape.least_blocks, self.shape.most_blocks)
        short = self.rng.randrange(self.shape.block_size)
        self.totals[content] = max(0, blocks * self.shape.block_size - short)
        self.contents.setdefault(room, set()).add(content)
        return content

    def extend(self, host: Host, offer: Offering, serial: int) -> None:
        total = self.totals.get(offer.content, 0)
        if host.alive and offer.end == "w" and offer.serial == serial and offer.ready < total:
            offer.ready = min(total, offer.ready + self.rng.randint(1, max(1, total // 2)))
            host.event("extend", serial, offer.ready)
            self.after(self.rng.uniform(0.0, 0.3), self.extend, host, offer, serial)

    def content_of(self, host: Host, serial: int) -> int:
        """The rows that a write reads. They have to be there still."""
        offer = self._offered(host, serial)
        if offer is None or offer.released:
            raise Violation(f"WM-6 a write of serial {serial} reads rows that are released")
        return offer.content

    def _offered(self, host: Host, serial: int) -> Offering | None:
        mine = (o for o in self.offers if self.server(o.room) == host.number and o.serial == serial)
        return next(mine, None)

    def sender_ended(self, host: Host, serial: int, error: FerryError | None) -> None:
        offer = self._offered(host, serial)
        if offer is None or offer.end != "w":
            raise Violation(f"CN-2 a sending application is told an end twice, or of nothing: {serial} {why(error)}")
        offer.end = why(error)
        self.say(f"room {offer.room}: the sender's end is {offer.end}")
        self._judge_end(offer.room, offer.end)
        self._maybe_again(offer.room)

    def released(self, host: Host, serial: int) -> None:
        offer = self._offered(host, serial)
        if offer is None or offer.released:
            raise Violation(f"WM-6 the source of serial {serial} is released twice")
        if offer.end == "w":
            raise Violation(f"WM-6 the source of serial {serial} is released before its application knows the end")
        self.sea.check_posted(host, serial)  # type: ignore[arg-type]
        offer.released = True
        self._maybe_again(offer.room)

    def receiver_ended(self, host: ReceiverHost, xfer: int, error: FerryError | None) -> None:
        want = next((w for w in self.wants.values() if w.rank == host.number and w.xfer == xfer), None)
        if want is None or want.end != "w":
            raise Violation(f"CN-2 a receiving application is told an end twice, or of nothing: {xfer} {why(error)}")
        want.end = why(error)
        self.say(f"room {want.room}: the end at rank {want.rank} is {want.end}")
        self._judge_end(want.room, want.end)
        if error is None:
            self._judge_rows(host, want)
        if self.shape.ranks > 1 and not self.counts["receiver crashes"]:
            self._judge_group(want)
        self._maybe_again(want.room)

    def _judge_end(self, room: int, end: str) -> None:
        fine = end == "ok" or (end in DOUBTS | {"cancelled"} and self._excused(room))
        if not fine and not (end == "content_changed" and self.counts["sender crashes"] and self.profile.exposes):
            raise Violation(f"LV-1 room {room} ended with {end}, and nothing had happened to it")
        if end != "ok":
            self.excused.add(room)

    def _judge_rows(self, host: ReceiverHost, want: Want) -> None:
        """WM-4, WM-5: every row of one content that was offered, each once and in its place."""
        if want.rank in self.shape.dummies and self.shape.ranks > 1:
            return
        rows = host.rows.get(want.xfer, {})
        contents = set(rows.values())
        t = host.machine.transfers[want.xfer]
        assert t.facts is not None
        announced = int.from_bytes(t.facts.content_id, "big")
        needed = -(-self.totals[announced] // self.shape.block_size)
        if contents - {announced} or announced not in self.contents[want.room]:
            raise Violation(f"I3 delivered rows are of contents {contents}, announced was {announced}")
        if sorted(rows) != list(range(needed)):
            raise Violation(f"WM-5 delivered with rows missing: {sorted(rows)} of {needed}")

    def _judge_group(self, want: Want) -> None:
        """TP-2: where one rank runs, every rank has all rows, and none has dropped them."""
        wants = [w for w in self.wants.values() if w.room == want.room and w.use == want.use]
        if not any(w.end == "ok" for w in wants):
            return
        for w in wants:
            host = self.hosts[w.rank]
            t = host.machine.transfers.get(w.xfer) if host is not None else None
            left = w.cancelled and w.promised and w.end != "ok"
            if left and want.rank:
                continue  # its caller has left; it had promised its rows, and kept them until the leader ran
            if w.end not in ("w", "ok") and not left:
                raise Violation(f"TP-2 rank {w.rank} has dropped room {w.room} ({w.end}), and another runs it")
            if w.end != "ok" and w.rank not in self.shape.dummies and (t is None or t.phase is not Phase.VOTED):
                raise Violation(f"TP-2 rank {w.rank} lacks rows of room {w.room}, and another runs it")

    def _maybe_again(self, room: int) -> None:
        """Rooms are used again once both sides know the end of the use before."""
        offer = self.offers[room]
        wants = [w for w in self.wants.values() if w.room == room]
        if self.calm or not offer.released or offer.end in ("", "w") or any(w.end in ("", "w") for w in wants):
            return
        if self.rng.random() >= self.profile.reuse:
            return
        if self.shape.ranks > 1 and self._in_use(room):
            self.after(0.2, self._maybe_again, room)
            return
        self.counts["rooms used again"] += 1
        self.say(f"room {room} is used again")
        use = offer.use + 1
        self.offers[room] = again = Offering(room, use)
        self.after(self.rng.uniform(0.0, 0.3), self.offer, again)
        for w in wants:
            fresh = self.wants[w.rank, room] = Want(w.rank, room, use)
            self.after(self.rng.uniform(0.0, 0.3), self.receive, fresh)

    def _in_use(self, room: int) -> bool:
        """A rank that never opened an aborted room keeps it at the sender until its time is over: a rank that opened
        the next use before that would be taken for it."""
        host = self.hosts[self.server(room)]
        return host is None or room in host.machine.rooms

    # ---- faults -------------------------------------------------------------------------------------------------

    def _schedule_faults(self, storm: float) -> None:
        p, rng = self.profile, self.rng
        plan: list[tuple[int, Callable[..., object]]] = [
            (p.sender_crashes, self.crash_sender), (p.receiver_crashes, self.crash_receiver), (p.cancels, self.cancel),
            (p.sender_cancels, self.cancel_sender), (p.suspicions, self.suspect), (p.overdue, self.overdue),
            (p.exposes, self.expose), (p.partitions, self.part),
        ]  # fmt: skip
        for most, do in plan:
            for _ in range(rng.randint(0, most) if most else 0):
                self.after(rng.uniform(0.0, min(storm, 1.5)) if rng.random() < 0.7 else rng.uniform(0, storm), do)

    def crash_sender(self) -> None:
        self._crash(self.rng.randrange(self.shape.receivers, len(self.hosts)), "sender crashes")

    def crash_receiver(self) -> None:
        self._crash(self.rng.randrange(self.shape.receivers), "receiver crashes")
        self.doubtful = True

    def _crash(self, number: int, what: str) -> None:
        host = self.hosts[number]
        if host is None or self.calm:
            return
        rng = self.rng
        self.counts[what] += 1
        self.say(f"{host.name} crashes")
        self.hosts[number] = None
        if rng.random() < self.profile.proof:
            others = range(self.shape.receivers) if number >= self.shape.receivers else range(
                self.shape.receivers, len(self.hosts)
            )  # fmt: skip
            for other in others:
                self.after(rng.uniform(0.001, 3.0), self._prove, host, other)
        self.after(rng.choice((0.001, 0.05, 1.0)) * rng.uniform(0.5, 2.0), self._restart, number)

    def _restart(self, number: int) -> None:
        if self.hosts[number] is None:
            self.start(number)
            self.say(f"{self.name(number)} starts again")
            self._restart_applications(number)

    def _restart_applications(self, number: int) -> None:
        rng = self.rng
        if number < self.shape.receivers:
            for want in self.wants.values():
                if want.rank == number and want.end in ("", "w"):
                    want.end, want.xfer = "", 0
                    self.after(rng.uniform(0.0, 0.2), self.receive, want)
                elif want.rank == number:
                    want.xfer = 0
            return
        for offer in self.offers:
            if self.server(offer.room) != number:
                continue
            offer.serial = 0
            if offer.end in ("", "w"):
                if rng.random() >= self.profile.same:
                    offer.content = 0
                offer.end = ""
                self.after(rng.uniform(0.0, 0.2), self.offer, offer)
            else:
                offer.released = True

    def _prove(self, dead: Host, other: int) -> None:
        """F4: the kernel's word, or a connection's, that a process is gone."""
        host = self.hosts[other]
        self.sea.bury(dead, other)
        self.dead.add((other, dead.inc))
        if host is not None:
            self.say(f"{dead.name} {dead.inc} is proved gone to {host.name}")
            self._tell_gone(host, dead.inc)

    def _tell_gone(self, host: Host, inc: int) -> None:
        if isinstance(host, ReceiverHost) and host.alive:
            host.event("peer_gone", inc)
        elif isinstance(host, SenderHost) and host.alive:
            host.lose(inc, gone=True)

    def met(self, host: Host, inc: int) -> None:
        """A late Hello of a process that is gone: who meets it finds that out at once."""
        if (host.number, inc) in self.dead:
            self.after(0.05, self._tell_gone, host, inc)

    def cancel(self) -> None:
        waiting = [w for w in self.wants.values() if w.end == "w" and self.hosts[w.rank] is not None]
        if waiting:
            want = self.rng.choice(waiting)
            self.excused.add(want.room)
            host = self.hosts[want.rank]
            t = host.machine.transfers.get(want.xfer)
            want.cancelled = True
            want.promised = t is not None and want.rank > 0 and t.phase is Phase.VOTED and t.error is None
            host.event("cancel", want.xfer, Cancelled("simulated"))
            if want.end == "w":
                raise Violation("CN-1 a cancel is not seen by its caller at once")

    def cancel_sender(self) -> None:
        waiting = [o for o in self.offers if o.end == "w" and self.hosts[self.server(o.room)] is not None]
        if waiting:
            offer = self.rng.choice(waiting)
            self.excused.add(offer.room)
            self.hosts[self.server(offer.room)].event("cancel", offer.serial, Cancelled("simulated"))

    def _receivers(self) -> list[ReceiverHost]:
        return [h for h in self.hosts[: self.shape.receivers] if h is not None]

    def suspect(self) -> None:
        out = [(h, t.xfer) for h in self._receivers() for t in h.machine.transfers.values() if t.out and t.live]
        if out:
            host, xfer = self.rng.choice(out)
            host.event("suspect", xfer, PeerLost("simulated"))
        elif not self.calm and self.rng.random() < 0.9:
            self.after(0.05, self.suspect)

    def overdue(self) -> None:
        for host in self._receivers():
            for inc in sorted({tenant.sender for tenant in host.machine.pool.quarantined.values()}):
                host.event("fence_overdue", inc)

    def expose(self) -> None:
        for host in self._receivers():
            for xfer in host.rows.keys() & host.machine.transfers.keys():
                host.machine.expose(xfer)

    def part(self) -> None:
        """Some link carries nothing for a while, in one direction or both; or a rank is cut off at the worst moment,
        which is when it has promised its rows."""
        one = self.rng.randrange(self.shape.receivers)
        others = [self.rng.randrange(len(self.hosts))] if self.rng.random() < 0.6 else range(len(self.hosts))
        if self.shape.ranks > 1 and self.rng.random() < 0.7:
            promised = [h.number for h in self._receivers() for t in h.machine.transfers.values()
                        if h.number and t.phase is Phase.VOTED]  # fmt: skip
            if not promised:
                if not self.calm:
                    self.after(0.02, self.part)
                return
            one, others = promised[0], range(len(self.hosts))
        until = self.now + self.rng.uniform(0.1, self.profile.longest_partition)
        self.counts["partitions"] += 1
        out, back = self.rng.choice([(True, False), (False, True), (True, True), (True, True)])
        for other in others:
            self.say(f"no link between {self.name(one)} and {self.name(other)} until {until:.3f}")
            if out:
                self.sea.cut[one, other] = until
            if back:
                self.sea.cut[other, one] = until


def _choose_last(pieces: list[tuple[int, int]], n: int) -> list[int]:
    """The highest numbers first: what was freed by the end of a transfer is in other hands at once."""
    return [block for start, stop in reversed(pieces) for block in reversed(range(start, stop))][:n]
