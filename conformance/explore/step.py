"""One step of the world: run events on machines and carry out what they ask for, at once and in order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from tensorferry.conformance.explore.machines import Event, Todo
from tensorferry.conformance.explore.search import State, Violation

if TYPE_CHECKING:
    from tensorferry.conformance.explore.world import SearchWorld


class Flight(NamedTuple):
    """A posted block. `placed`: its completion is known, its bytes are not visible yet. `unknown`: was said of it."""

    sender: int
    incarnation: int
    write: tuple[int, int, int, int]
    at: int
    target: int
    generation: int
    block: int
    attempt: int
    placed: bool
    unknown: bool
    serial: int
    content: int


class Want(NamedTuple):
    """What a rank's application wants of a room. `end`: "" not called yet, "w" waits, else how it ended."""

    end: str
    xfer: int


class Offering(NamedTuple):
    """What the sending application offers under a room number. `end` as in Want."""

    end: str
    serial: int
    content: int
    ready: int
    released: bool


class Bytes(NamedTuple):
    """What stands in a block."""

    xfer: int
    content: int
    at: int
    intact: bool


class Proof(NamedTuple):
    """`about`, an incarnation of a crashed process, is not yet known to `to` to be gone."""

    to: int
    process: int
    about: int


class GatherJob(NamedTuple):
    rank: int
    xfer: int
    items: tuple[tuple[int, int, int], ...]
    destination: int


class Parts(NamedTuple):
    procs: tuple[int, ...]
    flights: tuple[Flight, ...]
    memory: tuple[tuple[Bytes | None, ...], ...]  # per rank, per block
    rows: tuple[tuple[tuple[int, int], int, tuple[int, ...]], ...]  # (rank, xfer), destination, content per index
    wants: tuple[Want, ...]  # rank * rooms + room
    offers: Any  # tuple[Offering, ...]
    proofs: tuple[Proof, ...]
    gathers: tuple[GatherJob, ...]
    net: int
    budget: tuple[int, ...]


def digest(xfer: int, content: int, index: int) -> int:
    """Ideal, and seeded with the transfer, the content and the position (INT-1)."""
    return (xfer * 64 + content) * 64 + index


