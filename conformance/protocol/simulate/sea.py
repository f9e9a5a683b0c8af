"""What lies between the processes: frames that are lost, doubled and late, and writes that land when they like.

A frame is what the wire carries, so that every message goes through the codec. A flight is one attempt at writing one
block; it may land at any time, also after its sender has died, until it is drained or proved gone.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from tensorferry.conformance.explore.search import Violation
from tensorferry.core import effects as fx
from tensorferry.core import messages as m
from tensorferry.core.errors import TransportError, UnknownInFlight
from tensorferry.core.wire import BadFrame, decode, encode

if TYPE_CHECKING:
    from tensorferry.conformance.protocol.simulate.hosts import Host, SenderHost
    from tensorferry.conformance.protocol.simulate.world import World

WriteId = tuple[int, int, int, int]

CALM_DELAY = (0.0005, 0.01)
STORMY_DELAY = (0.0002, 0.08)


class Bytes(NamedTuple):
    """What stands in a block. `receiver` and `xfer` seed the digest, `content` and `at` say whose rows they are."""

    receiver: int
    xfer: int
    content: int
    at: int
    intact: bool

    @property
    def digest(self) -> int:
        """Ideal, and seeded with the transfer, the content and the position (INT-1)."""
        whole = ((self.receiver * 1021 + self.xfer) * 65537 + self.content) * 65537 + self.at
        return (whole if self.intact else ~whole) & 0xFFFFFFFFFFFFFFFF


class Flight:
    __slots__ = ("at", "block", "bytes", "generation", "gone", "host", "placed", "serial", "target", "unknown", "write")

    def __init__(
        self, host: SenderHost, write: WriteId, at: int, target: int, generation: int, block: int, serial: int,
        content: int,
    ) -> None:  # fmt: skip
        self.host, self.write, self.at, self.target = host, write, at, target
        self.generation, self.block, self.serial = generation, block, serial
        self.bytes = Bytes(write[0], write[1], content, at, True)
        self.placed = False  # its completion is known; its bytes are not visible yet
        self.unknown = False  # was said of it
        self.gone = False  # nothing of it can land any more

    def __str__(self) -> str:
        receiver, xfer, epoch, _ = self.write
        whose = f"receiver {receiver}, xfer {xfer}, sender {self.host.inc}, epoch {epoch}"
        return f"({whose}, index {self.at}) -> {self.block}"


class Sea:
    def __init__(self, world: World) -> None:
        self.world, self.profile, self.rng = world, world.profile, world.rng
        self.flights: list[Flight] = []
        self.ever: list[tuple[int, str, bytes]] = []  # (to, from whom as seen there, frame)
        self.cut: dict[tuple[int, int], float] = {}  # (from, to) -> until when
        self.damaged = 0

    # ---- messages -----------------------------------------------------------------------------------------------

    def _between(self, low: float, high: float) -> float:
        return low * math.exp(self.rng.random() * math.log(high / low))

    def delay(self) -> float:
        if self.world.calm:
            return self._between(*CALM_DELAY)
        if self.rng.random() < self.profile.slow:
            return self._between(0.05, self.profile.slowest)
        return self._between(*STORMY_DELAY)

    def send(self, host: Host, route: str, message: m.Message) -> None:
        world, profile, rng = self.world, self.profile, self.rng
        to, seen_from = world.process(route), world.seen_from(host.number, route)
        frame = encode(message)
        if world.trace is not None:
            world.say(f"{host.name} -> {world.name(to)}: {message}")
        if world.calm:
            world.after(self.delay(), self.arrive, to, seen_from, frame)
            return
        self.ever.append((to, seen_from, frame))
        if self._lost(host.number, to):
            return
        if profile.damage and rng.random() < profile.damage:
            bent = bytearray(frame)
            bent[rng.randrange(len(bent))] ^= 1 << rng.randrange(8)
            world.after(self.delay(), self.arrive, to, seen_from, bytes(bent))
            return
        world.after(self.delay(), self.arrive, to, seen_from, frame)
        if profile.double and rng.random() < profile.double:
            world.after(self.delay(), self.arrive, to, seen_from, frame)

    def _lost(self, sender: int, to: int) -> bool:
        if self.cut and self.cut.get((sender, to), 0.0) > self.world.now:
            return True
        hole = self.profile.blackhole
        if hole is not None and self.world.now % (hole[0] + hole[1]) > hole[0]:
            return True
        return self.profile.loss > 0 and self.rng.random() < self.profile.loss

    def arrive(self, to: int, seen_from: str, frame: bytes) -> None:
        host = self.world.hosts[to]
        if host is None:
            return
        try:
            message = decode(frame)
        except BadFrame:
            self.damaged += 1
            return
        host.deliver(seen_from, message)
        if not self.world.calm and self.profile.ghost and self.rng.random() < self.profile.ghost:
            recent = self.ever[-self.rng.choice((4, 12, 40, 1000)) :]
            self.world.after(self.delay(), self.arrive, *self.rng.choice(recent))

    # ---- writes -------------------------------------------------------------------------------------------------

    def data_delay(self) -> float:
        if not self.world.calm and self.rng.random() < self.profile.late:
            return self._between(0.1, self.profile.latest)
        return self._between(0.0005, 0.03)

    def launch(self, host: SenderHost, effect: fx.PostWrite, content: int) -> None:
        """Post every block of a grant, and decide what becomes of each."""
        world, profile, rng = self.world, self.profile, self.rng
        stormy = not world.calm
        target = world.process(effect.route)
        unknown = stormy and rng.random() < profile.unknown
        if unknown:
            world.after(self._between(0.001, 0.2), self.become_unknown, host, effect.write)
        together = rng.random() < 0.5
        delay = self.data_delay()
        for first, block, count, generation in effect.runs:
            for k in range(count):
                posts = 2 if stormy and rng.random() < profile.retry else 1
                failed = stormy and not unknown and rng.random() < profile.failed
                torn = stormy and rng.random() < profile.torn
                for _ in range(posts):
                    f = Flight(host, effect.write, first + k, target, generation, block + k, effect.serial, content)
                    if torn:
                        f.bytes = f.bytes._replace(intact=False)
                    self.flights.append(f)
                    if not together or posts > 1:
                        delay = self.data_delay()
                    if unknown:
                        delay = self._between(0.01, profile.latest * 2)
                    world.after(delay, self.land, f)
                if failed:
                    world.after(self._between(0.0005, 0.1), self.fail, f)

    def reaches(self, f: Flight) -> bool:
        """The memory that a write was granted is still there."""
        host = self.world.hosts[f.target]
        return host is not None and host.inc == f.write[0] and host.generation_of(f.block) == f.generation

    def appear(self, f: Flight) -> None:
        """Bytes become visible."""
        if self.reaches(f):
            self.world.hosts[f.target].memory[f.block] = f.bytes

    def land(self, f: Flight) -> None:
        if f.gone:
            return
        if f.unknown and self.rng.random() < 0.5:
            self._over(f)  # drains without landing
        elif f.bytes.intact and self.rng.random() < self.profile.invisible and not self.world.calm:
            f.placed = True
            self.world.after(self._between(0.001, 0.5), self.become_visible, f)
        else:
            self._over(f)
            self.appear(f)
        if self.world.trace is not None:
            self.world.say(f"lands: {f}{' torn' * (not f.bytes.intact)}{' invisible' * f.placed}")
        self.complete(f)

    def complete(self, f: Flight) -> None:
        """A write is over. Its sender is told once no attempt at it is left (WS-2)."""
        if self.world.hosts[f.host.number] is not f.host:
            return
        left = any(g.write == f.write and g.at == f.at and g.host is f.host and not g.placed for g in self.flights)
        early = "undrained_ok" in self.world.mutation.world  # told at the first attempt's end, not at the last one's
        if left != early:
            return
        if f.unknown:
            f.host.event("write_drained", f.write, {f.at})
        else:
            f.host.event("write_done", f.write, {f.at: f.bytes._replace(intact=True).digest})

    def become_visible(self, f: Flight) -> None:
        if not f.gone:
            self._over(f)
            self.appear(f)

    def flush(self, target: int) -> None:
        """Placed bytes are visible after it (INT-3)."""
        if "no_flush" not in self.world.mutation.world:
            for f in [f for f in self.flights if f.placed and f.target == target]:
                self.become_visible(f)

    def become_unknown(self, host: SenderHost, write: WriteId) -> None:
        if self.world.hosts[host.number] is host and write in host.machine.writes:
            for f in self.flights:
                if f.host is host and f.write == write and not f.placed:
                    f.unknown = True
            host.event("write_unknown", write, UnknownInFlight("simulated"))

    def fail(self, f: Flight) -> None:
        """FAILED: drained. It may have landed in part before."""
        attempts = [g for g in self.flights if g.host is f.host and g.write == f.write and g.at == f.at]
        if f.gone or f.unknown or not attempts or any(g.placed for g in attempts):
            return
        if self.rng.random() < 0.5:
            f.bytes = f.bytes._replace(intact=False)
            self.appear(f)
        for g in attempts:
            self._over(g)
        if self.world.hosts[f.host.number] is f.host:
            f.host.event("write_failed", f.write, {f.at}, TransportError("simulated"))

    def bury(self, host: Host, target: int) -> None:
        """F4: nothing of a dead sender can land at `target` any more."""
        for f in [f for f in self.flights if f.host is host and f.target == target]:
            self._over(f)

    def _over(self, f: Flight) -> None:
        f.gone = True
        self.flights.remove(f)

    def check_posted(self, host: SenderHost, serial: int) -> None:
        if any(f.host is host and f.serial == serial and not f.placed for f in self.flights):
            raise Violation(f"WM-6 the source of serial {serial} is released under a write")
