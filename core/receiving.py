"""The language side: carries out what the receiver machine decides.

Pool memory, the proofs that quarantined blocks wait for, and every timer of a transfer and of a peer.

Long because what one thread does for the receiver stands in one file; gathers are in gathering.py.
"""

from __future__ import annotations

import logging
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tensorferry.core import devices
from tensorferry.core import effects as fx
from tensorferry.core import messages as m
from tensorferry.core.allocator import BlockPool, Choose, Tenant, lowest_runs
from tensorferry.core.arguments import integer, text
from tensorferry.core.buffers import Destination, PoolBuffers
from tensorferry.core.carriers import Reach
from tensorferry.core.digest import MODES
from tensorferry.core.endpoint import Endpoint, closed_error
from tensorferry.core.errors import (
    BadCall,
    DeadlineExceeded,
    DeviceError,
    FerryError,
    InternalError,
    PeerLost,
    PeerUnreachable,
    PoolTimeout,
    ProtocolViolation,
)
from tensorferry.core.gathering import Gatherer
from tensorferry.core.group import SOLO, Group
from tensorferry.core.handles import ReceiveTransfer
from tensorferry.core.layout import AUX_WORDS, Geometry, Layout
from tensorferry.core.policy import receiver_policy
from tensorferry.core.receiver import ReceiverMachine
from tensorferry.core.selection import Verdict
from tensorferry.core.settings import Settings
from tensorferry.core.timing import Troubles, bump_pause
from tensorferry.core.transfer import Phase, Transfer
from tensorferry.core.transport import Transport

if TYPE_CHECKING:
    import torch

log = logging.getLogger("tensorferry.receiver")

ROUTE_SECONDS = 30.0
"""How long a control connection stays open that no room uses: the next room from there finds it warm."""

_AUX = struct.Struct(f"<{AUX_WORDS}q")


@dataclass(slots=True)
class Known:
    """A sender's incarnation as the transports know it, watched until it is gone or nothing of it is left."""

    route: str
    reach: Reach