class Step:
    """A state being changed. Raises Violation."""

    def __init__(self, world: SearchWorld, state: State) -> None:
        procs, flights, memory, rows, wants, offers, proofs, gathers, net, budget = state
        self.world, self.setup = world, world.setup
        self.procs = list(procs)
        self.flights: Any = flights
        self.memory: Any = memory
        self.rows: Any = rows
        self.wants: Any = wants
        self.offers: Any = offers
        self.proofs: Any = proofs
        self.gathers: Any = gathers
        self.net: int = net
        self.budget: Any = budget
        self.quitting = False  # the caller of a rank that has promised its rows leaves

    def frozen(self, net: int) -> State:
        return (
            tuple(self.procs), tuple(sorted(self.flights)), self.memory, self.rows, self.wants, self.offers,
            self.proofs, self.gathers, net, self.budget,
        )  # fmt: skip

    # ---- machines -----------------------------------------------------------------------------------------------

    def run(self, process: int, event: Event) -> int:
        ran = self.world.shop.run(self.procs[process], event)
        if ran.error is not None:
            if ran.error.startswith("refused"):
                return 0
            raise Violation(ran.error)
        self.procs[process] = ran.after
        if event[0] == "receive":
            room = event[1]
            self.set_want(process, room, Want("w", ran.answer))
        elif event[0] == "offer":
            offer = self.offers[event[1]]
            self.set_offer(event[1], Offering("w", ran.answer, event[3], event[4], False))
            del offer
        for todo in ran.todo:
            self.carry_out(process, todo)
        return ran.answer

    def carry_out(self, process: int, todo: Todo) -> None:
        kind = todo[0]
        if kind == "send":
            self.net |= 1 << todo[1]
        elif kind == "connect":
            self.run(process, ("connected", todo[1]))
        elif kind == "post":
            self.post(process, todo)
        elif kind == "gather":
            job = GatherJob(process, todo[1], todo[2], self.destination(process, todo[1]))
            if self.setup.slow_gather:
                self.gathers = tuple(sorted((*self.gathers, job)))
            else:
                self.gather(job)
        elif kind == "drop":
            at = (process, todo[1])
            kept = [row for row in self.rows if row[0] != at]
            self.rows = tuple(sorted([*kept, (at, self.destination(*at) + 1, (0,) * self.setup.blocks)]))
        elif kind == "replace":
            self.run(process, ("replaced", todo[1]))
        elif kind == "ended":
            self.ended(process, todo[1], todo[2])
        elif kind == "release":
            self.release(process, todo[1])

    # ---- the data plane -----------------------------------------------------------------------------------------

    def post(self, process: int, todo: Todo) -> None:
        _, write, serial, target, _, _, runs = todo
        room = self.offered(process, serial)
        if room is None or self.offers[room].released:
            raise Violation(f"WM-6 a write of {write} reads rows that are released")
        incarnation = self.world.incarnation(self.procs[process])
        new = [
            Flight(process, incarnation, write, first + k, target, generation, block + k, attempt, False, False, serial,
                   self.offers[room].content)
            for first, block, count, generation in runs
            for k in range(count)
            for attempt in range(2 if self.setup.retry else 1)
        ]  # fmt: skip
        self.flights = (*self.flights, *new)

    def reaches(self, f: Flight) -> bool:
        """The memory that a write was granted is still there."""
        number = self.procs[f.target]
        if self.world.incarnation(number) != f.write[0]:
            return False
        view = self.world.view(number)
        return view.generations[f.block // view.per_slab] == f.generation

    def appear(self, f: Flight, intact: bool) -> None:
        """Bytes become visible."""
        if self.reaches(f):
            blocks = list(self.memory[f.target])
            blocks[f.block] = Bytes(f.write[1], f.content, f.at, intact)
            self.memory = (*self.memory[: f.target], tuple(blocks), *self.memory[f.target + 1 :])

    def flush(self, rank: int) -> None:
        """Placed bytes are visible after it (INT-3)."""
        if self.setup.split and "no_flush" not in self.setup.mutant:
            for f in self.flights:
                if f.placed and f.target == rank:
                    self.appear(f, intact=True)
            self.flights = tuple(f for f in self.flights if not (f.placed and f.target == rank))

    def alive(self, f: Flight) -> bool:
        return self.world.incarnation(self.procs[f.sender]) == f.incarnation

    def complete(self, f: Flight) -> None:
        """A write is over. Its sender is told once no attempt at it is left (WS-2)."""
        left = [g for g in self.flights if (g.sender, g.incarnation, g.write, g.at) == f[:4] and not g.placed]
        early = "undrained_ok" in self.setup.mutant  # told at the first attempt's end, not at the last one's
        if not self.alive(f) or bool(left) != early:
            return
        if f.unknown:
            self.run(f.sender, ("drained", f.write, f.at))
        else:
            self.run(f.sender, ("done", f.write, f.at, digest(f.write[1], f.content, f.at)))

    # ---- the receiver's driver ----------------------------------------------------------------------------------

    def destination(self, rank: int, xfer: int) -> int:
        return next((row[1] for row in self.rows if row[0] == (rank, xfer)), 0)

    def gather(self, job: GatherJob) -> None:
        """Flush, verify, copy; then tell the machine."""
        self.flush(job.rank)
        good, bad, rows = [], [], {}
        for index, block, said in job.items:
            there = self.memory[job.rank][block]
            real = there is not None and there.intact and digest(*there[:3]) == said and there.at == index
            if real or "no_digest" in self.setup.mutant:
                if there is None or not there.intact or (there.xfer, there.at) != (job.xfer, index):
                    raise Violation(f"I3 wrong rows accepted: index {index} of xfer {job.xfer} is {there}")
                good.append(index)
                rows[index] = there.content
            else:
                bad.append(index)
        at = (job.rank, job.xfer)
        if self.destination(*at) == job.destination:
            old = next((row[2] for row in self.rows if row[0] == at), (0,) * self.setup.blocks)
            new = tuple(rows.get(k, value) for k, value in enumerate(old))
            self.rows = tuple(sorted([*(row for row in self.rows if row[0] != at), (at, job.destination, new)]))
        if good:
            self.run(job.rank, ("gathered", job.xfer, tuple(good)))
        if bad:
            self.run(job.rank, ("corrupt", job.xfer, tuple(bad)))

    # ---- the applications ---------------------------------------------------------------------------------------

    def process_of(self, room: int) -> int:
        return self.setup.ranks + self.setup.serves(room)

    def offered(self, process: int, serial: int) -> int | None:
        """The room under which that process offers `serial`."""
        rooms = (k for k, o in enumerate(self.offers) if self.process_of(k) == process and o.serial == serial)
        return next(rooms, None)

    def set_want(self, rank: int, room: int, want: Want) -> None:
        at = rank * self.setup.rooms + room
        self.wants = (*self.wants[:at], want, *self.wants[at + 1 :])

    def set_offer(self, room: int, offer: Offering) -> None:
        self.offers = (*self.offers[:room], offer, *self.offers[room + 1 :])

    def receive(self, rank: int, room: int) -> int:
        route = f"s{self.setup.serves(room)}"
        return self.run(rank, ("receive", room, route, rank in self.setup.dummies))

    def offer(self, room: int) -> int:
        ready = 0 if self.setup.trickle else self.setup.blocks
        return self.run(self.process_of(room), ("offer", room, self.setup.blocks, self.offers[room].content, ready))

    def ended(self, process: int, key: int, how: str) -> None:
        setup = self.setup
        if process >= setup.ranks:
            room = self.offered(process, key)
            if room is None or self.offers[room].end != "w":
                raise Violation(f"CN-2 the sending application is told an end twice, or of nothing: serial {key} {how}")
            self.set_offer(room, self.offers[room]._replace(end=how))
            return
        room = next((k for k in range(setup.rooms) if self.wants[process * setup.rooms + k].xfer == key), None)
        if room is None or self.wants[process * setup.rooms + room].end != "w":
            raise Violation(f"CN-2 the receiving application is told an end twice, or of nothing: xfer {key} {how}")
        self.set_want(process, room, Want("quit" if self.quitting else how, key))
        if how == "ok":
            self.delivered(process, key)
        self.agreement(process, room)
        if setup.ranks == 1:
            self.rows = tuple(row for row in self.rows if row[0] != (process, key))

    def delivered(self, rank: int, xfer: int) -> None:
        """WM-4: every row is there and all are of one content."""
        if rank in self.setup.dummies:
            return
        rows = next((row[2] for row in self.rows if row[0] == (rank, xfer)), (0,) * self.setup.blocks)
        if 0 in rows:
            raise Violation(f"WM-5 delivered with rows missing: {rows}")
        if len(set(rows)) > 1:
            raise Violation(f"I3 delivered rows mix two contents: {rows}")

    def agreement(self, process: int, room: int) -> None:
        """TP-2: where one rank runs, every rank has all rows, and none has dropped them."""
        setup = self.setup
        if setup.ranks == 1 or self.budget[1] < setup.faults.cr or setup.faults.re:
            return
        wants = [self.wants[rank * setup.rooms + room] for rank in range(setup.ranks)]
        if not any(want.end == "ok" for want in wants):
            return
        for rank, want in enumerate(wants):
            if want.end == "quit":
                if process:
                    continue  # its caller has left; it had promised its rows, and kept them until the leader ran
            elif want.end not in ("w", "ok"):
                raise Violation(f"TP-2 rank {rank} has dropped room {room} ({want.end}), and another runs it")
            if rank not in setup.dummies:
                rows = next((row[2] for row in self.rows if row[0] == (rank, want.xfer)), (0,))
                if 0 in rows:
                    raise Violation(f"TP-2 rank {rank} lacks rows of room {room}, and another runs it: {rows}")

    def release(self, process: int, serial: int) -> None:
        room = self.offered(process, serial)
        if room is None or self.offers[room].released:
            raise Violation(f"WM-6 the source of serial {serial} is released twice")
        if any(f.sender == process and f.serial == serial and self.alive(f) and not f.placed for f in self.flights):
            raise Violation(f"WM-6 the source of serial {serial} is released under a write")
        if self.offers[room].end == "w":
            raise Violation(f"WM-6 the source of serial {serial} is released before its application knows the end")
        self.set_offer(room, self.offers[room]._replace(released=True))
