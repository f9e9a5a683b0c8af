"""What a state's checks need to know of a machine, read once from each interned snapshot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tensorferry.conformance.explore.machines import Machine
from tensorferry.core.allocator import Tenant
from tensorferry.core.errors import InternalError
from tensorferry.core.receiver import ReceiverMachine
from tensorferry.core.sender import SenderMachine
from tensorferry.core.transfer import Phase


@dataclass(slots=True)
class View:
    """`wrong`: an invariant that this machine breaks by itself. `left`: what keeps it from being clean (LV-2)."""

    wrong: str = ""
    left: str = ""
    undecided: str = ""  # verdicts that a follower has not heard, so far as the leader knows
    granted: dict[int, Tenant] = field(default_factory=dict)
    quarantined: dict[int, Tenant] = field(default_factory=dict)
    generations: list[int] = field(default_factory=list)
    per_slab: int = 1
    live: tuple[tuple[int, int], ...] = ()  # (xfer, room) of live transfers
    granting: tuple[int, ...] = ()  # xfers with blocks out
    repeating: tuple[int, ...] = ()  # what a receiver's timers speak about
    fencing: tuple[int, ...] = ()  # incarnations with blocks in quarantine
    promised: tuple[int, ...] = ()  # xfers of a follower that has voted yes
    given_up: tuple[int, ...] = ()  # xfers that wait for a verdict only
    asked: bool = False  # for any room, ever
    slots: tuple[int, ...] = ()
    writes: dict[tuple[int, int, int, int], frozenset[int]] = field(default_factory=dict)
    receivers: tuple[int, ...] = ()


def look(machine: Machine, window: int | str) -> View:
    return _receiver(machine, window) if isinstance(machine, ReceiverMachine) else _sender(machine)


def _receiver(r: ReceiverMachine, window: int | str) -> View:
    view = View(
        granted=dict(r.pool.granted), quarantined=dict(r.pool.quarantined), generations=list(r.generations),
        per_slab=r.pool.blocks_per_slab,
        live=tuple((t.xfer, t.room) for t in r.transfers.values() if t.live),
        granting=tuple(t.xfer for t in r.transfers.values() if t.out and t.live),
        repeating=tuple(sorted(r.transfers.keys() | r.decisions.uses.keys())),
        promised=tuple(t.xfer for t in r.transfers.values() if t.phase is Phase.VOTED and t.error is None),
        given_up=tuple(t.xfer for t in r.transfers.values() if t.error is not None or t.plea is not None),
        asked=r.next_xfer > 1,
        fencing=tuple(sorted({q.sender for q in r.pool.quarantined.values()})),
    )  # fmt: skip
    view.wrong = _wrong(r, window)
    tables = {
        "transfers": r.transfers, "rooms": r.rooms, "queue": r.queue, "line": r.line, "unlent": r.unlent,
        "granted": r.pool.granted, "quarantined": r.pool.quarantined, "retiring": r.pool.retiring,
        "replacing": r.replacing, "budget": r.budget_used,
    }  # fmt: skip
    view.left = _kept(tables)
    view.undecided = f"verdicts={list(r.decisions.uses)}" if r.decisions.uses else ""
    return view


def _kept(tables: Mapping[str, object]) -> str:
    said = ((name, list(kept) if isinstance(kept, dict) else kept) for name, kept in tables.items() if kept)
    return ", ".join(f"{name}={kept}" for name, kept in said)


def _wrong(r: ReceiverMachine, window: int | str) -> str:
    try:
        r.pool.audit()
    except InternalError as problem:
        return f"GR-1 {problem}"
    held: dict[int, Tenant] = {}
    for t in r.transfers.values():
        mine = {block: Tenant(t.xfer, t.sender, t.epoch, index) for index, block in t.out.items()}
        mine |= {block: tenant for block, tenant, _ in t.gathering.values()}
        if len(mine) != t.holds or mine.keys() & held.keys():
            return "GR-1 one block is held twice"
        held |= mine
        if t.out and t.phase not in (Phase.OPENING, Phase.ACTIVE):
            return f"AL-1 xfer {t.xfer} holds blocks while {t.phase.name}"
        if t.phase is Phase.QUEUED and t.charge:
            return f"AL-1 xfer {t.xfer} is charged while it waits"
        if isinstance(window, int) and t.phase is Phase.ACTIVE and t.holds > max(window, r.policy.first_grant * t.lent):
            return f"GR-6 xfer {t.xfer} holds {t.holds} blocks, the window is {window}"
        if t.facts is not None and t.out and t.announced and max(t.out) >= r.policy.blocks(t.facts.total):
            return f"GR-6 xfer {t.xfer} holds a grant beyond its length"
    if held != r.pool.granted:
        return f"GR-1 the transfers hold {held}, the pool granted {r.pool.granted}"
    strays = [tenant for tenant in r.pool.quarantined.values() if tenant.xfer not in r.transfers]
    if strays:
        return f"LV-2 quarantine of {strays} belongs to nobody"
    charged = sum(t.charge for t in r.transfers.values()) if r.group.leads else 0
    if not 0 <= r.budget_used <= r.policy.budget or charged != r.budget_used:
        return f"R9 budget used {r.budget_used} of {r.policy.budget}, charged {charged}"
    rooms = {t.room: t.xfer for t in r.transfers.values() if t.live}
    if rooms != r.rooms or len(rooms) != sum(t.live for t in r.transfers.values()):
        return f"R1 live rooms {rooms}, table {r.rooms}"
    if r.line.keys() - r.transfers.keys() or r.unlent.keys() - r.transfers.keys() or set(r.queue) - r.transfers.keys():
        return "LV-2 a line names a transfer that is gone"
    return ""


def _sender(s: SenderMachine) -> View:
    view = View(
        slots=tuple(s.slots),
        writes={key: frozenset(w.outstanding) for key, w in s.writes.items()},
        receivers=tuple(inc for inc, r in s.receivers.items() if not r.gone),
    )
    where = {b.key: slot.id for slot in s.slots.values() for b in slot.bindings.values()}
    if where != s.where:
        view.wrong = f"LV-2 bindings {where}, table {s.where}"
    elif set(s.rooms.values()) - s.slots.keys():
        view.wrong = f"LV-2 rooms {s.rooms} name slots that are gone"
    tables = {
        "slots": s.slots, "where": s.where, "rooms": s.rooms, "writes": s.writes, "orphans": s.orphans,
    }  # fmt: skip
    view.left = _kept(tables)
    return view
