"""What can happen next: deliveries and landings, the application's patience, and faults within their budgets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from tensorferry.conformance.explore.search import Edge, State, Violation
from tensorferry.conformance.explore.step import Flight, Offering, Proof, Step, Want
from tensorferry.core import messages as m

if TYPE_CHECKING:
    from tensorferry.conformance.explore.world import SearchWorld

CS, CR, TR, CO, CA, SA, BU, OV, RL, PS, RE = range(11)


Act = Callable[..., object]
Add = Callable[..., None]


def _edge(world: SearchWorld, state: State, label: tuple[Any, ...], act: Act, *about: Any, fault: int = -1) -> Edge:
    """`act(step, *about)`, as an edge. A fault takes from its budget."""
    step = Step(world, state)
    if fault >= 0:
        b = step.budget
        step.budget = (*b[:fault], b[fault] - 1, *b[fault + 1 :])
    try:
        act(step, *about)
    except Violation as violation:
        return Edge(label, fault < 0, violation)
    return Edge(label, fault < 0, world.settle(step))


# ---- normal steps -----------------------------------------------------------------------------------------------


def normal(world: SearchWorld, state: State) -> list[Edge]:
    found = list(_deliveries(world, state))
    found += _landings(world, state)
    found += _proofs(world, state)
    found += _applications(world, state)
    if "timer_fence" in world.setup.mutant:
        for rank in range(world.setup.ranks):
            if world.view(state[0][rank]).fencing:
                found.append(_edge(world, state, ("quarantine times out", rank), Step.run, rank, ("timer",)))
    for job in dict.fromkeys(state[7]):
        found.append(_edge(world, state, ("gather ends", job), _gather, job))
    return found


def _deliveries(world: SearchWorld, state: State) -> Iterator[Edge]:
    shop, net, split = world.shop, state[8], world.setup.split
    rest = net
    while rest:
        bit = rest & -rest
        rest ^= bit
        k = bit.bit_length() - 1
        to = shop.mail[k].to
        number = state[0][to]
        said = world.echo(number, k)
        if said is not None and not said & ~net:
            continue
        yield _edge(world, state, ("deliver", k), _deliver, to, k, split)


def _deliver(step: Step, to: int, k: int, split: bool) -> None:
    if split and type(step.world.shop.mail[k].message).__name__ == "Fenced":
        step.flush(to)  # before a fence frees blocks, what is placed in them has to be visible (INT-3)
    step.run(to, ("msg", k))


def _landings(world: SearchWorld, state: State) -> list[Edge]:
    found, flights = [], state[1]
    split = world.setup.split
    for k, f in enumerate(flights):
        if f in flights[:k]:
            continue
        if f.placed:
            found.append(_edge(world, state, ("becomes visible", f), _visible, f))
            continue
        found.append(_edge(world, state, ("lands", f), _land, f, True, split))
        if f.unknown:
            found.append(_edge(world, state, ("drains without landing", f), _vanish, f))
    return found


def _without(flights: tuple[Flight, ...], f: Flight) -> tuple[Flight, ...]:
    at = flights.index(f)
    return flights[:at] + flights[at + 1 :]


def _land(step: Step, f: Flight, intact: bool, split: bool) -> None:
    step.flights = _without(step.flights, f)
    if split and intact:
        step.flights = (*step.flights, f._replace(placed=True))
    else:
        step.appear(f, intact)
    step.complete(f)


def _vanish(step: Step, f: Flight) -> None:
    step.flights = _without(step.flights, f)
    step.complete(f)


def _visible(step: Step, f: Flight) -> None:
    step.flights = _without(step.flights, f)
    step.appear(f, True)


def _gather(step: Step, job: Any) -> None:
    gathers = list(step.gathers)
    gathers.remove(job)
    step.gathers = tuple(gathers)
    step.gather(job)


def _proofs(world: SearchWorld, state: State) -> list[Edge]:
    """F4, once for each process that has crashed and each that should know; or F3 where there is no F4."""
    found = []
    for proof in state[6]:
        number = state[0][proof.to]
        if proof.to < world.setup.ranks:
            if world.setup.proof:
                found.append(_edge(world, state, ("proved gone", *proof), _gone, proof))
            elif proof.about in world.view(number).fencing:
                found.append(
                    _edge(world, state, ("fence overdue", *proof), Step.run, proof.to, ("overdue", proof.about))
                )
        elif proof.about in world.view(number).receivers:
            found.append(_edge(world, state, ("receiver lost", *proof), _gone, proof))
    return found


def _gone(step: Step, proof: Proof) -> None:
    step.proofs = tuple(p for p in step.proofs if p != proof)
    if proof.to < step.setup.ranks:
        step.flights = tuple(f for f in step.flights if not (f.incarnation == proof.about and f.target == proof.to))
        step.run(proof.to, ("gone", proof.about))
    else:
        step.run(proof.to, ("lost", proof.about, True))


def _applications(world: SearchWorld, state: State) -> list[Edge]:
    found, setup, offers = [], world.setup, state[5]
    for room, offer in enumerate(offers):
        if offer.end == "" and not (setup.one_by_one and room == 0 and any(o.end in ("", "w") for o in offers[1:])):
            found.append(_edge(world, state, ("offer", room), Step.offer, room))
        if offer.end == "w" and offer.ready < setup.blocks:
            found.append(_edge(world, state, ("extend", room), _extend, room))
    return found


def _extend(step: Step, room: int) -> None:
    offer = step.offers[room]
    step.set_offer(room, offer._replace(ready=offer.ready + 1))
    step.run(step.process_of(room), ("extend", offer.serial, offer.ready + 1))


# ---- when nothing else can happen -------------------------------------------------------------------------------


def patience(world: SearchWorld, state: State) -> list[Edge]:
    """Timers speak again; and when that changes nothing, deadlines of applications pass."""

    def say(step: Step) -> None:
        step.net |= world.repeated(state[0])

    again = _edge(world, state, ("timers speak again",), say)
    if again.state != state:
        return [again]
    found, setup, ranks = [], world.setup, world.setup.ranks
    for room, offer in enumerate(state[5]):
        wants = [state[4][rank * setup.rooms + room] for rank in range(setup.ranks)]
        over = all(want.end not in ("", "w") for want in wants)
        if offer.end == "w" and over:
            server, event = ranks + setup.serves(room), ("cancel", offer.serial)
            found.append(_edge(world, state, ("deadline of offer", room), Step.run, server, event))
        failed = any(want.end not in ("", "w", "ok") for want in wants)
        for rank, want in enumerate(wants):
            if want.end != "w":
                continue
            if want.xfer not in world.view(state[0][rank]).given_up:
                if offer.end not in ("", "w") or failed or setup.doubtful:
                    event = ("fail", want.xfer)
                    found.append(_edge(world, state, ("deadline of rank", rank, room), Step.run, rank, event))
            elif rank and setup.doubtful:  # a leader that came back cannot say what its predecessor decided
                found.append(_edge(
                    world, state, ("framework drops", rank, room), Step.run, rank, ("resolve", want.xfer, False)
                ))  # fmt: skip
    if not found:
        for k in range(setup.ranks, setup.ranks + setup.senders):
            slots = world.view(state[0][k]).slots
            found += [_edge(world, state, ("force end", k, slot), Step.run, k, ("force", slot)) for slot in slots]
    return found


# ---- faults -----------------------------------------------------------------------------------------------------


def faults(world: SearchWorld, state: State) -> list[Edge]:
    budget = state[9]
    if not any(budget):
        return []
    found: list[Edge] = []
    setup, ranks = world.setup, world.setup.ranks

    def add(fault: int, label: tuple[Any, ...], act: Act, *about: Any) -> None:
        found.append(_edge(world, state, label, act, *about, fault=fault))

    if budget[CS]:
        for k in range(setup.senders):
            if any(o.end and not o.released for x, o in enumerate(state[5]) if setup.serves(x) == k):
                add(CS, ("sender crashes", k), lambda s, k=k: _sender_crash(s, ranks + k))
    if budget[CR]:
        for rank in range(ranks):
            add(CR, ("receiver crashes", rank), lambda s, rank=rank: _receiver_crash(s, rank))
    if budget[CO] and not setup.split:
        for f in dict.fromkeys(state[1]):
            add(CO, ("lands corrupted", f), _land, f, False, False)
    if budget[TR]:
        for f in dict.fromkeys(state[1]):
            if not f.placed and not f.unknown and world.incarnation(state[0][f.sender]) == f.incarnation:
                add(TR, ("FAILED", f), _failed, f)
        for sender, write in dict.fromkeys((f.sender, f.write) for f in state[1] if not f.placed and not f.unknown
                                           and world.incarnation(state[0][f.sender]) == f.incarnation):  # fmt: skip
            add(TR, ("UNKNOWN", write), _unknown, sender, write)
    for rank in range(ranks):
        _receiver_faults(world, state, rank, add)
    if budget[SA]:
        for room, offer in enumerate(state[5]):
            if offer.end == "w":
                add(
                    SA,
                    ("sender cancels", room),
                    Step.run,
                    ranks + setup.serves(room),
                    ("cancel", offer.serial),
                )
    if budget[RL]:
        for k in range(setup.senders):
            for inc in world.view(state[0][ranks + k]).receivers:
                if any(world.incarnation(state[0][r]) == inc for r in range(ranks)):
                    add(
                        RL,
                        ("receiver believed lost", k, inc),
                        Step.run,
                        ranks + k,
                        ("lost", inc, False),
                    )
    if budget[RE]:
        for room, offer in enumerate(state[5]):
            wants = [state[4][rank * setup.rooms + room] for rank in range(ranks)]
            if offer.end not in ("", "w") and all(w.end not in ("", "w") for w in wants) and offer.released:
                add(RE, ("room used again", room), _again, room)
    return found


def _receiver_faults(world: SearchWorld, state: State, rank: int, add: Add) -> None:
    budget, setup, view = state[9], world.setup, world.view(state[0][rank])
    if budget[CA]:
        for room in range(setup.rooms):
            want = state[4][rank * setup.rooms + room]
            if want.end == "w":
                add(CA, ("receiver cancels", rank, room), _cancel, rank, room)
    if budget[BU]:
        for xfer in view.granting:
            add(BU, ("suspicion", rank, xfer), Step.run, rank, ("suspect", xfer))
    if budget[OV]:
        for inc in view.fencing:
            add(OV, ("fence overdue", rank, inc), Step.run, rank, ("overdue", inc))
    if budget[PS]:
        for k in range(setup.senders):
            add(PS, ("sender believed lost", rank, k), Step.run, rank, ("silent", f"s{k}"))


def _cancel(step: Step, rank: int, room: int) -> None:
    want = step.wants[rank * step.setup.rooms + room]
    step.quitting = rank > 0 and want.xfer in step.world.view(step.procs[rank]).promised
    step.run(rank, ("cancel", want.xfer))
    if step.wants[rank * step.setup.rooms + room].end == "w":
        raise Violation("CN-1 a cancel is not seen by its caller at once")


def _failed(step: Step, f: Flight) -> None:
    step.flights = tuple(g for g in step.flights if (g.sender, g.incarnation, g.write, g.at) != f[:4])
    step.run(f.sender, ("failed", f.write, f.at))


def _unknown(step: Step, sender: int, write: tuple[int, int, int, int]) -> None:
    step.flights = tuple(
        f._replace(unknown=True) if f.sender == sender and f.write == write and not f.placed else f
        for f in step.flights
    )
    step.run(sender, ("unknown", write))


def _sender_crash(step: Step, process: int) -> None:
    setup, world = step.setup, step.world
    old = world.incarnation(step.procs[process])
    for rank in range(setup.ranks):  # whoever goes on speaking to the old incarnation learns of the new one
        step.net |= world.repeated((step.procs[rank],))
        step.run(rank, ("heartbeat", world.shop.build.name(process)))
    step.net |= _introductions(step, process)
    step.procs[process] = world.shop.fresh(process, old + 1)
    if "no_proof" not in setup.mutant:
        step.proofs = tuple(sorted(
            [*step.proofs] + [Proof(rank, process, old) for rank in range(setup.ranks)]
        ))  # fmt: skip
    for room, offer in enumerate(step.offers):
        if step.process_of(room) != process:
            continue
        if offer.end == "w":
            step.set_offer(room, Offering("", 0, offer.content if setup.same else offer.content + 8, 0, False))
        elif offer.end:
            step.set_offer(room, offer._replace(serial=0, released=True))
    if not setup.late_offers:
        for room, offer in enumerate(step.offers):
            if step.process_of(room) == process and offer.end == "":
                step.offer(room)


def _introductions(step: Step, process: int) -> int:
    """The first Hellos of receivers: too late for this incarnation of the sender, and not for the next."""
    bits = 0
    for k, mail in enumerate(step.world.shop.mail):
        if mail.to == process and isinstance(mail.message, m.Hello) and not mail.message.dst:
            number = step.procs[int(mail.route[1:])]
            now, said = step.world.incarnation(number), mail.message.src
            if said < now or (said == now and step.world.view(number).asked):
                bits |= 1 << k
    return bits


def _receiver_crash(step: Step, rank: int) -> None:
    setup, world = step.setup, step.world
    old = world.incarnation(step.procs[rank])
    step.procs[rank] = world.shop.fresh(rank, old + 1)
    step.memory = (*step.memory[:rank], (None,) * setup.pool, *step.memory[rank + 1 :])
    step.rows = tuple(row for row in step.rows if row[0][0] != rank)
    step.gathers = tuple(job for job in step.gathers if job.rank != rank)
    step.proofs = tuple(sorted(
        [p for p in step.proofs if p.to != rank]
        + [Proof(setup.ranks + k, rank, old) for k in range(setup.senders)]
    ))  # fmt: skip
    for room in range(setup.rooms):
        want = step.wants[rank * setup.rooms + room]
        if want.end == "w":
            step.receive(rank, room)
        else:
            step.set_want(rank, room, Want(want.end, 0))


def _again(step: Step, room: int) -> None:
    offer = step.offers[room]
    step.set_offer(room, Offering("", 0, offer.content + 16, 0, False))
    step.offer(room)
    for rank in range(step.setup.ranks):
        step.receive(rank, room)
