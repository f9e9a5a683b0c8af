"""The receiver's story: it owns the truth. It grants blocks for what is missing, counts what has arrived, and when
anything at all goes wrong it does one thing: a new epoch, the old blocks into quarantine, and grants again.

Long because every decision is here, to be read from top to bottom; rule ids stand beside the lines that keep them
(docs/design.md names the families). What the machine remembers and how it says things is in receiver_state.py.

Sans-IO: no socket, thread, clock or tensor. Every public method is an event; it returns the effects for a driver to
carry out. `snapshot` and `restore` make this very class the subject of the exhaustive search.

    OPENING   the sender is asked (Open); nothing is announced yet; may hold a loan
    QUEUED    announced; waits for its destination and holds nothing (AL-1)
    ACTIVE    has its destination; blocks are granted, written, gathered and free again
    VOTED     every row is here, or this rank gave up: the group decides
    CLOSING   over for the caller; stays until the sender has heard and no block of it is in quarantine
"""

from __future__ import annotations

from msgspec.structs import replace

from tensorferry.core import errors as e
from tensorferry.core import messages as m
from tensorferry.core.allocator import Tenant
from tensorferry.core.effects import Connect, Drop, Effect, Ended, Gather, ReplaceSlab, Reserve
from tensorferry.core.ledger import Ranges
from tensorferry.core.receiver_state import ReceiverState, wire_error
from tensorferry.core.rounds import RoundLog
from tensorferry.core.transfer import Facts, Peer, Phase, Transfer


