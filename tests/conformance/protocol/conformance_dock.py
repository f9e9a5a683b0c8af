"""A dock: real rows, real memory, real posts and gathers, and no threads: whoever holds the dock takes every turn.

The parts are the endpoints' own (Poster, Gatherer, PoolBuffers, Source), over the memory transport behind the fault
proxy. Messages lie in `mail` until somebody delivers, doubles or loses them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from memory_kit import random_rows, same_bytes

from tensorferry.backends.memory import MemoryTransport
from tensorferry.conformance.fault_policy import Policy
from tensorferry.conformance.faults import wrapped
from tensorferry.core import effects as fx
from tensorferry.core import messages as m
from tensorferry.core.allocator import BlockPool, Choose
from tensorferry.core.buffers import Destination, PoolBuffers
from tensorferry.core.carriers import Carriers
from tensorferry.core.errors import Cancelled, DeadlineExceeded, FerryError, PeerLost
from tensorferry.core.gathering import Gatherer
from tensorferry.core.layout import Component, Geometry, Layout
from tensorferry.core.policy import ReceiverPolicy
from tensorferry.core.posting import Poster, Target
from tensorferry.core.receiver import ReceiverMachine
from tensorferry.core.sender import SenderMachine
from tensorferry.core.source import Source
from tensorferry.core.staging import Stagings
from tensorferry.core.transfer import Facts
from tensorferry.core.transport import Copy

LAYOUT = Layout([
    Component("rows", "bfloat16", (40,)), Component("ids", "int32", ()),
    Component("extra", "float32", (3,), optional=True),
])  # fmt: skip

SENDER = "tcp://sender"


class Prompt(MemoryTransport):
    """The memory transport, done when `post` returns: no thread decides anything here."""

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self._finished = threading.Event()
        self.on_progress(self._finished.set)

    def post(self, peer: Any, copies: Iterable[Copy]) -> int:
        self._finished.clear()
        handle = super().post(peer, list(copies))
        while not self.drained(handle):
            self._finished.wait(1.0)
        return handle


class SendingSide:
    def __init__(self, dock: Dock, inc: int, policy: Policy) -> None:
        self.dock, self.inc = dock, inc
        self.transport = wrapped(Prompt(Prompt.options_type()), policy)
        self.carriers = Carriers(self.transport)
        self.staging = Stagings(self.carriers, 1 << 16)
        self.machine = SenderMachine(dock.hello(inc, "sender", 0, self.carriers.offers(), []))
        self.poster = Poster(
            LAYOUT, self.carriers, self.machine, self.do, staging=self.staging, block_size=dock.block_size
        )
        self.ended: dict[int, FerryError | None] = {}
        self.rooms: dict[int, int] = {}  # room -> serial of its newest offer

    def offer(self, room: int, rows: dict[str, torch.Tensor], content_id: bytes, ready: int) -> None:
        total = len(rows["ids"])
        source = Source(LAYOUT, total, rows)
        source.integrity = "full"
        source.put(0, **{name: tensor[:ready] for name, tensor in rows.items()})
        facts = Facts(total, content_id, LAYOUT.presence(source.names), bytes(128), source.integrity)
        serial, effects = self.machine.offer(room, facts, source.ready)
        self.poster.sources[serial] = source
        self.rooms[room] = serial
        self.do(effects)

    def put_rest(self, room: int, rows: dict[str, torch.Tensor]) -> None:
        serial = self.rooms[room]
        source = self.poster.sources.get(serial)
        if source is not None and serial not in self.ended and source.ready < source.total_tokens:
            source.put(source.ready, **{name: tensor[source.ready :] for name, tensor in rows.items()})
            self.do(self.machine.extend(serial, source.ready))

    def give_up(self) -> None:
        """The deadline of what nobody will come for: it was cancelled before the two had met, or delivered before."""
        for serial in self.rooms.values():
            if serial not in self.ended:
                self.do(self.machine.cancel(serial, DeadlineExceeded("nobody came")))

    def do(self, effects: Iterable[fx.Effect]) -> None:
        for effect in effects:
            match effect:
                case fx.Send(route, message):
                    self.dock.mail.append((route, SENDER, message))
                case fx.Connect(_, hello):
                    reach = self.carriers.reach(hello, hello.name)
                    geometry = Geometry(hello.block_size, hello.pool_blocks, hello.slabs)
                    self.poster.targets[hello.src] = Target(reach, geometry, m.unpack_generations(hello.generations))
                    self.do(self.machine.connected(hello.src, None, "memory"))
                case fx.PostWrite():
                    self.poster.put(effect)
                case fx.ReleaseSource(serial):
                    self.poster.sources.pop(serial).release()
                case fx.Ended(serial, error):
                    assert serial not in self.ended, "CN-2"
                    self.ended[serial] = error


class Dock:
    def __init__(
        self, *, pool: int, slabs: int, block_size: int, window: Any, first_grant: int, choose: Choose, policy: Policy
    ) -> None:
        self.block_size, self.policy = block_size, policy
        self.mail: list[tuple[str, str, m.Message]] = []  # (to, from, message)
        self.geometry = Geometry(block_size, pool, slabs)
        slabs = self.geometry.slab_count
        self.carriers = Carriers(wrapped(Prompt(Prompt.options_type()), Policy.empty()))
        self.buffers = PoolBuffers(self.carriers, LAYOUT, self.geometry, poison=True)
        self.poisoned = set(range(pool))
        self.stale: list[str] = []

        def pick(pieces: list[tuple[int, int]], n: int) -> list[int]:
            chosen = choose(pieces, n)
            self.look_for_poison(self.poisoned.intersection(chosen))
            return chosen

        hello = self.hello(10, "receiver", pool, self.carriers.offers(self.buffers.regions()), [1] * slabs)
        self.machine = ReceiverMachine(
            hello, BlockPool(pool, self.geometry.blocks_per_slab, pick),
            ReceiverPolicy(block_size=block_size, first_grant=min(first_grant, pool) or 1, optimistic=first_grant > 0,
                           window=window, max_bumps=1 << 20),
        )  # fmt: skip
        self.gatherer = Gatherer(self.buffers, self.machine, self.do)
        self.results: dict[int, Any] = {}
        self.ended: dict[int, FerryError | None] = {}
        self.marks: dict[int, tuple[bytes, int]] = {}
        self.dead: list[SendingSide] = []
        self.sender = SendingSide(self, 1000, policy)

    def hello(self, inc: int, name: str, pool: int, offers: tuple[m.Offer, ...], generations: list[int]) -> m.Hello:
        return m.Hello(
            src=inc, dst=0, min_live=1, version=m.PROTOCOL_VERSION, name=name, layout=LAYOUT.fingerprint,
            block_size=self.block_size, pool_blocks=pool, slabs=len(generations),
            generations=m.pack_generations(generations), offers=offers, revision=1, ack=0,
        )  # fmt: skip

    # ---- the receiver's driver ----------------------------------------------------------------------------------

    def do(self, effects: Iterable[fx.Effect]) -> None:
        for effect in effects:
            match effect:
                case fx.Send(_, message):
                    self.mail.append((SENDER, "receiver", message))
                case fx.Connect(route, _):
                    self.do(self.machine.connected(route, None))
                case fx.Reserve(xfer):
                    facts = self.machine.transfers[xfer].facts
                    assert facts is not None
                    names = LAYOUT.present(facts.present)
                    self.gatherer.destinations[xfer] = Destination(LAYOUT, facts.total, names)
                case fx.Drop(xfer):
                    self.gatherer.destinations.pop(xfer, None)
                case fx.Gather():
                    self.gatherer.gather(effect)
                case fx.ReplaceSlab(slab):
                    late = {self.machine.pool.quarantined[b].sender for b in self.geometry.slab_blocks(slab)
                            if b in self.machine.pool.quarantined}  # fmt: skip
                    self.buffers.replace(slab, late)
                    offers = self.carriers.offers(self.buffers.regions())
                    self.do(self.machine.slab_replaced(slab, offers))
                case fx.Ended(xfer, error):
                    assert xfer not in self.ended, "CN-2"
                    self.ended[xfer] = error
                    destination = self.gatherer.destinations.pop(xfer, None)
                    if error is None and destination is not None:
                        self.results[xfer] = destination.result([0] * 16)
        free = set(self.machine.pool.free_blocks)
        for block in free - self.poisoned:
            self.buffers.poison(block)
        self.poisoned = free

    def look_for_poison(self, blocks: Iterable[int]) -> None:
        """WS-7: nobody has written to a block that nobody was granted."""
        for block in blocks:
            self.buffers.check_poison(block)

    # ---- what can happen ----------------------------------------------------------------------------------------

    def deliver(self, at: int, *, keep: bool = False) -> None:
        to, source, message = self.mail[at] if keep else self.mail.pop(at)
        if to == SENDER:
            self.sender.do(self.sender.machine.on_message(source, message))
        else:
            self.do(self.machine.on_message(source, message))

    def progress(self) -> None:
        """A turn of every driver, those of dead senders' engines included."""
        self.sender.poster.progress()
        for zombie in self.dead:
            zombie.transport.step()
            for posted in zombie.poster._posted.values():
                posted.transport.poll(posted.handle)
        self.gatherer.finish()

    def resend(self) -> None:
        self.do(self.machine.heartbeat(SENDER))
        for xfer in list(self.machine.transfers):
            self.do(self.machine.resend(xfer))
        for slot in list(self.sender.machine.slots):
            self.sender.do(self.sender.machine.resend(slot))

    def cancel(self, xfer: int) -> None:
        self.do(self.machine.cancel(xfer, Cancelled("not wanted")))

    def suspect(self, xfer: int) -> None:
        self.do(self.machine.suspect(xfer, PeerLost("suspected")))

    def overdue(self) -> None:
        for inc in sorted({tenant.sender for tenant in self.machine.pool.quarantined.values()}):
            self.do(self.machine.fence_overdue(inc))

    def restart_sender(self) -> None:
        """Dead, and not proved so: what its engine still holds lands when it likes."""
        self.dead.append(self.sender)
        self.mail = [mail for mail in self.mail if mail[0] != SENDER]
        self.sender = SendingSide(self, self.sender.inc + 1, self.policy)

    def prove(self) -> None:
        """F4, for the sender that died first: its engine is gone, and with it whatever it held."""
        if self.dead:
            zombie = self.dead.pop(0)
            zombie.transport.close()
            self.do(self.machine.peer_gone(zombie.inc))

    # ---- what has to be true ------------------------------------------------------------------------------------

    def check(self) -> None:
        self.machine.pool.audit()
        self.look_for_poison(self.poisoned)
        for t in self.machine.transfers.values():
            if t.facts is not None:
                content, mark = self.marks.get(t.xfer, (b"", 0))
                now = self.machine.sent_tokens(t)
                assert content != t.facts.content_id or now >= mark, "WM-1"
                self.marks[t.xfer] = (t.facts.content_id, now)

    def calm(self, over: Callable[[], bool]) -> None:
        """Nothing is lost any more; everything has to come to its end."""
        while self.dead:
            self.prove()
        for turn in range(3000):
            if self.mail:
                self.deliver(0)
            self.progress()
            self.check()
            if not self.mail and turn % 5 == 0:
                if over() and not self.machine.transfers:
                    if not self.sender.machine.slots:
                        return
                    self.sender.give_up()
                self.resend()
        raise AssertionError(f"LV-1 it does not end: {self.machine.transfers} {self.sender.machine.slots}")

    def close(self) -> None:
        for side in (*self.dead, self.sender):
            side.staging.close()
            side.carriers.close()
        self.buffers.close()
        self.carriers.close()


def rows_of(total: int, seed: int, extra: bool) -> dict[str, torch.Tensor]:
    return random_rows(LAYOUT, ["rows", "ids", *(["extra"] if extra else [])], total, seed)


def assert_same(result: Any, rows: dict[str, torch.Tensor]) -> None:
    """Bit for bit (WM-4)."""
    for name in LAYOUT.names:
        if name in rows:
            assert same_bytes(result[name], rows[name]), name
        else:
            assert result[name] is None
