"""The processes: production machines under simulated drivers, which keep the timers that the real ones keep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensorferry.conformance.explore.search import Violation
from tensorferry.conformance.protocol.simulate.sea import Bytes
from tensorferry.core import effects as fx
from tensorferry.core import messages as m
from tensorferry.core.errors import (
    FerryError,
    InternalError,
    Overloaded,
    PeerLost,
    PeerUnreachable,
    RoomInUse,
)
from tensorferry.core.receiver import ReceiverMachine
from tensorferry.core.sender import SenderMachine
from tensorferry.core.timing import Watches, bump_pause

if TYPE_CHECKING:
    from tensorferry.conformance.protocol.simulate.world import World

HEARTBEAT, PEER_TIMEOUT, ANNOUNCE_DEADLINE, TICK = 0.5, 3.0, 5.0, 0.2

BROKEN = (InternalError, AssertionError, LookupError, TypeError, AttributeError, StopIteration, ValueError)


class Host:
    """One life of a process."""

    machine: Any

    def __init__(self, world: World, number: int, inc: int) -> None:
        self.world, self.number, self.inc = world, number, inc
        self.name = world.name(number)
        self.watches = Watches()
        self.depth = 0
        self.memory: dict[int, Bytes] = {}

    @property
    def alive(self) -> bool:
        return self.world.hosts[self.number] is self

    def event(self, kind: str, *args: Any, **more: Any) -> Any:
        """One event of the machine, and all that follows from it at once. Raises Violation; RoomInUse, Overloaded."""
        world = self.world
        if world.trace is not None and kind != "on_message":
            world.say(f"{self.name}.{kind}{args}")
        world.events += 1
        try:
            answer = getattr(self.machine, kind)(*args, **more)
        except (RoomInUse, Overloaded):
            raise
        except BROKEN as broken:
            raise Violation(f"GR-4 {self.name} raised {type(broken).__name__} at {kind}: {broken}") from broken
        effects = answer[1] if isinstance(answer, tuple) else answer
        if effects:
            self.depth += 1
            for effect in effects:
                self.carry_out(effect)
            self.depth -= 1
        if not self.depth:
            self.world.judge(self)
        return answer[0] if isinstance(answer, tuple) else None

    def carry_out(self, effect: fx.Effect) -> None:
        raise NotImplementedError

    def deliver(self, route: str, message: m.Message) -> None:
        if self.world.trace is not None:
            self.world.say(f"{self.name} <- {route}: {message}")
        self.event("on_message", route, message)

    def generation_of(self, block: int) -> int:
        return 0

    def tick(self) -> None:
        raise NotImplementedError


class ReceiverHost(Host):
    machine: ReceiverMachine

    def __init__(self, world: World, number: int, inc: int) -> None:
        super().__init__(world, number, inc)
        self.machine = world.new_receiver(number, inc)
        self.heard: dict[str, float] = {}
        self.destination: dict[int, int] = {}  # xfer -> how often its rows were dropped
        self.rows: dict[int, dict[int, int]] = {}  # xfer -> index -> content
        self.marks: dict[int, tuple[bytes | None, int]] = {}  # xfer -> content, watermark
        self.freed: list[int] = []  # blocks in the order in which they came free last

    def generation_of(self, block: int) -> int:
        return self.machine.generations[block // self.machine.pool.blocks_per_slab]

    def deliver(self, route: str, message: m.Message) -> None:
        if route in self.machine.peers:
            self.heard[route] = self.world.now
        if isinstance(message, m.Fenced):
            self.world.sea.flush(self.number)  # what is placed is visible before a fence frees its block (INT-3)
        super().deliver(route, message)

    def carry_out(self, effect: fx.Effect) -> None:
        world = self.world
        match effect:
            case fx.Send(route, message):
                world.sea.send(self, route, message)
            case fx.Connect(route, hello):
                self.event("connected", route, None)
                world.met(self, hello.src)
            case fx.Gather(xfer, _, items):
                job = (xfer, items, self.destination.get(xfer, 0))
                if world.rng.random() < world.profile.slow_gather:
                    world.after(world.rng.uniform(0.0005, 0.1), self.gather, *job)
                else:
                    self.gather(*job)
            case fx.Drop(xfer):
                self.destination[xfer] = self.destination.get(xfer, 0) + 1
                self.rows.pop(xfer, None)
            case fx.ReplaceSlab(slab):
                world.after(world.rng.uniform(0.0, 0.05), self.replaced, slab)
            case fx.Ended(xfer, error):
                world.receiver_ended(self, xfer, error)

    def replaced(self, slab: int) -> None:
        if self.alive:
            for block in [b for b in self.memory if self.machine.pool.slab_of(b) == slab]:
                del self.memory[block]
            self.event("slab_replaced", slab)

    def gather(self, xfer: int, items: tuple[tuple[int, int, int], ...], destination: int) -> None:
        """Flush, verify, copy; then tell the machine."""
        if not self.alive:
            return
        world = self.world
        world.sea.flush(self.number)
        good, bad = [], []
        for index, block, said in items:
            there = self.memory.get(block)
            real = there is not None and there.digest == said and there.at == index
            if real or "no_digest" in world.mutation.world:
                whose = there and (there.receiver, there.xfer, there.at, there.intact)
                if there is None or whose != (self.inc, xfer, index, True):
                    raise Violation(f"I3 wrong rows accepted: index {index} of xfer {xfer} is {there}")
                good.append(index)
                if self.destination.get(xfer, 0) == destination:
                    self.rows.setdefault(xfer, {})[index] = there.content
            else:
                bad.append(index)
        if good:
            self.event("gathered", xfer, good)
        if bad:
            self.event("corrupt", xfer, bad)

    # ---- time ---------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        machine, world, now = self.machine, self.world, self.world.now
        keys: set[Any] = set()
        for t in list(machine.transfers.values()):
            keys |= {("xfer", t.xfer)}
            if self.watches.repeat(("xfer", t.xfer), t.touched, now):
                self.event("resend", t.xfer)
            if t.paused:
                keys.add(("paused", t.xfer, t.bumps))
                if self.watches.age(("paused", t.xfer, t.bumps), now) >= bump_pause(t.bumps):
                    self.event("resume_grants", t.xfer)
        for xfer in machine.decisions.uses.keys() - machine.transfers.keys():
            keys.add(("verdict", xfer))
            if self.watches.repeat(("verdict", xfer), xfer, now):
                self.event("resend", xfer)
        for route in sorted({t.route for t in machine.transfers.values()}):
            self._watch_route(route, now, keys)
        for inc in sorted({tenant.sender for tenant in machine.pool.quarantined.values()}):
            keys.add(("quarantine", inc))
            if world.profile.suspicious and self.watches.age(("quarantine", inc), now) > PEER_TIMEOUT:
                if "timer_fence" in world.mutation.world:
                    machine.pool.gone(inc)
                    self.event("resume_grants", 0)
                else:
                    self.event("fence_overdue", inc)
        self.watches.keep_only(keys)

    def _watch_route(self, route: str, now: float, keys: set[Any]) -> None:
        peer = self.machine.peers[route]
        if peer.inc:
            keys |= {("met", route), ("silence", route)}
            silent = now - max(self.heard.get(route, now), now - self.watches.age(("silence", route), now))
            if silent > PEER_TIMEOUT and self.world.profile.suspicious:
                self.world.doubt("a sender was believed lost")
                self.event("peer_silent", route, PeerLost("silent"))
            elif self.watches.every(("met", route), HEARTBEAT, now):
                self.event("heartbeat", route)
            return
        for t in [t for t in self.machine.transfers.values() if t.route == route]:
            keys.add(("meeting", t.xfer))
            if self.watches.age(("meeting", t.xfer), now) > PEER_TIMEOUT and self.world.profile.suspicious:
                self.world.doubt("a sender did not answer")
                self.event("peer_silent", route, PeerUnreachable("nobody answered"), t.xfer)


class SenderHost(Host):
    machine: SenderMachine

    def __init__(self, world: World, number: int, inc: int) -> None:
        super().__init__(world, number, inc)
        self.machine = world.new_sender(number, inc)
        self.heard: dict[int, float] = {}

    def deliver(self, route: str, message: m.Message) -> None:
        super().deliver(route, message)
        if message.src in self.machine.receivers:
            self.heard[message.src] = self.world.now

    def carry_out(self, effect: fx.Effect) -> None:
        world = self.world
        match effect:
            case fx.Send(route, message):
                world.sea.send(self, route, message)
            case fx.Connect(_, hello):
                self.event("connected", hello.src, None, "simulated")
                world.met(self, hello.src)
            case fx.PostWrite():
                if world.rng.random() < 0.4:  # at once, without asking whether it is still wanted: both are right
                    self.launch(effect)
                else:
                    world.after(world.rng.choice((0.0, 0.002, 0.05)), self.post, effect)
            case fx.ReleaseSource(serial):
                world.released(self, serial)
            case fx.Ended(serial, error):
                world.sender_ended(self, serial, error)

    def post(self, effect: fx.PostWrite) -> None:
        if not self.alive:
            return
        if not self.machine.wants(effect.write):  # revoked before it was posted: it never will be
            write = self.machine.writes.get(effect.write)
            if write is not None:
                self.event("write_drained", effect.write, set(write.outstanding))
            return
        self.launch(effect)

    def launch(self, effect: fx.PostWrite) -> None:
        self.world.sea.launch(self, effect, self.world.content_of(self, effect.serial))
        self.world.judge_writes(self.world.process(effect.route))

    # ---- time ---------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        machine, now, watches = self.machine, self.world.now, self.watches
        keys: set[Any] = set()
        for receiver in sorted({b.receiver for slot in machine.slots.values() for b in slot.bindings.values()}):
            key = ("receiver", receiver)
            keys.add(key)
            heard = self.heard.setdefault(receiver, now)
            if now - heard > PEER_TIMEOUT and self.world.profile.suspicious:
                self.lose(receiver, gone=False)
            elif watches.every(key, HEARTBEAT, now):
                self.event("heartbeat", receiver)
        for slot in list(machine.slots.values()):
            keys.add(("slot", slot.id))
            if watches.repeat(("slot", slot.id), slot.touched, now):
                self.event("resend", slot.id)
            if slot.offer is not None and not slot.offer.told:
                if slot.lost and not slot.bindings:
                    keys.add(("lost", slot.id))
                    if watches.age(("lost", slot.id), now) > PEER_TIMEOUT:
                        self.event("cancel", slot.offer.serial, PeerLost("lost"))
            elif slot.decision == "abort":
                keys.add(("abort", slot.id))
                if watches.age(("abort", slot.id), now) > ANNOUNCE_DEADLINE:
                    self.event("force_end", slot.id)
        for room in sorted(machine.given_up.keys() | machine.withdrawn.keys()):
            keys.add(("ended early", room))
            if watches.age(("ended early", room), now) > ANNOUNCE_DEADLINE:
                machine.forget_ended(room)
        watches.keep_only(keys)

    def lose(self, receiver: int, *, gone: bool) -> None:
        self.world.doubt("a receiver was believed lost")
        self.heard.pop(receiver, None)
        self.event("receiver_lost", receiver, PeerLost("silent, or proved dead"), gone=gone)


def why(error: FerryError | None) -> str:
    return "ok" if error is None else error.code
