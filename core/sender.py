"""The sender's story: it writes what is granted and says done. It keeps no position of its own (WM-3): every position
comes from a grant, every grant is used at most once, and whatever it says stays true.

Long because every decision is here, to be read from top to bottom; rule ids stand beside the lines that keep them
(docs/design.md names the families). What the machine remembers and how it says things is in sender_state.py.

Sans-IO like the receiver: events in, effects out, no socket, thread, clock or tensor; `snapshot` and `restore` make
this class explorable.

An *offer* is what the caller sends under a room number. A *binding* is one rank of a receiver that has opened the
room: `(receiver incarnation, xfer)`. The *write table* lists every index that was handed to the transport and is not
known to be drained; fences are computed from it and from nothing else (WS-3).
"""

from __future__ import annotations

from msgspec.structs import replace

from tensorferry.core import errors as e
from tensorferry.core import messages as m
from tensorferry.core.effects import Connect, Effect, Ended, PostWrite, Progressed, ReleaseSource
from tensorferry.core.ledger import Ranges
from tensorferry.core.sender_state import (
    EVERY_EPOCH,
    MOST_ABANDONED,
    MOST_TOMBSTONES,
    Binding,
    Offer,
    Receiver,
    SenderState,
    Slot,
    Write,
    WriteId,
)
from tensorferry.core.transfer import Facts, Status