class Receiver(Endpoint):
    """Receives rooms into a pool of its own. `group`: this rank's place, if there are several.

    `transports` (one, or several to choose from per sender) are used by this endpoint alone and closed with it.
    `choose` picks blocks (for tests of the protocol),
    `poison` fills free blocks with a pattern and looks for it when they are granted (see `stale_writes`).
    Raises ConfigError for a bad leader's address, TransportError or OSError where the pool's memory cannot be had.
    """

    def __init__(
        self,
        layout: Layout,
        transports: Transport | Sequence[Transport],
        settings: Settings,
        *,
        group: Group | None = None,
        name: str = "",
        choose: Choose = lowest_runs,
        poison: bool = False,
        passed_over: Sequence[Verdict] = (),
    ) -> None:
        """`passed_over`: transports that whoever opened these did not open, each with the reason."""
        group = group or SOLO
        leads = group.ranks > 1 and group.leads
        self.group = group
        self.geometry = Geometry(settings.block_size, settings.pool_blocks, settings.slabs)
        self.stale_writes: list[str] = []
        """With `poison`: writes found in blocks that nobody had been granted. Empty, unless there is a defect."""
        self._poisoned: set[int] = set(range(settings.pool_blocks)) if poison else set()
        self._transfers: dict[int, ReceiveTransfer] = {}  # by xfer, until the end
        self._known: dict[int, Known] = {}  # by sender incarnation
        self._heard: dict[str, float] = {}
        self._stuck_slabs: dict[int, float] = {}
        self._troubles = Troubles()

        def pick(pieces: list[tuple[int, int]], n: int) -> list[int]:
            chosen = choose(pieces, n)
            self._check_poison(chosen)
            return chosen

        pool = devices.place("pool_device", settings.pool_device)
        self._destination = devices.place("destination_device", settings.destination_device)
        self._device = devices.between(pool, self._destination)
        bind = group.leader if leads else ""
        super().__init__(layout, transports, settings, bind=bind, name=name, place=pool, passed_over=passed_over)
        try:
            self.leader_address = self._control.address if leads else group.leader
            if group.ranks > 1 and not group.leads and group.leader:
                self._control.connect(group.leader)
            self._buffers = PoolBuffers(self.carriers, layout, self.geometry, device=self._device, poison=poison)
            self._undo.callback(self._buffers.close)
            slabs = self.geometry.slab_count
            hello = m.Hello(
                src=self.incarnation, dst=0, min_live=1, version=m.PROTOCOL_VERSION, name=self.name,
                layout=layout.fingerprint, block_size=settings.block_size, pool_blocks=settings.pool_blocks,
                slabs=slabs, generations=m.pack_generations([1] * slabs),
                offers=self.carriers.offers(self._buffers.regions()), revision=1, ack=0,
            )  # fmt: skip
            policy = receiver_policy(settings, layout, self.geometry)
            blocks = BlockPool(settings.pool_blocks, self.geometry.blocks_per_slab, pick)
            self.machine = ReceiverMachine(hello, blocks, policy, group)
            self._gatherer = Gatherer(self._buffers, self.machine, self._do, self._troubles)
            self._start()
        except BaseException:
            self._undo.close()
            raise

    # ---- what callers do ---------------------------------------------------------------------------------------

    def receive(self, room: int, sender: str, *, dummy: bool = False) -> ReceiveTransfer:
        """Want `room` from the sender at control address `sender`. Returns at once.

        `dummy`: this rank takes part in the group's decision and receives no data. Raises RoomInUse, Overloaded, or
        ConfigError for what is no address.
        """
        room, sender = integer(room, "room"), text(sender, "the sender's address")
        transfer = ReceiveTransfer(self, room, sender)

        def start() -> None:
            new = sender not in self._control.routes
            self._control.connect(sender)
            offers = self.carriers.news(self.machine.hello.offers, time.monotonic(), self._buffers.regions())
            self._do(self.machine.described(offers))
            try:
                xfer, effects = self.machine.receive(room, sender, dummy=bool(dummy))
            except FerryError:
                if new:
                    self._control.disconnect(sender)
                raise
            transfer._xfer = xfer
            self._transfers[xfer] = transfer
            self._do(effects)

        self._call(start)
        return transfer

    @property
    def free_blocks(self) -> int:
        """Blocks of the pool that nobody can write to."""
        return int(self._call(lambda: self.machine.pool.free_count))

    @property
    def pool_blocks(self) -> int:
        return self.settings.pool_blocks

    def _cancel(self, transfer: ReceiveTransfer, error: FerryError) -> None:
        if not transfer.done:
            self._call(lambda: self._do(self.machine.cancel(transfer._xfer, error)), later=True)

    def _resolve(self, transfer: ReceiveTransfer, run: bool) -> None:
        if not transfer.done:
            self._call(lambda: self._do(self.machine.resolve(transfer._xfer, run)))

    def _expose(self, transfer: ReceiveTransfer) -> None:
        def expose() -> None:
            if transfer._xfer in self.machine.transfers:
                self.machine.expose(transfer._xfer)

        if not transfer.done:
            self._call(expose)

    def _rows(self, transfer: ReceiveTransfer, start: int, stop: int) -> Mapping[str, torch.Tensor] | None:
        """Views of rows that have arrived, in the destination. None: there is none any more."""
        destination = self._gatherer.destinations.get(transfer._xfer)
        if destination is not None:
            try:
                return destination.rows(start, stop)
            except BadCall:
                log.debug("room %d ended while its rows were read", transfer.room)  # the result has them
        return None

    # ---- effects -----------------------------------------------------------------------------------------------

    def _on_message(self, route: str, message: m.Message, now: float) -> None:
        if route in self.machine.peers:
            self._heard[route] = now
        if isinstance(message, m.Announce):
            self._show_way(route, message)
        elif isinstance(message, m.Done):
            self._check_path(message)
        elif isinstance(message, m.Fenced) and not self._settle(
            lambda t: (t.xfer, t.sender) == (message.xfer, message.src) and t.epoch <= message.upto
        ):
            return
        self._do(self.machine.on_message(route, message))

    def _show_way(self, route: str, announced: m.Announce) -> None:
        t, transfer = self.machine.transfers.get(announced.xfer), self._transfers.get(announced.xfer)
        if t is not None and transfer is not None and (t.route, t.sender) == (route, announced.src):
            transfer.transport = announced.via
            if (known := self._known.get(announced.src)) is not None:
                self._show_path(transfer, known.reach)

    def _check_path(self, done: m.Done) -> None:
        """What both sides' engines say of the path, after a write by the peer and before it counts."""
        known, transfer = self._known.get(done.src), self._transfers.get(done.xfer)
        lane = known.reach.lane_of(transfer.transport) if known is not None and transfer is not None else None
        if known is None or transfer is None or lane is None:
            return
        error = known.reach.check(lane, self.carriers.require)
        if error is None and (done.path or self.carriers.require):  # under `require` no word is not enough
            error = known.reach.hear(lane, done.path, self.carriers.require)
        self._show_path(transfer, known.reach)
        if error is not None:
            self._do(self.machine.cancel(done.xfer, error))

    def _show_path(self, transfer: ReceiveTransfer, reach: Reach) -> None:
        lane = reach.lane_of(transfer.transport)
        transfer.path = lane.path if lane is not None else ""
        transfer.verdicts = self.carriers.verdicts(reach)

    def _carry_out(self, effect: fx.Effect) -> None:
        match effect:
            case fx.Gather():
                self._gatherer.gather(effect)
            case fx.Connect(route, hello):
                self._meet(route, hello)
            case fx.Reserve(xfer):
                self._reserve(xfer)
            case fx.Drop(xfer):
                self._gatherer.destinations.pop(xfer, None)
            case fx.ReplaceSlab(slab):
                self._replace(slab)
            case fx.Ended(xfer, error):
                self._end(self._transfers.pop(xfer), error)
            case fx.Progressed(xfer):
                self._show(xfer)

    def _meet(self, route: str, hello: m.Hello) -> None:
        error: FerryError | None = None
        try:
            before = self._known.get(hello.src)
            reach = self.carriers.reach(hello, route, before.reach if before else None)
            self._known[hello.src] = Known(route, reach)
            if before is None:
                log.info("sender %s can reach us by %s", route, "; ".join(map(str, reach.verdicts)))
        except FerryError as problem:
            log.warning("sender %s cannot be used: %s", route, problem)
            error = problem
        self._do(self.machine.connected(route, error))

    def _reserve(self, xfer: int) -> None:
        t = self.machine.transfers[xfer]
        assert t.facts is not None
        try:
            if t.facts.integrity not in MODES:
                raise ProtocolViolation(f"unknown integrity {t.facts.integrity!r}", room=t.room, peer=t.route)
            names = self.layout.present(t.facts.present)
            self._gatherer.destinations[xfer] = Destination(
                self.layout, 0 if t.dummy else t.facts.total, names, device=self._device, place=self._destination
            )
        except ValueError as problem:
            self._do(self.machine.fail(xfer, ProtocolViolation(str(problem), room=t.room, peer=t.route)))
        except FerryError as problem:
            self._do(self.machine.fail(xfer, problem))

    def _replace(self, slab: int) -> None:
        """F3: late writes land in the old memory, which stays mapped in the graveyard until they cannot come."""
        blocks = set(self.geometry.slab_blocks(slab))
        keys = {tenant.sender for block, tenant in self.machine.pool.quarantined.items() if block in blocks}
        try:
            self._buffers.replace(slab, keys)
        except (FerryError, OSError) as problem:
            log.error("no fresh memory for slab %d yet: %s", slab, problem)
            self._stuck_slabs.setdefault(slab, 0.0)
            return
        self._stuck_slabs.pop(slab, None)
        log.warning("slab %d was replaced: a lost peer may still write to its old memory", slab)
        self._do(self.machine.slab_replaced(slab, self.carriers.offers(self._buffers.regions())))

    def _settle(self, ending: Callable[[Tenant], bool]) -> bool:
        """Blocks come out of quarantine, or will the moment they enter it, for their sender is gone: what their last
        writes placed has to be where it belongs before the next tenant's writes follow, also where nobody is going to
        read it (INT-3). False where a GPU does not see to it: that proof is none, and they get fresh memory in time."""
        pool = self.machine.pool
        late = [block for block, tenant in (pool.quarantined | pool.granted).items() if ending(tenant)]
        return all(self._flush(slab) for slab in {self.geometry.slab_of(block) for block in late})

    def _flush(self, slab: int) -> bool:
        """A GPU that refuses once may refuse for good, and is asked again and again."""
        try:
            self._buffers.flush(slab)
        except DeviceError as problem:
            if (more := self._troubles.worth_telling(problem.cause, time.monotonic())) is not None:
                log.warning("what was written to the pool is not flushed: %s%s", problem, more)
            return False
        return True

    def _do(self, effects: Iterable[fx.Effect]) -> None:
        super()._do(effects)
        if self._buffers.poisoning:
            free = set(self.machine.pool.free_blocks)
            for block in free - self._poisoned:
                # What a fence freed may be placed and not visible yet: it must not become so over the pattern.
                if self._flush(self.geometry.slab_of(block)):
                    self._buffers.poison(block)
                else:
                    free.discard(block)
            self._poisoned = free

    def _check_poison(self, blocks: Iterable[int]) -> None:
        for block in self._poisoned.intersection(blocks):
            try:
                self._buffers.check_poison(block)
            except InternalError as problem:
                self.stale_writes.append(str(problem))
                log.error("%s", problem)

    # ---- what callers see --------------------------------------------------------------------------------------

    def _show(self, xfer: int) -> None:
        transfer, t = self._transfers.get(xfer), self.machine.transfers.get(xfer)
        if transfer is not None and t is not None:
            self._copy_view(transfer, t)
            self._changed[transfer] = None
            transfer._published()

    def _copy_view(self, transfer: ReceiveTransfer, t: Transfer) -> None:
        order = list(type(transfer.status))
        if t.facts is not None:
            transfer.total_tokens = t.facts.total
            transfer._log = t.log
        ready = self.machine.sent_tokens(t)
        transfer.sent_tokens, transfer.ready_tokens = max(transfer.sent_tokens, ready), ready
        transfer.rows_complete = t.phase is Phase.VOTED and t.error is None
        if not t.told and order.index(t.status) > order.index(transfer.status):
            transfer.status = t.status

    def _end(self, transfer: ReceiveTransfer, error: FerryError | None) -> None:
        t = self.machine.transfers.get(transfer._xfer)
        if t is not None:
            self._copy_view(transfer, t)
        destination = self._gatherer.destinations.pop(transfer._xfer, None) if error is None else None
        if destination is not None and t is not None and t.facts is not None:
            transfer._result = destination.result(_AUX.unpack(t.facts.aux))
            transfer.rows_complete = True
            transfer.status = type(transfer.status)("SUCCESS")
        else:
            transfer.error = error or ProtocolViolation("the announcement made no sense", room=transfer.room)
            transfer.status = type(transfer.status)("FAILED")
        self._changed[transfer] = None
        transfer._published()

    # ---- time --------------------------------------------------------------------------------------------------

    def _progress(self) -> bool:
        self._gatherer.finish()
        return self._gatherer.busy

    @property
    def _copies(self) -> bool:
        return self._gatherer.busy

    def _tick(self, now: float) -> bool:
        machine = self.machine
        keys: set[Any] = set()
        for t in list(machine.transfers.values()):
            self._look_after(partial(self._watch_transfer, t, now, keys), partial(self._fail, t.xfer))
        for xfer in machine.decisions.uses.keys() - machine.transfers.keys():  # verdicts that somebody has not heard
            keys.add(("verdict", xfer))
            if self._watches.repeat(("verdict", xfer), xfer, now):
                self._guard(lambda xfer=xfer: self._do(machine.resend(xfer)))  # type: ignore[misc]
        for route in {t.route for t in machine.transfers.values()}:
            self._guard(partial(self._watch_route, route, now, keys))
        self._guard(partial(self._leave_idle_routes, now, keys))
        self._watch_quarantine(now, keys)
        for slab in [s for s, since in self._stuck_slabs.items() if now - since > 1.0]:
            self._stuck_slabs[slab] = now
            self._guard(partial(self._replace, slab))
        self._watches.keep_only(keys)
        return bool(machine.transfers or self._gatherer.busy)

    def _fail(self, xfer: int, error: FerryError) -> None:
        self._do(self.machine.fail(xfer, error))

    def _watch_transfer(self, t: Transfer, now: float, keys: set[Any]) -> None:
        watches, s, xfer = self._watches, self.settings, t.xfer
        keys |= {("xfer", xfer), ("deadline", xfer)}
        age = watches.age(("deadline", xfer), now)
        if watches.repeat(("xfer", xfer), t.touched, now):
            self._do(self.machine.resend(xfer))
        if t.paused:
            keys.add(("paused", xfer, t.bumps))
            if watches.age(("paused", xfer, t.bumps), now) >= bump_pause(t.bumps):
                self._do(self.machine.resume_grants(xfer))
        if not t.told and not self.group.leads and self.group.leader and not self.machine.leader_inc:
            if age > s.peer_timeout:  # the caller is told; the room itself is the leader's to end, should it ever come
                nobody = f"the group's leader has not answered within peer_timeout ({s.peer_timeout:g} s)"
                hint = "Check the group's leader address and that rank 0 is running"
                self._do(self.machine.cancel(xfer, PeerUnreachable(nobody, peer=self.group.leader, hint=hint)))
            return
        overdue = t.live and not self.group.leads and age > s.transfer_deadline + s.peer_timeout
        if overdue and t.told:  # its caller has left, and whoever could have decided has had its deadline
            self._do(self.machine.resolve(xfer, run=False))
        elif overdue:
            none = (
                f"the leader has not told what became of the room within transfer_deadline ({s.transfer_deadline:g} s)"
            )
            self._do(self.machine.cancel(xfer, t.error or t.plea or DeadlineExceeded(none, peer=self.group.leader)))
        if not t.live or t.error is not None or t.plea is not None:
            return
        if age > s.transfer_deadline:
            waits = t.phase is Phase.QUEUED or (xfer in self.machine.line and not t.holds)
            kind = PoolTimeout if waits else DeadlineExceeded
            what = "no room came free" if waits else "not finished"
            self._do(self.machine.fail(xfer, kind(f"{what} within transfer_deadline ({s.transfer_deadline:g} s)")))
        elif t.facts is None and age > s.announce_deadline:
            error = DeadlineExceeded(
                f"the sender did not announce the room within announce_deadline ({s.announce_deadline:g} s)",
                hint="Is the room number right, and did the embedding side send it?",
            )
            self._do(self.machine.fail(xfer, error))

    def _watch_route(self, route: str, now: float, keys: set[Any]) -> None:
        """Is the sender there? Met: heartbeats, and silence is noticed. Not met yet: it has peer_timeout to answer."""
        peer, s = self.machine.peers[route], self.settings
        if peer.inc:
            keys.add(("met", route))
            silent = now - max(self._heard.get(route, now), now - self._watches.age(("silence", route), now))
            keys.add(("silence", route))
            if silent > s.peer_timeout:
                error = PeerLost(f"the sender has been silent for {silent:.1f} s", peer=route)
                self._do(self.machine.peer_silent(route, error))
            elif self._watches.every(("met", route), s.heartbeat, now):
                self._do(self.machine.heartbeat(route))
        else:
            for t in [t for t in self.machine.transfers.values() if t.route == route]:
                keys.add(("meeting", t.xfer))  # each by its own clock: what a lost sender left here says nothing new
                if self._watches.age(("meeting", t.xfer), now) > s.peer_timeout:
                    nobody = f"nobody answered within peer_timeout ({s.peer_timeout:g} s)"
                    if trouble := self._control.trouble(route):
                        nobody += f"; its host is not found: {trouble}"
                    self._do(self.machine.peer_silent(route, PeerUnreachable(nobody, peer=route), t.xfer))

    def _leave_idle_routes(self, now: float, keys: set[Any]) -> None:
        """Senders come and go, often on a new port each time: what nothing is wanted from is let go after a while."""
        busy = {t.route for t in self.machine.transfers.values()} | {self.group.leader}
        for route in [route for route in self._control.routes if route not in busy]:
            keys.add(("idle", route))
            if self._watches.age(("idle", route), now) > ROUTE_SECONDS and (
                route not in self.machine.peers or self.machine.forget_peer(route)
            ):
                self._control.disconnect(route)
                self._heard.pop(route, None)

    def _watch_quarantine(self, now: float, keys: set[Any]) -> None:
        """Proofs for blocks in quarantine: is their sender gone (F4)? Is its fence (F2) overdue, so that F3 is due?"""
        waiting = {tenant.sender for tenant in self.machine.pool.quarantined.values()}
        current = {peer.inc for peer in self.machine.peers.values()}
        bound = {t.sender for t in self.machine.transfers.values()}
        for inc, known in list(self._known.items()):
            wanted = inc in current | waiting | bound or self._buffers.graveyard.nbytes_of(inc) > 0
            self._guard(partial(self._watch_known, inc, known, wanted))
        for inc in waiting:
            keys.add(("quarantine", inc))
            if self._watches.age(("quarantine", inc), now) > self.settings.peer_timeout:
                self._guard(lambda inc=inc: self._do(self.machine.fence_overdue(inc)))  # type: ignore[misc]

    def _watch_known(self, inc: int, known: Known, wanted: bool) -> None:
        """`wanted`: something of this sender is left, or may come."""
        if known.reach.quiet:
            if self._settle(lambda t: t.sender == inc):
                del self._known[inc]
                known.reach.disconnect()
                self._buffers.graveyard.exhume(inc)
                self._do(self.machine.peer_gone(inc))
        elif not wanted:
            del self._known[inc]
            known.reach.disconnect()

    # ---- the end -----------------------------------------------------------------------------------------------

    def _blame(self, message: m.Message, error: FerryError) -> None:
        if isinstance(message, m.OfTransfer) and message.dst == self.incarnation:
            self._do(self.machine.fail(message.xfer, error))

    def _wind_down(self) -> bool:
        for xfer, transfer in list(self._transfers.items()):
            self._do(self.machine.cancel(xfer, closed_error(transfer.room)))
        return not self.machine.transfers and not self.machine.decisions.uses

    def _release(self) -> None:
        for transfer in list(self._transfers.values()):
            self._end(transfer, closed_error(transfer.room))
        self._gatherer.close()
        self._buffers.close()
        self.carriers.close()