class ReceiverMachine(ReceiverState):
    """All transfers of one language-side endpoint over one pool: the decisions."""

    # ============================================================ events from the caller

    def receive(self, room: int, route: str, *, dummy: bool = False) -> tuple[int, list[Effect]]:
        """Want `room` from the sender at `route`. Returns the xfer. Raises RoomInUse or Overloaded."""
        if room in self.rooms:
            raise e.RoomInUse(f"room {room} is being received already", room=room, peer=route)
        if len(self.transfers) >= self.policy.max_rooms:
            raise e.Overloaded(f"{len(self.transfers)} rooms are live or closing", room=room, hint="Raise max_rooms")
        peer = self.peers.setdefault(route, Peer())
        if sum(peer.buried.values()) > self.policy.quarantine_quota:
            raise e.Overloaded(
                f"{sum(peer.buried.values())} blocks may still be written by lost processes of this peer",
                room=room, peer=route, hint="End those processes for good, or restart this side",
            )  # fmt: skip
        t = Transfer(self.next_xfer, room, route, dummy)
        self.next_xfer += 1  # never used again in this incarnation (ID-3)
        self.transfers[t.xfer] = t
        self.rooms[room] = t.xfer
        if self.group.ranks > 1 and self.group.leads:
            self.decisions.open(t.xfer, room, self.group.ranks)
        if peer.inc > peer.floor and peer.usable:  # one that is proved gone is not asked, and lent nothing
            self._open(t, peer)
        else:
            self._send(route, self._hello(peer))  # no grant before Hello is answered: a wrong address costs no block
        self._query(t)
        return t.xfer, self._step()

    def cancel(self, xfer: int, error: e.FerryError) -> list[Effect]:
        """The caller gives up. Final for the caller at once; blocks go through quarantine (CN-1)."""
        t = self.transfers.get(xfer)
        if t is not None and t.live:
            self._tell(t, error)
            self._give_up(t, error)
        return self._step()

    def fail(self, xfer: int, error: e.FerryError) -> list[Effect]:
        """A deadline passed, or the driver could not do what was asked."""
        t = self.transfers.get(xfer)
        if t is not None and t.live:
            self._give_up(t, error)
        return self._step()

    def resolve(self, xfer: int, run: bool) -> list[Effect]:
        """The framework's own broadcast says run or drop. Raises BadCall for `run` before the rows are here."""
        t = self.transfers.get(xfer)
        if t is not None and t.live:
            if run and not (t.phase is Phase.VOTED and t.error is None):
                raise e.BadCall("resolve('run') before every row of this rank is here", room=t.room)
            self._end(t, None if run else t.error or e.Cancelled("the group dropped the room", room=t.room))
        return self._step()

    def expose(self, xfer: int) -> None:
        """Rows are about to be shown to the caller before the end: from now on other content is an error."""
        self.transfers[xfer].exposed = True

    # ============================================================ events from the driver

    def gathered(self, xfer: int, indices: list[int]) -> list[Effect]:
        """These blocks' rows are verified and copied out, and the copy has finished (WM-2, GR-7)."""
        t = self.transfers[xfer]
        for index in indices:
            block, tenant, wanted = t.gathering.pop(index)
            self.pool.free(block, tenant)
            if wanted and t.live:
                t.have.add(index)
                t.log.arrived(index, self.sent_tokens(t))
            else:
                t.taken.discard(index)
        self._touch(t)
        if t.phase is Phase.ACTIVE:
            self._want(t)
            self._check_complete(t)
        self._maybe_forget(t)
        return self._step()

    def corrupt(self, xfer: int, indices: list[int]) -> list[Effect]:
        """A digest did not match: never delivered, a new epoch (INT-1)."""
        t = self.transfers[xfer]
        for index in indices:
            block, tenant, _ = t.gathering.pop(index)
            self._quarantine(block, tenant)
            self._take_back(t, index)
            if tenant.sender == t.sender:
                self._to_sender(t, m.Revoke, upto=tenant.epoch)
        if t.phase is Phase.ACTIVE:
            self._bump(t, e.IntegrityError(f"block {indices[0]} arrived with a wrong digest", room=t.room))
        self._maybe_forget(t)
        return self._step()

    def connected(self, route: str, error: e.FerryError | None) -> list[Effect]:
        """The transport has taken, or refused, the peer's descriptor."""
        peer = self.peers[route]
        peer.usable = error is None
        if error is not None:
            peer.revision = -1  # the next Hello is a new chance: no failure blacklists a peer
        for t in self._of_peer(route):
            if error is not None:
                self._give_up(t, error)
            elif t.sender != peer.inc:
                self._open(t, peer)
        return self._step()

    def peer_silent(self, route: str, error: e.FerryError, xfer: int | None = None) -> list[Effect]:
        """Nothing was heard for too long, by `xfer` or (None) by all. Suspicion ends them; it frees nothing (GR-3)."""
        for t in [t for t in self.transfers.values() if t.route == route and xfer in (None, t.xfer)]:
            if t.live and t.error is None:
                self._give_up(t, error)
            if not t.live:
                t.closed = True  # it will not answer Close either
                self._refund(t)
            self._maybe_forget(t)
        if route in self.peers:
            peer = self.peers[route]
            peer.inc, peer.usable, peer.ack, peer.revision = 0, False, 0, -1  # whoever answers next is welcome
        return self._step()

    def peer_gone(self, sender: int) -> list[Effect]:
        """F4: that incarnation is proved gone; nothing of it can land any more. Said once, so that it is remembered
        for blocks that come into quarantine later: the successor's Hello may be slower than the proof."""
        self.pool.gone(sender)
        self.gone.add(sender)
        for peer in self.peers.values():
            peer.buried.pop(sender, None)
            if peer.inc == sender:
                peer.floor = sender
        for t in list(self.transfers.values()):
            if t.sender == sender and not t.live:
                t.closed = True
                self._refund(t)
            self._maybe_forget(t)
        self._recall_gone()
        return self._step()

    def fence_overdue(self, sender: int) -> list[Effect]:
        """F2 does not come: replace, never revoke (R4). The slabs of that incarnation's quarantine are retired."""
        for block, tenant in self.pool.quarantined.items():
            if tenant.sender == sender:
                self.pool.retire(self.pool.slab_of(block))
        return self._step()

    def slab_replaced(self, slab: int, offers: tuple[m.Offer, ...] | None = None) -> list[Effect]:
        """Fresh memory stands behind `slab`; our Hello says so, with the transports' new descriptors (`offers`)."""
        for tenant in self.pool.replace(slab):
            buried = self.peers[self.transfers[tenant.xfer].route].buried
            buried[tenant.sender] = buried.get(tenant.sender, 0) + 1
        self.replacing.discard(slab)
        self.generations[slab] += 1
        self._revise(self.hello.offers if offers is None else offers)
        for t in list(self.transfers.values()):
            self._maybe_forget(t)
        return self._step()

    def described(self, offers: tuple[m.Offer, ...]) -> list[Effect]:
        """What the transports say of themselves by now: every sender is told, where it is news."""
        if offers != self.hello.offers:
            self._revise(offers)
        return self._step()

    def _revise(self, offers: tuple[m.Offer, ...]) -> None:
        self.hello = replace(
            self.hello, revision=self.hello.revision + 1, generations=m.pack_generations(self.generations),
            offers=offers,
        )  # fmt: skip
        for route, peer in self.peers.items():
            if peer.inc:
                self._send(route, self._hello(peer))

    def resume_grants(self, xfer: int) -> list[Effect]:
        """The back-off after a bump is over (LV-3)."""
        t = self.transfers.get(xfer)
        if t is not None and t.paused:
            t.paused = False
            self._want(t)
        return self._step()

    # ============================================================ repetition: no message is essential (MSG-2)

    def resend(self, xfer: int) -> list[Effect]:
        """Say again all that is true of a transfer, or of a decision about one, and may have been lost."""
        for route, verdict in self.decisions.unheard(xfer):
            self._send(route, verdict)
        t = self.transfers.get(xfer)
        if t is None:
            return self._take_effects()
        peer = self.peers[t.route]
        introduced = peer.usable and t.sender and peer.ack >= self.hello.revision
        if not t.closed and not introduced:  # before it, nothing else is heard
            self._send(t.route, self._hello(peer))
        if t.sender:
            waits = t.phase is not Phase.VOTED and not t.out  # nothing else says that we are still here for it
            if t.live and (waits or not t.announced):
                self._send_open(t)
            if t.phase in (Phase.ACTIVE, Phase.VOTED) and self._admits(t):
                self._to_sender(t, m.Admitted)
            if t.out:
                self._send_grant(t, sorted(t.out.items()))
            if t.phase is Phase.VOTED:
                self._send_vote(t)
            quarantined = [q.epoch for q in self.pool.quarantine_of([xfer]) if q.sender == t.sender]
            if quarantined:
                self._to_sender(t, m.Revoke, upto=max(quarantined))
            if not t.live and not t.closed:
                self._send_close(t)
        self._query(t)
        return self._take_effects()

    def heartbeat(self, route: str) -> list[Effect]:
        peer = self.peers.get(route)
        if peer is not None and peer.inc:
            self._send(route, m.Ping(src=self.inc, dst=peer.inc))
        return self._take_effects()

    # ============================================================ messages

    def on_message(self, route: str, message: m.Message) -> list[Effect]:
        """Handle one message. Whatever is stale, doubled, foreign or unknown changes nothing (MSG-1, MSG-4, ID-2)."""
        match message:
            case m.Hello():
                self._on_hello(route, message)
            case m.Query():
                self._on_query(route, message)
            case m.Verdict() if not self.group.leads and route == self.group.leader:
                self._on_verdict(message)
            case m.Ping() if message.dst == self.inc:
                self._send(route, m.Pong(src=self.inc, dst=message.src))
            case m.Pong():
                self._on_leader(route, message.src)
            case m.OfTransfer() if message.dst == self.inc:
                self._on_transfer_message(route, message)
            case _:
                self.ignored["foreign"] += 1
        return self._step()

    def _on_hello(self, route: str, hello: m.Hello) -> None:
        peer = self.peers.get(route)
        if peer is None or hello.dst != self.inc or hello.src < peer.inc or hello.src <= peer.floor:
            self.ignored["stale hello"] += 1
            return
        problem = self._incompatible(route, hello)
        if problem is not None:
            for t in self._of_peer(route):
                self._give_up(t, problem)
            return
        if hello.src > peer.inc:
            self._peer_restarted(route, hello.src)
            peer.inc, peer.revision, peer.ack, peer.usable = hello.src, -1, 0, False
        if not hello.ack and peer.ack:  # it has forgotten us, as one that serves many may
            self._send(route, self._hello(peer))
        peer.ack = max(peer.ack, hello.ack)
        if hello.revision > peer.revision:
            peer.revision = hello.revision
            self._effects.append(Connect(route, hello))

    def _incompatible(self, route: str, hello: m.Hello) -> e.FerryError | None:
        if hello.version != m.PROTOCOL_VERSION:
            return e.VersionMismatch(
                f"the sender speaks protocol {hello.version}, this side {m.PROTOCOL_VERSION}", peer=route
            )
        if hello.layout != self.hello.layout:
            return e.LayoutMismatch("the sender declares another layout", peer=route)
        if hello.block_size != self.hello.block_size:
            return e.GeometryMismatch(
                f"block size {hello.block_size} at the sender, {self.hello.block_size} here", peer=route
            )
        return None

    def forget_peer(self, route: str) -> bool:
        """Nothing is wanted from the sender at `route` any more, and nothing of it is left: True if it is forgotten."""
        peer = self.peers.get(route)
        if peer is None or peer.buried or any(t.route == route for t in self.transfers.values()):
            return False
        del self.peers[route]
        return True

    def _on_transfer_message(self, route: str, message: m.OfTransfer) -> None:
        t = self.transfers.get(message.xfer)
        if route != (t.route if t is not None else route) or route not in self.peers:
            self.ignored["not from its sender"] += 1  # whoever connects to a leader's port speaks for no sender
            return
        if isinstance(message, m.Fenced):  # whoever says it, it is about its own writes only (WS-5)
            self.pool.fenced(message.xfer, message.src, message.upto)
            if t is not None:
                self._maybe_forget(t)
            return
        if t is None or t.sender != message.src:
            self.ignored["unknown transfer"] += 1  # over, or another incarnation: creates no state (ID-3)
            if t is None and not isinstance(message, m.Closed | m.Refused):  # forgotten while the sender was silent
                self._send(route, m.Close(
                    src=self.inc, dst=message.src, min_live=self.min_live, xfer=message.xfer, code=e.PeerLost.code,
                    cause="the receiver has given this transfer up",
                ))  # fmt: skip
            return
        match message:
            case m.Announce() if t.live:
                self._on_announce(t, message)
            case m.Done() if t.phase is Phase.ACTIVE and t.announced and message.epoch == t.epoch:
                self._on_done(t, message)
            case m.Trouble() if t.live and message.epoch == t.epoch and t.phase is not Phase.VOTED:
                self._bump(t, e.from_code(message.code, message.cause, room=t.room, peer=t.route))
            case m.Commit() if t.phase is Phase.VOTED and t.error is None and self.group.leads:
                self._end(t, None)
            case m.Abort() if t.live:  # a follower asks its leader all the same (TP-4)
                self._give_up(t, e.from_code(message.code, message.cause, room=t.room, peer=t.route))
            case m.Refused() if t.live and not t.announced:
                self._give_up(t, e.from_code(message.code, message.cause, room=t.room, peer=t.route))
            case m.Closed() if not t.live:
                t.closed = True
                self._refund(t)
                self._maybe_forget(t)
            case _:
                self.ignored["stale"] += 1

    # ============================================================ opening, announcing, admitting

    def _open(self, t: Transfer, peer: Peer) -> None:
        t.sender = peer.inc
        self._send_open(t)
        if t.phase is Phase.OPENING and not t.lent and not t.dummy and self.policy.optimistic:
            self.unlent[t.xfer] = None
        self._touch(t)

    def _on_announce(self, t: Transfer, a: m.Announce) -> None:
        if t.error is not None:  # a rank that has voted no: only the verdict is awaited
            self._send_vote(t)
            return
        facts = Facts(a.total, a.content_id, a.present, a.aux, a.integrity)
        if t.announced or (t.facts is not None and t.facts.content_id == facts.content_id):
            if facts != t.facts:  # ID-5
                self._give_up(t, e.ProtocolViolation("the sender changed what it had announced", room=t.room))
                return
            first, t.announced = not t.announced, True
            if a.ready > t.ready or first:
                t.ready = max(a.ready, t.ready)
                self._want(t)
                self._check_complete(t)
                if t.phase is Phase.VOTED:
                    self._send_vote(t)
            return
        if t.facts is not None:  # the sender restarted with other content (R8)
            if t.exposed:
                self._give_up(t, e.ContentChanged("the sender restarted with other content", room=t.room))
                return
            self._start_over(t)
        t.facts, t.announced, t.ready = facts, True, a.ready
        self.unlent.pop(t.xfer, None)
        needed = 0 if t.dummy else self.policy.blocks(facts.total)
        for index in [i for i in t.out if i >= needed]:  # L2: the sender never writes there, the blocks are free
            self.pool.free(t.out.pop(index), Tenant(t.xfer, t.sender, t.epoch, index))
            self._take_back(t, index)
        cost = self.policy.cost(facts.total, facts.present) if needed else 0
        if cost > self.policy.budget:
            self._give_up(t, e.TooLarge(
                f"{facts.total} tokens need {cost} bytes of destination, the whole budget is {self.policy.budget}",
                room=t.room,
            ))  # fmt: skip
        elif (self._fits(cost) and not self.queue) or self.group.rank > 0 or not needed:
            self._admit(t, cost)  # rank 0 alone admits (R7); the others' budget is held by its admission
        elif self.policy.fail_when_exhausted:
            self._give_up(t, e.PoolTimeout("the destination budget is in use", room=t.room))
        else:
            self._reclaim(t)  # AL-1: a loan does not wait for a destination
            t.enter(Phase.QUEUED)
            self.queue.append(t.xfer)
        self._touch(t)

    def _fits(self, cost: int) -> bool:
        return self.budget_used + cost <= self.policy.budget

    def _admit(self, t: Transfer, cost: int) -> None:
        t.enter(Phase.ACTIVE)
        t.charge = cost
        if self.group.leads:
            self.budget_used += cost
        self._effects.append(Reserve(t.xfer))
        if self._admits(t):
            self._to_sender(t, m.Admitted)
        self._want(t)
        self._check_complete(t)

    def _admits(self, t: Transfer) -> bool:
        return self.group.ranks > 1 and self.group.leads

    def _start_over(self, t: Transfer) -> None:
        """Nothing that was gathered counts: the content is another."""
        self._withdraw(t)
        t.gathering = {index: (block, tenant, False) for index, (block, tenant, _) in t.gathering.items()}
        t.have, t.taken, t.log = Ranges(), Ranges((i, i + 1) for i in t.gathering), RoundLog()
        t.last_grant = 0
        if t.phase in (Phase.ACTIVE, Phase.VOTED):
            self._effects.append(Drop(t.xfer))
            self._refund(t)
        self._leave_lines(t)
        t.facts = None
        t.enter(Phase.OPENING)

    # ============================================================ granting

    def _want(self, t: Transfer) -> None:
        """Put a transfer in line if it could use blocks now."""
        if self._wish(t):
            self.line.setdefault(t.xfer)

    def _wish(self, t: Transfer) -> list[int]:
        """The indices to grant next: first missing first, nothing beyond what the sender can read (R3)."""
        if t.phase is not Phase.ACTIVE or not t.announced or t.paused or t.facts is None or t.dummy:
            return []
        needed = self.policy.blocks(t.facts.total)
        readable = needed if t.ready >= t.facts.total else t.ready // self.policy.block_size
        size = self.policy.grant_size(held=t.holds, last=t.last_grant, needed=needed, pool=self.pool.blocks)
        return t.taken.missing(readable, min(size, self.pool.blocks))

    def _serve(self) -> None:
        """AL-3: the head of the line gets the next free block; each gets a fair share, at least one (R9)."""
        progress = True
        while progress and self.line:
            progress = False
            for xfer in list(self.line):
                free = self.pool.grantable
                if not free:
                    return
                share = max(1, free // len(self.line))
                t = self.transfers[xfer]
                del self.line[xfer]
                wish = self._wish(t)
                if wish:
                    self._grant(t, wish[: min(share, len(wish))])
                    self._want(t)
                    progress = True

    def _grant(self, t: Transfer, indices: list[int]) -> None:
        blocks = self.pool.grant([Tenant(t.xfer, t.sender, t.epoch, index) for index in indices])
        fresh = list(zip(indices, blocks, strict=True))
        t.out.update(fresh)
        for index in indices:
            t.taken.add(index)
        t.log.granted(indices)
        t.last_grant = len(indices)
        t.beyond = t.beyond or 0 < t.high <= indices[-1]
        t.high = max(t.high, indices[-1] + 1)
        self._send_grant(t, fresh)
        self._touch(t)

    def _lend(self) -> None:
        """L1: once per transfer, what is free, only while nobody with a destination waits for a block."""
        while self.unlent and not self.line:
            t = self.transfers[next(iter(self.unlent))]
            del self.unlent[t.xfer]
            t.lent = True
            size = min(self.policy.first_grant, self.pool.grantable)
            if size:
                self._grant(t, list(range(size)))

    def _relieve(self) -> None:
        """L3: somebody with a destination holds no block and finds none free: loans come back, youngest first."""
        if self.pool.grantable or not any(not self.transfers[x].holds for x in self.line):
            return
        loan = next((t for t in reversed(self.transfers.values()) if self._is_loan(t)), None)
        if loan is not None:
            self._reclaim(loan)
        elif self.policy.fail_when_exhausted:
            for xfer in [x for x in self.line if not self.transfers[x].holds]:
                t = self.transfers[xfer]
                self._give_up(t, e.PoolTimeout("no pool block is free", room=t.room))

    def _is_loan(self, t: Transfer) -> bool:
        """Blocks out for rows that the sender cannot read yet: they do not come back by themselves."""
        if not t.out:
            return False
        if t.facts is None or not t.announced:
            return True
        return t.ready < t.facts.total and any(i >= t.ready // self.policy.block_size for i in t.out)

    # ============================================================ arriving

    def _on_done(self, t: Transfer, done: m.Done) -> None:
        try:
            said = m.unpack_done(done.runs, done.digests)
        except ValueError:
            self.ignored["malformed"] += 1
            return
        items = tuple((index, t.out[index], digest) for index, digest in said if index in t.out)
        items = tuple({item[0]: item for item in items}.values())
        for index, block, _ in items:
            del t.out[index]
            t.gathering[index] = (block, Tenant(t.xfer, t.sender, t.epoch, index), True)
        if items:
            self._effects.append(Gather(t.xfer, t.epoch, items))

    def _check_complete(self, t: Transfer) -> None:
        if t.phase is not Phase.ACTIVE or t.facts is None or not t.announced:
            return
        needed = 0 if t.dummy else self.policy.blocks(t.facts.total)
        if t.have.prefix < needed:  # WM-5: complete means that nothing is missing, and nothing else
            return
        if self.group.ranks == 1:
            self._end(t, None)
        else:
            t.enter(Phase.VOTED)
            self._send_vote(t)
            self._query(t)
            self._touch(t)

    # ============================================================ the one recovery, and the ends

    def _withdraw(self, t: Transfer) -> None:
        """Whatever is out may still be written to: quarantine, and ask for the fence (GR-2)."""
        if t.out:
            for index, block in t.out.items():
                self._quarantine(block, Tenant(t.xfer, t.sender, t.epoch, index))
                self._take_back(t, index)
            t.out.clear()
            self._to_sender(t, m.Revoke, upto=t.epoch)

    def _quarantine(self, block: int, tenant: Tenant) -> None:
        self.pool.quarantine(block, tenant)
        if tenant.sender in self.gone:
            self.pool.gone(tenant.sender)

    def _take_back(self, t: Transfer, index: int) -> None:
        t.taken.discard(index)
        t.log.taken_back(index, self.sent_tokens(t))

    def _new_epoch(self, t: Transfer) -> None:
        self._withdraw(t)
        t.epoch += 1
        self._touch(t)

    def _bump(self, t: Transfer, why: e.FerryError) -> None:
        """Every anomaly ends here: a new epoch, then what is missing is granted again."""
        self._new_epoch(t)
        t.bumps += 1
        if t.bumps > self.policy.max_bumps:  # LV-3
            self._give_up(t, why)
            return
        t.paused = self.policy.pause_after_bump
        self._want(t)

    def suspect(self, xfer: int, why: e.FerryError) -> list[Effect]:
        """Suspicion without proof (another path, an operator): recover as from any anomaly."""
        t = self.transfers.get(xfer)
        if t is not None and t.out:
            self._bump(t, why)
        return self._step()

    def _reclaim(self, t: Transfer) -> None:
        """A loan comes back; the transfer is never lent to again (L3)."""
        if t.out:
            self._new_epoch(t)
            self._want(t)

    def _peer_restarted(self, route: str, inc: int) -> None:
        """The old incarnation's writes are its own: only F3 and F4 free their blocks (WS-5)."""
        for t in [t for t in self.transfers.values() if t.route == route and 0 < t.sender < inc]:
            if t.live:
                self._new_epoch(t)
                t.announced, t.ready, t.sender = False, 0, 0
                self.line.pop(t.xfer, None)
                self.unlent.pop(t.xfer, None)
            else:
                t.closed = True
                self._refund(t)
                self._maybe_forget(t)
        self._recall_gone()

    def _give_up(self, t: Transfer, error: e.FerryError) -> None:
        """This rank cannot go on. Alone, or as the leader, that ends the room; a follower votes no and waits (TP-4)."""
        if self.group.leads:
            self._end(t, error)
            return
        if t.phase is Phase.VOTED and t.error is None:  # it has promised its rows: only the verdict ends it now
            t.plea = t.plea or error
            self._query(t)
            return
        if t.error is not None:  # it has said so: timers repeat it
            return
        self._withdraw(t)
        self._leave_lines(t)
        self._effects.append(Drop(t.xfer))
        t.enter(Phase.VOTED)
        t.error = error
        self._send_vote(t)
        self._query(t)

    def _end(self, t: Transfer, error: e.FerryError | None) -> None:
        self._withdraw(t)
        self._leave_lines(t)
        t.enter(Phase.CLOSING)
        t.error = error
        del self.rooms[t.room]
        if error is not None or t.told:
            self._effects.append(Drop(t.xfer))
        self._tell(t, error)
        if self.group.ranks == 1 or self.group.rank:
            self._refund(t)
        if self.group.ranks > 1 and self.group.leads:
            code, cause = wire_error(error)
            for route, verdict in self.decisions.decide(t.xfer, error is None, code, cause):
                self._send(route, verdict)
        if t.sender:
            self._send_close(t)
        else:
            t.closed = True
            self._refund(t)
        self._query(t)
        self._maybe_forget(t)

    def _tell(self, t: Transfer, error: e.FerryError | None) -> None:
        """The caller learns the end once (CN-2)."""
        if not t.told:
            t.told = True
            if error is not None and error.room is None:
                error.room = t.room
            self._effects.append(Ended(t.xfer, error))

    def _refund(self, t: Transfer) -> None:
        if self.group.leads:
            self.budget_used -= t.charge
        t.charge = 0

    def _maybe_forget(self, t: Transfer) -> None:
        """LV-2: over, heard, and nothing of it left anywhere."""
        if t.live or not t.closed or t.gathering or self.pool.quarantine_of([t.xfer]):
            return
        self.transfers.pop(t.xfer, None)
        self._recall_gone()

    def _recall_gone(self) -> None:
        """Proofs are kept as long as they may be of use."""
        if self.gone:
            held = {tenant.sender for t in self.transfers.values() for _, tenant, _ in t.gathering.values()}
            self.gone &= held | {t.sender for t in self.transfers.values()}

    def _leave_lines(self, t: Transfer) -> None:
        self.line.pop(t.xfer, None)
        self.unlent.pop(t.xfer, None)
        if t.xfer in self.queue:
            self.queue.remove(t.xfer)

    # ============================================================ the group

    def _on_query(self, route: str, query: m.Query) -> None:
        if not (self.group.ranks > 1 and self.group.leads) or not query.rank:
            self.ignored["not a leader"] += 1
            return
        if query.rank >= self.group.ranks:  # of no use that there is: its end is told here, and so is ours
            why = f"rank {query.rank} counts {query.ranks} ranks, the leader {self.group.ranks}"
            if not query.heard:
                self._send(route, m.Verdict(
                    src=self.inc, dst=query.src, xfer=query.xfer, run=False, code="group_mismatch", cause=why
                ))  # fmt: skip
            mine = self.transfers.get(self.rooms.get(query.room, 0))
            if mine is not None and not query.heard:
                self._give_up(mine, e.GroupMismatch(why, room=mine.room))
            return
        xfer, verdict = self.decisions.query(route, query)
        if verdict is not None:
            self._send(route, verdict)
            return
        t = self.transfers.get(xfer) if xfer is not None else None
        if t is not None and t.live:
            if query.ranks != self.group.ranks:
                why = f"rank {query.rank} counts {query.ranks} ranks, the leader {self.group.ranks}"
                self._give_up(t, e.GroupMismatch(why, room=t.room))
                return
            if query.code:
                self._give_up(t, e.from_code(query.code, query.cause, room=t.room))
                return
        if not query.heard:
            self._send(route, m.Pong(src=self.inc, dst=query.src))

    def _on_verdict(self, verdict: m.Verdict) -> None:
        if verdict.dst != self.inc:
            self.ignored["foreign"] += 1
            return
        self._on_leader(self.group.leader, verdict.src)
        t = self.transfers.get(verdict.xfer)
        if t is not None and t.live:
            if not verdict.run:
                self._end(t, t.error or t.plea or e.from_code(verdict.code, verdict.cause, room=t.room))
            elif t.phase is Phase.VOTED and t.error is None:
                self._end(t, None)
            return
        if t is None:
            self._send(self.group.leader, self._heard(verdict.xfer, 0))
        else:
            self._query(t)

    def _on_leader(self, route: str, inc: int) -> None:
        """A follower hears its leader. A newer incarnation at that address proves the old one gone (R7)."""
        if self.group.leads or route != self.group.leader or inc <= self.leader_inc:
            return
        old, self.leader_inc = self.leader_inc, inc
        if old > 0:
            for t in [t for t in self.transfers.values() if t.live]:
                self._end(t, e.PeerLost("the group's leader restarted", room=t.room, peer=route))
        for t in [t for t in self.transfers.values() if t.phase is Phase.VOTED]:
            self._send_vote(t)

    # ============================================================ after every event

    def _step(self) -> list[Effect]:
        """Destination before pool (AL-1), who waits before who borrows (L1), loans back when somebody starves (L3)."""
        while self.queue:
            t = self.transfers[self.queue[0]]
            assert t.facts is not None
            cost = self.policy.cost(t.facts.total, t.facts.present)
            if not self._fits(cost):
                break
            del self.queue[0]
            self._admit(t, cost)
        self._serve()
        self._lend()
        self._relieve()
        for slab in self.pool.replaceable():
            if slab not in self.replacing:
                self.replacing.add(slab)
                self._effects.append(ReplaceSlab(slab))
        return self._take_effects()