class SenderMachine(SenderState):
    """All rooms of one embedding-side endpoint: the decisions."""

    # ============================================================ events from the caller

    def offer(self, room: int, facts: Facts, ready: int = 0) -> tuple[int, list[Effect]]:
        """Announce `room`. Returns the offer's serial. Raises RoomInUse or Overloaded."""
        slot = self._slot_at(room)
        if slot is not None and slot.offer is not None:
            raise e.RoomInUse(f"room {room} is being sent already", room=room)
        if slot is None:
            if len(self.slots) >= self.policy.max_rooms:
                raise e.Overloaded(f"{len(self.slots)} rooms are live", room=room, hint="Raise max_rooms")
            slot = self._new_slot(room)
        slot.offer = Offer(self.next_serial, room, facts, ready)
        self.next_serial += 1
        serial = slot.offer.serial
        self.serials[serial] = slot.id
        self.withdrawn.pop(room, None)
        given_up = self.given_up.pop(room, None)
        if given_up is not None and not slot.bindings:
            self._abort(slot, given_up)
        elif slot.decision == "abort":  # the ranks that opened the room have given it up already
            self._tell(slot, e.from_code(*slot.abort, room=room))
        self._announce(slot)
        self._review(slot)
        return serial, self._take_effects()

    def forget_ended(self, room: int) -> None:
        """One side ended this room before the other knew of it, and too long ago to be about its next use."""
        self.given_up.pop(room, None)
        self.withdrawn.pop(room, None)

    def force_end(self, slot_id: int) -> list[Effect]:
        """A rank that never opened an aborted room has had its time."""
        slot = self.slots.get(slot_id)
        if slot is not None and slot.decision == "abort" and all(b.closed is not None for b in slot.bindings.values()):
            self._end(slot)
        return self._take_effects()

    def extend(self, serial: int, ready: int) -> list[Effect]:
        """`ready` tokens can be read now."""
        slot = self._slot_of(serial)
        if slot is not None and slot.offer is not None and ready > slot.offer.ready:
            slot.offer.ready = ready
            self._announce(slot)
            for binding in slot.bindings.values():
                self._post(slot, binding)
        return self._take_effects()

    def cancel(self, serial: int, error: e.FerryError) -> list[Effect]:
        """The caller gives up, a deadline passed, or the driver could not go on: the room is aborted."""
        slot = self._slot_of(serial)
        if slot is not None:
            if not slot.bindings and slot.decision is None and len(self.withdrawn) < self.policy.max_rooms:
                self.withdrawn[slot.room] = error  # whoever opens the room is told, instead of waiting for a deadline
            self._abort(slot, error)
            self._review(slot)
        return self._take_effects()

    # ============================================================ events from the driver: the write table

    def write_done(self, write: WriteId, digests: dict[int, int]) -> list[Effect]:
        """Every attempt at these indices is terminal and the bytes are placed (WS-2)."""
        w = self._settle(write, set(digests))
        if w is not None:
            binding = self._binding(w)
            if binding is not None and binding.closed is None and binding.epoch == w.epoch > binding.revoked:
                binding.done.update(digests)
                self._send_done(binding, digests)
            self._drained(w)
        return self._take_effects()

    def write_failed(self, write: WriteId, indices: set[int], error: e.FerryError) -> list[Effect]:
        """These indices are not placed, and nothing of them can land any more."""
        w = self._settle(write, indices)
        if w is not None:
            self._trouble(w, error)
            self._drained(w)
        return self._take_effects()

    def write_unknown(self, write: WriteId, error: e.FerryError) -> list[Effect]:
        """Not failure: nothing is freed and nothing posted again in this epoch (WS-4). `write_drained` may follow."""
        w = self.writes.get(write)
        if w is not None:
            self._trouble(w, error)
        return self._take_effects()

    def write_drained(self, write: WriteId, indices: set[int]) -> list[Effect]:
        """Proved at last: nothing of these indices can land any more. Whether they landed is not said."""
        w = self._settle(write, indices)
        if w is not None:
            self._drained(w)
        return self._take_effects()

    def wants(self, write: WriteId) -> bool:
        """Is a write that has not been posted yet still worth posting? If not: `write_drained`, it will never be."""
        w = self.writes.get(write)
        b = self._binding(w) if w is not None else None
        return (
            w is not None
            and b is not None
            and b.closed is None
            and b.trouble is None
            and b.epoch == w.epoch > b.revoked
            and self.slots[self.where[b.key]].decision != "abort"
        )

    def _settle(self, write: WriteId, indices: set[int]) -> Write | None:
        w = self.writes.get(write)
        if w is None or not indices <= w.outstanding:
            raise e.InternalError(f"write {write} does not have {sorted(indices)} outstanding")
        w.outstanding -= indices
        if not w.outstanding:
            del self.writes[write]
        return w

    def _trouble(self, w: Write, error: e.FerryError) -> None:
        binding = self._binding(w)
        if binding is None or binding.closed is not None or binding.epoch != w.epoch or binding.trouble is not None:
            return
        self._be_in_trouble(binding, error)

    def _be_in_trouble(self, binding: Binding, error: e.FerryError) -> None:
        if binding.closed is None and binding.trouble is None:
            binding.trouble = (error.code, error.cause[:1000])
            binding.pending.clear()
            self._send_trouble(binding)

    def _drained(self, w: Write) -> None:
        """Fences and ends that waited for this write."""
        key = (w.receiver, w.xfer)
        binding = self._binding(w)
        receiver = self.receivers.get(w.receiver)
        if binding is not None:
            if binding.revoked and self._is_drained(key, binding.revoked):
                self._send_fenced(binding.route, key, binding.revoked)
            if binding.closed is not None:
                self._answer_close(self.slots[self.where[key]], binding)
        elif receiver is not None and self._is_drained(key, EVERY_EPOCH):  # over: nothing is ever posted again
            self._send_fenced(receiver.route, key, EVERY_EPOCH)
            self._send(receiver.route, m.Closed(src=self.inc, dst=w.receiver, xfer=w.xfer))
        self._release_sources()

    # ============================================================ events from the driver: peers

    def connected(self, receiver: int, error: e.FerryError | None, via: str = "", path: str = "") -> list[Effect]:
        """A transport (`via`) has taken the receiver's descriptor, or all have refused. Again: another carries, or it
        carries by another `path`."""
        r = self.receivers.get(receiver)
        if r is not None:
            moved, r.via = bool(r.via) and via not in ("", r.via), via or r.via
            r.path = path
            r.usable = error is None
            r.problem = None if error is None else (error.code, error.cause[:1000])
            r.generations = m.unpack_generations(r.hello.generations)
            for slot in self._slots_of(receiver):
                for binding in slot.bindings.values():
                    if binding.receiver == receiver and error is None:
                        told = slot.offer is not None and (binding.rank == 0 or slot.admitted)
                        if moved and told and binding.closed is None:
                            self._send_announce(slot, binding)
                        self._post(slot, binding)
                    elif binding.receiver == receiver and error is not None:
                        if binding.epoch:  # what is granted cannot be written: recover, and try again with new grants
                            self._be_in_trouble(binding, error)
                        else:
                            self._refuse(binding.route, binding.key, error)
        return self._take_effects()

    def receiver_lost(self, receiver: int, error: e.FerryError, *, gone: bool) -> list[Effect]:
        """Silent for too long, or (`gone`) proved dead. Its ranks are unbound; a new incarnation may open the room."""
        r = self.receivers.get(receiver)
        if r is not None:
            r.gone = r.gone or gone
            for slot in self._slots_of(receiver):
                self._unbind(slot, receiver, error)
                self._review(slot)
        return self._take_effects()

    def described(self, offers: tuple[m.Offer, ...]) -> None:
        """What the transports say of themselves by now: whoever says Hello from here on is told. Those that we have met
        need it no more."""
        if offers != self.hello.offers:
            self.hello = replace(self.hello, offers=offers, revision=self.hello.revision + 1)

    # ============================================================ repetition (MSG-2)

    def resend(self, slot_id: int) -> list[Effect]:
        """Say again all that is true of a room and may have been lost."""
        slot = self.slots.get(slot_id)
        if slot is not None:
            for b in slot.bindings.values():
                if b.closed is not None:
                    continue
                if slot.offer is not None and (b.rank == 0 or slot.admitted):
                    self._send_announce(slot, b)
                if b.done:
                    self._send_done(b, b.done)
                if b.trouble is not None:
                    self._send_trouble(b)
            self._send_decision(slot)
            if slot.rival is not None:
                for receiver in {b.receiver for b in slot.bindings.values()}:
                    self._ping(receiver)
        return self._take_effects()

    def heartbeat(self, receiver: int) -> list[Effect]:
        self._ping(receiver)
        return self._take_effects()

    # ============================================================ messages

    def on_message(self, route: str, message: m.Message) -> list[Effect]:
        """Handle one message. Whatever is stale, doubled, foreign or unknown changes nothing (MSG-1, MSG-4)."""
        if isinstance(message, m.Hello):
            self._on_hello(route, message)
            return self._take_effects()
        r = self.receivers.get(message.src)
        if r is None or message.dst != self.inc:
            self.ignored["foreign"] += 1
            if isinstance(message, m.FromReceiver | m.Ping):  # whoever speaks to our predecessor learns of us
                self._send(route, replace(self.hello, dst=message.src, ack=0))
            return self._take_effects()
        r.route = route
        self.receivers[message.src] = self.receivers.pop(message.src)  # the longest silent stands first
        self._refuse_rivals_of(message.src)
        match message:
            case m.Ping():
                self._send(route, m.Pong(src=self.inc, dst=message.src))
            case m.ToSender() if self._is_late(r):
                self._on_late(r, message)
            case m.ToSender():
                self._raise_min_live(r, message.min_live)
                self._on_transfer_message(r, message)
            case m.Pong():
                pass
            case _:
                self.ignored["foreign"] += 1
        return self._take_effects()

    def _on_hello(self, route: str, hello: m.Hello) -> None:
        if hello.dst not in (0, self.inc):
            self._send(route, replace(self.hello, dst=hello.src, ack=0))
            return
        if not hello.pool_blocks and not hello.slabs:  # somebody who only wants to know what we have
            self._send(route, replace(self.hello, dst=hello.src, ack=hello.revision))
            return
        if self.newest.get(hello.name, 0) > hello.src:
            self.ignored["stale hello"] += 1  # an older incarnation of that receiver (ID-2)
            return
        problem = self._incompatible(hello)
        if problem:
            self.refused = problem
            self._send(route, replace(self.hello, dst=hello.src, ack=hello.revision))
            return
        r = self.receivers.get(hello.src)
        if r is None:
            if len(self.receivers) >= self.policy.max_peers and not self._evict_receiver():
                self.ignored["too many receivers"] += 1
                return
            ours = {offer.name for offer in self.hello.offers}
            r = self.receivers[hello.src] = Receiver(route, hello.name, _lean(hello, ours))
            old = self.newest.get(hello.name)
            self.newest[hello.name] = hello.src
            if old is not None and old in self.receivers:  # a new incarnation replaces the old one
                for slot in self._slots_of(old):
                    self._unbind(slot, old, e.PeerLost("the receiver restarted", room=slot.room, peer=hello.name))
                    self._review(slot)
            self._effects.append(Connect(route, r.hello))
        elif hello.revision > r.hello.revision:
            r.hello = _lean(hello, {offer.name for offer in self.hello.offers})
            self._effects.append(Connect(route, r.hello))
        r.route = route
        self._raise_min_live(r, hello.min_live)
        self._send(route, replace(self.hello, dst=hello.src, ack=r.hello.revision))

    def _incompatible(self, hello: m.Hello) -> str:
        ours = self.hello
        if hello.version != ours.version:
            return f"a receiver speaks protocol {hello.version}, this side {ours.version}"
        if hello.layout != ours.layout:
            return "a receiver declares another layout"
        if hello.block_size != ours.block_size:
            return f"a receiver has block size {hello.block_size}, this side {ours.block_size}"
        if not 0 < hello.slabs <= hello.pool_blocks <= m.MAX_BLOCKS_IN_MESSAGE or (
            len(hello.generations) != 4 * hello.slabs
        ):
            return "a receiver declares an impossible pool"
        return ""

    def _is_late(self, r: Receiver) -> bool:
        return r.gone or self.newest.get(r.name, 0) > r.hello.src

    def _on_late(self, r: Receiver, message: m.ToSender) -> None:
        """From an incarnation that is gone or has a successor: nothing begins for it (ID-2), its ends are answered."""
        key = (message.src, message.xfer)
        if isinstance(message, m.Revoke) and self._is_drained(key, message.upto):
            self._send_fenced(r.route, key, message.upto)
        elif isinstance(message, m.Close) and self._may_close(key):
            self._send(r.route, m.Closed(src=self.inc, dst=message.src, xfer=message.xfer))
        self.ignored["superseded"] += 1

    def _raise_min_live(self, r: Receiver, min_live: int) -> None:
        """Everything below is over, for ever: tombstones go (R1)."""
        if min_live > r.min_live:
            r.min_live = min_live
            r.closed.discard(0, min_live)
            for xfer in [x for x in r.revoked if x < min_live]:
                del r.revoked[xfer]
            if min_live > self.abandoned.get(r.hello.src, min_live):  # no block of it is in quarantine any more
                del self.abandoned[r.hello.src]

    def _on_transfer_message(self, r: Receiver, message: m.ToSender) -> None:
        key = (message.src, message.xfer)
        over = message.xfer < r.min_live or message.xfer in r.closed or self._is_abandoned(key)
        slot_id = self.where.get(key)
        if isinstance(message, m.Revoke):
            self._on_revoke(r, key, message.upto, over)
        elif isinstance(message, m.Close):
            self._on_close(r, key, message)
        elif over:
            self.ignored["over"] += 1  # late: creates no state (ID-3)
            if message.xfer >= r.min_live:  # or from a receiver that was given up for lost and is back
                why = "the sender has given this transfer up"
                self._send(r.route, m.Abort(src=self.inc, dst=key[0], xfer=key[1], code="peer_lost", cause=why))
        elif isinstance(message, m.Open):
            self._on_open(r, message)
        elif slot_id is None:
            self.ignored["unknown transfer"] += 1
        else:
            slot = self.slots[slot_id]
            binding = next(b for b in slot.bindings.values() if b.key == key)
            if binding.closed is not None:
                self.ignored["over"] += 1
            elif isinstance(message, m.Grant):
                self._on_grant(r, slot, binding, message)
            elif isinstance(message, m.Admitted) and binding.rank == 0:
                if not slot.admitted:
                    slot.admitted = True
                    self._announce(slot)
            elif isinstance(message, m.Complete):
                self._on_vote(slot, binding, message)

    # ============================================================ opening

    def _on_open(self, r: Receiver, o: m.Open) -> None:
        key = (o.src, o.xfer)
        bound = self._binding_at(key)
        if bound is not None:  # said again; room and rank are what they were at first, whatever it says now (ID-5)
            self._announce_to(self.slots[self.where[key]], bound.rank)
            self._tell_late(self.slots[self.where[key]], bound)
            return
        slot = self._slot_at(o.room)
        if r.problem is not None:
            self._refuse(r.route, key, e.from_code(*r.problem))
            self._effects.append(Connect(r.route, r.hello))  # the next Open may fare better: nobody is blacklisted
            return
        if o.rank >= o.ranks or (slot is not None and slot.ranks not in (0, o.ranks)):
            self._refuse(r.route, key, e.GroupMismatch(
                f"rank {o.rank} counts {o.ranks} ranks, others of room {o.room} {slot.ranks if slot else 'none'}"
            ))  # fmt: skip
            return
        if slot is not None and o.rank in slot.bindings:
            taken = slot.bindings[o.rank]
            if taken.receiver != o.src and taken.closed is None:
                slot.rival = o  # a second live one, or the successor of a dead one: the first one's life decides
                self.contested.add(slot.id)
                self._ping(taken.receiver)
            return  # else the next use of the room: this one is still ending, and Open is sent again
        if slot is None:
            if len(self.slots) >= self.policy.max_rooms:
                self._refuse(r.route, key, e.Overloaded("the sender has too many live rooms"))
                return
            slot = self._new_slot(o.room)
        self.given_up.pop(o.room, None)
        slot.ranks = o.ranks
        slot.bindings[o.rank] = Binding(r.route, *key, o.rank, o.dummy, revoked=r.revoked.pop(o.xfer, 0))
        self.where[key] = slot.id
        slot.touched += 1
        withdrawn = self.withdrawn.pop(o.room, None)
        if withdrawn is not None and slot.offer is None:
            self._abort(slot, withdrawn)
            return
        self._announce_to(slot, o.rank)
        self._send_decision(slot)
        self._tell_late(slot, slot.bindings[o.rank])

    def _tell_late(self, slot: Slot, b: Binding) -> None:
        """The leader of an aborted room has closed it, and another rank opens it.

        It may be late for this use, or early for the next one, for which its leader waits in vain as long as this one
        does not end. Nothing tells the two apart. So it is told: it asks its leader, as always, and the use that it is
        of ends for all of them.
        """
        leader = slot.bindings.get(0)
        if slot.decision == "abort" and leader is not None and leader.closed is not None and b.closed is None:
            code, cause = slot.abort
            self._send(b.route, m.Abort(src=self.inc, dst=b.receiver, xfer=b.xfer, code=code, cause=cause))

    def _refuse_rivals_of(self, receiver: int) -> None:
        """A receiver whose rank somebody else wants is alive: the room is in use."""
        for slot_id in list(self.contested):
            slot = self.slots.get(slot_id)
            if slot is None or slot.rival is None:
                self.contested.discard(slot_id)
            elif any(b.receiver == receiver for b in slot.bindings.values()):
                self.contested.discard(slot_id)
                rival, slot.rival = slot.rival, None
                if (r := self.receivers.get(rival.src)) is not None:
                    taken = e.RoomInUse(f"another receiver has room {slot.room} open")
                    self._refuse(r.route, (rival.src, rival.xfer), taken)

    def _announce(self, slot: Slot) -> None:
        for rank in list(slot.bindings):
            self._announce_to(slot, rank)
        slot.touched += 1

    def _announce_to(self, slot: Slot, rank: int) -> None:
        """Ranks above 0 are told only once rank 0 has its destination (R7)."""
        binding = slot.bindings[rank]
        if slot.offer is not None and binding.closed is None and slot.decision != "abort":
            self._show(slot.offer, Status.WAITING_FOR_INPUT)
            if rank == 0 or slot.admitted:
                self._send_announce(slot, binding)
            self._post(slot, binding)

    # ============================================================ writing

    def _on_grant(self, r: Receiver, slot: Slot, b: Binding, grant: m.Grant) -> None:
        try:
            runs = m.unpack_grant(grant.runs)
        except ValueError:
            self.ignored["malformed"] += 1
            return
        per_slab = -(-r.hello.pool_blocks // r.hello.slabs)
        if sum(count for _, _, count, _ in runs) > r.hello.pool_blocks:
            self.ignored["grant outside the pool"] += 1
            return
        for _, block, count, _ in runs:
            if block + count > r.hello.pool_blocks or block // per_slab != (block + count - 1) // per_slab:
                self.ignored["grant outside the pool"] += 1  # a peer's number is never trusted (R13)
                return
        if grant.epoch <= b.revoked or grant.epoch < b.epoch:
            self.ignored["stale"] += 1
            return
        if grant.epoch > b.epoch:  # the receiver has moved on: what was before is revoked
            b.epoch, b.revoked = grant.epoch, max(b.revoked, grant.epoch - 1)
            b.pending.clear()
            b.posted, b.trouble = Ranges(), None
            b.done.clear()
        if b.trouble is not None:
            return
        for index in [i for i in b.done if i < grant.prefix]:
            del b.done[index]
        if not self._may_wait(r, sum(count for _, _, count, _ in runs)):
            self.ignored["too many grants"] += 1  # what is due is granted again
            return
        needed = 1 << 32 if slot.offer is None else -(-slot.offer.facts.total // self.hello.block_size)
        for first, block, count, generation in runs:
            for k in range(min(count, needed - first)):  # beyond the announced length: never written (GR-6)
                # At most one post per (epoch, index) (WS-1); a pool holds no more than its blocks (MSG-5).
                if first + k not in b.posted and len(b.pending) < r.hello.pool_blocks:
                    b.pending.setdefault(first + k, (block + k, generation))
        last = max(first + count for first, _, count, _ in runs) if runs else 0
        if slot.offer is not None and 0 < b.high < last:
            self._show(slot.offer, Status.TRANSFERRING)
        b.high = max(b.high, last)
        if slot.offer is not None and grant.prefix > b.prefix:
            b.prefix = grant.prefix
            self._effects.append(Progressed(slot.offer.serial))
        slot.touched += 1
        if r.problem is not None:
            self._effects.append(Connect(r.route, r.hello))
        self._post(slot, b)

    def _may_wait(self, r: Receiver, more: int) -> bool:
        """Grants wait for rows, or for an offer. Of a receiver's no more than two pools: it lends each block to one
        transfer at a time, and whoever asks for more wants our memory (a run of 16 bytes becomes 65,536 entries)."""
        most = 2 * r.hello.pool_blocks
        if r.waiting + more > most:
            bindings = (b for slot in self.slots.values() for b in slot.bindings.values())
            r.waiting = sum(len(b.pending) for b in bindings if b.receiver == r.hello.src)
        if r.waiting + more > most:
            return False
        r.waiting += more
        return True

    def _post(self, slot: Slot, b: Binding) -> None:
        """Write what is granted, readable and addressed to memory that we know."""
        r = self.receivers[b.receiver]
        offer = slot.offer
        if offer is None or not b.pending or not r.usable or b.trouble is not None or slot.decision == "abort":
            return
        needed = -(-offer.facts.total // self.hello.block_size)
        readable = needed if offer.ready >= offer.facts.total else offer.ready // self.hello.block_size
        per_slab = -(-r.hello.pool_blocks // r.hello.slabs)
        runs: list[tuple[int, int, int, int]] = []
        for index, (block, generation) in sorted(b.pending.items()):
            if index >= needed:  # beyond the announced length: never written (GR-6)
                del b.pending[index]
            elif index < readable and r.generations[block // per_slab] == generation:
                del b.pending[index]
                if runs and runs[-1][3] == generation and (index, block) == (
                    runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2]
                ) and block // per_slab == runs[-1][1] // per_slab:  # fmt: skip
                    runs[-1] = (*runs[-1][:2], runs[-1][2] + 1, generation)
                else:
                    runs.append((index, block, 1, generation))
        if not runs:
            return
        indices = {first + k for first, _, count, _ in runs for k in range(count)}
        for first, _, count, _ in runs:
            b.posted.add(first, first + count)
        write = (*b.key, b.epoch, runs[0][0])  # unique: an index is posted at most once in an epoch
        self.writes[write] = Write(offer.serial, b.receiver, b.xfer, b.epoch, indices)
        self._effects.append(
            PostWrite(write, offer.serial, b.route, b.receiver, b.xfer, offer.facts.content_id, tuple(runs))
        )

    def _on_revoke(self, r: Receiver, key: tuple[int, int], upto: int, over: bool) -> None:
        """WS-3: answered from the write table alone. An unknown transfer leaves a tombstone first (L4)."""
        binding = self._binding_at(key)
        if binding is not None:
            binding.revoked = upto = max(binding.revoked, upto)
            if binding.epoch <= upto:
                binding.pending.clear()
        elif not over:
            if len(r.revoked) >= self.policy.max_rooms and key[1] not in r.revoked:
                self.ignored["too many revoked"] += 1
                return
            r.revoked[key[1]] = upto = max(upto, r.revoked.get(key[1], 0))
        if self._is_drained(key, upto):
            self._send_fenced(r.route, key, upto)

    # ============================================================ votes and ends

    def _on_vote(self, slot: Slot, b: Binding, vote: m.Complete) -> None:
        if b.vote is None:
            b.vote = vote.ok
            slot.touched += 1
        if not b.vote and slot.decision is None:
            self._abort(slot, e.from_code(vote.code or "peer_lost", vote.cause, room=slot.room))
        self._review(slot)
        self._send_decision(slot)

    def _on_close(self, r: Receiver, key: tuple[int, int], close: m.Close) -> None:
        slot_id = self.where.get(key)
        if slot_id is None:
            if r.closed.pieces >= MOST_TOMBSTONES and key[1] not in r.closed:
                self.ignored["too many closed"] += 1
                return
            if key[1] >= r.min_live:
                r.closed.add(key[1])  # an Open that is still on its way must find it over (ID-3)
                r.revoked.pop(key[1], None)
            if self._may_close(key):
                self._send(r.route, m.Closed(src=self.inc, dst=key[0], xfer=key[1]))
            return
        slot = self.slots[slot_id]
        binding = next(b for b in slot.bindings.values() if b.key == key)
        if binding.closed is None:
            binding.closed = close.code
            binding.pending.clear()
            slot.touched += 1
            if close.code and slot.decision is None:
                error = e.from_code(close.code, close.cause, room=slot.room, peer=r.name)
                if slot.offer is None and len(self.given_up) < self.policy.max_rooms:
                    self.given_up[slot.room] = error
                self._abort(slot, error)
        self._answer_close(slot, binding)
        self._review(slot)

    def _abort(self, slot: Slot, error: e.FerryError) -> None:
        """The first decision stands (TP-4). The caller learns it at once; the receivers until they have closed."""
        if slot.decision is None:
            slot.decision, slot.abort = "abort", (error.code, error.cause[:1000])
            for binding in slot.bindings.values():
                binding.pending.clear()
            self._tell(slot, error)
            slot.touched += 1
            if slot.ranks <= 1 and self.rooms.get(slot.room) == slot.id:
                del self.rooms[slot.room]  # a lone receiver opens its next use only after the end of this one
        self._send_decision(slot)

    def _review(self, slot: Slot) -> None:
        """Decide, and end what is at its end."""
        if self.slots.get(slot.id) is not slot:
            return
        whole = slot.ranks > 0 and len(slot.bindings) == slot.ranks
        if slot.decision is None and slot.offer is not None and whole:
            delivered = slot.ranks == 1 and slot.bindings[0].closed == ""
            if delivered or (slot.ranks > 1 and all(b.vote for b in slot.bindings.values())):
                slot.decision = "commit"
                self._send_decision(slot)
        if any(b.closed is None for b in slot.bindings.values()):
            return
        if slot.decision == "commit":
            code = slot.bindings[0].closed  # the leader's word is the room's: it may have been lost after COMMIT
            self._tell(slot, e.from_code(code, "the leader ended so after COMMIT", room=slot.room) if code else None)
            self._end(slot)
        elif slot.decision == "abort":
            if slot.ranks <= 1 or whole:  # a rank that opens late must find this use, not the next one
                self._end(slot)
        elif slot.offer is None and not slot.bindings:
            self._end(slot)

    def _answer_close(self, slot: Slot, b: Binding) -> None:
        """Closed says that no write of the transfer is left; to rank 0, that every rank of the room has closed (R7)."""
        if b.rank == 0 and any(x.closed is None for x in slot.bindings.values()):
            return
        if self._is_drained(b.key, EVERY_EPOCH):
            self._send(b.route, m.Closed(src=self.inc, dst=b.receiver, xfer=b.xfer))

    def _may_close(self, key: tuple[int, int]) -> bool:
        """Of a transfer that is over here. Closed frees no block: those of one that was given up are replaced (R4)."""
        return self._is_abandoned(key) or self._is_drained(key, EVERY_EPOCH)

    def _end(self, slot: Slot) -> None:
        """Everybody has closed: tombstones, answers, and the caller's rows as soon as nothing reads them (WM-6)."""
        for b in slot.bindings.values():
            self._bury(b)
            if b.rank == 0:
                self._answer_close(slot, b)
        del self.slots[slot.id]
        self.contested.discard(slot.id)
        if self.rooms.get(slot.room) == slot.id:
            del self.rooms[slot.room]
        if slot.offer is not None:
            del self.serials[slot.offer.serial]
            if slot.offer.error is None:  # else `_tell` has seen to the rows
                self.orphans.add(slot.offer.serial)
        self._release_sources()

    def _bury(self, b: Binding) -> None:
        self.where.pop(b.key, None)
        r = self.receivers.get(b.receiver)
        if r is not None and b.xfer >= r.min_live:
            r.closed.add(b.xfer)

    def _unbind(self, slot: Slot, receiver: int, error: e.FerryError) -> None:
        """A receiver is lost. What it had not finished may be opened again by its successor, unless a group decided: by
        the one that has opened it already, at once, for its next Open may come too late."""
        rival, slot.rival = slot.rival, None
        for rank, b in list(slot.bindings.items()):
            if b.receiver != receiver:
                continue
            if slot.decision is not None or slot.ranks > 1:
                if slot.decision is None:
                    self._abort(slot, error)
                if b.closed is None:
                    b.closed = error.code
            else:
                self._bury(b)
                del slot.bindings[rank]
        if not slot.bindings:
            slot.ranks, slot.admitted, slot.lost = 0, False, error.cause
            r = self.receivers.get(rival.src) if rival is not None else None
            if rival is not None and r is not None and not self._is_late(r):
                self._on_transfer_message(r, rival)  # it may be over meanwhile
        slot.touched += 1

    def abandon(self, receiver: int) -> list[Effect]:
        """Writes to a receiver that was lost long ago are not waited for any more: its transfers up to now are over,
        and no fence is ever said for them. If it comes back, it replaces the memory (R4). The driver has seen to it
        that nothing of ours is read by them.

        This is kept in mind until the receiver says that they are over there, too (`min_live`). One that never comes
        back never does: hence `may_abandon`.
        """
        if all(key[0] != receiver for key in self.where) and self.may_abandon(receiver):
            for write in [write for write, w in self.writes.items() if w.receiver == receiver]:
                w = self.writes.pop(write)
                self.abandoned[receiver] = max(w.xfer, self.abandoned.get(receiver, 0))
            r = self.receivers.pop(receiver, None)
            if r is not None and self.newest.get(r.name) == receiver:
                del self.newest[r.name]
            self._release_sources()
        return self._take_effects()

    def may_abandon(self, receiver: int) -> bool:
        """False where too much is kept in mind already: its writes are waited for then, and it has a place among the
        receivers until they drain. A sender that cannot drain has to be started anew; it never says what is not so."""
        return receiver in self.abandoned or len(self.abandoned) < MOST_ABANDONED

    def _release_sources(self) -> None:
        reading = {w.serial for w in self.writes.values()}
        for serial in sorted(self.orphans - reading):
            self.orphans.discard(serial)
            self._effects.append(ReleaseSource(serial))

    def _tell(self, slot: Slot, error: e.FerryError | None) -> None:
        offer = slot.offer
        if offer is not None and not offer.told:
            offer.told, offer.error = True, error
            offer.status = Status.SUCCESS if error is None else Status.FAILED
            self._effects.append(Ended(offer.serial, error))
            if error is not None:  # nothing is posted any more: the rows need not wait for the last rank's Close
                self.orphans.add(offer.serial)
                self._release_sources()

    def _show(self, offer: Offer, status: Status) -> None:
        order = list(Status)
        if not offer.told and order.index(status) > order.index(offer.status):
            offer.status = status
            self._effects.append(Progressed(offer.serial))

    def _evict_receiver(self) -> bool:
        """Room for a new receiver: forget one that has nothing here: gone, or of no use, or else the longest silent.

        Should it still be there, it is told so at its next word (`on_message`) and introduces itself again.
        """
        busy = {key[0] for key in self.where} | {w.receiver for w in self.writes.values()}
        idle = [inc for inc in self.receivers if inc not in busy]
        spare = next((inc for inc in idle if self.receivers[inc].gone or not self.receivers[inc].usable), None)
        spare = spare if spare is not None else next(iter(idle), None)
        if spare is not None:
            r = self.receivers.pop(spare)
            if self.newest.get(r.name) == spare:
                del self.newest[r.name]
        return spare is not None


def _lean(hello: m.Hello, ours: set[str]) -> m.Hello:
    """What is worth keeping of a receiver's Hello: of offers that we cannot take only that they were made."""
    return replace(
        hello,
        offers=tuple(o if o.name in ours else replace(o, descriptor=b"", regions=b"") for o in hello.offers),
    )
