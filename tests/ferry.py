"""A ferry without water: sender and receiver machines joined by plain queues, for tests of the machines themselves.

Messages travel in order and writes land at once unless a test holds them back; `memory` keeps, for each block of each
receiver, what was written there last: (serial of the offer, index).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from tensorferry.core import effects as fx
from tensorferry.core import messages as m
from tensorferry.core.allocator import BlockPool
from tensorferry.core.group import SOLO, Group
from tensorferry.core.policy import ReceiverPolicy
from tensorferry.core.receiver import ReceiverMachine
from tensorferry.core.sender import SenderMachine
from tensorferry.core.transfer import Facts

LAYOUT = b"L" * 16
SENDER, LEADER = "tcp://sender", "tcp://leader"


def hello(
    src: int, name: str, *, block_size: int = 1, pool: int = 0, slabs: int = 0, layout: bytes = LAYOUT
) -> m.Hello:
    return m.Hello(
        src=src, dst=0, min_live=1, version=m.PROTOCOL_VERSION, name=name, layout=layout, block_size=block_size,
        pool_blocks=pool, slabs=slabs, generations=m.pack_generations([1] * slabs),
        offers=(m.Offer("fake", 1, "", b"", b""),), revision=1, ack=0,
    )  # fmt: skip


def facts(total: int, content: bytes = b"c" * 16) -> Facts:
    return Facts(total, content, 1, bytes(128), "full")


class Ferry:
    """One sender and `ranks` receivers. `deliver` runs until nothing is under way."""

    def __init__(self, *, pool: int = 4, slabs: int = 1, block_size: int = 1, ranks: int = 1, **policy: object) -> None:
        self.block_size, self.pool_blocks, self.slabs = block_size, pool, slabs
        self.policy = ReceiverPolicy(block_size=block_size, **policy)  # type: ignore[arg-type]
        self.sender = SenderMachine(hello(1000, "sender", block_size=block_size))
        self.receivers: dict[str, ReceiverMachine] = {}
        self.ranks = ranks
        for rank in range(ranks):
            self.add_receiver(f"rank{rank}", 10 + rank, SOLO if ranks == 1 else Group(rank, ranks, LEADER))
        self.queue: deque[tuple[str, str, m.Message]] = deque()  # (from, to, message)
        self.writes: deque[tuple[fx.PostWrite, int, int]] = deque()  # (write, index, block)
        self.hold_writes = False
        self.drop: Callable[[str, m.Message], bool] = lambda to, message: False
        self.memory: dict[tuple[str, int], tuple[int, int]] = {}
        self.rows: dict[tuple[str, int], dict[int, tuple[int, int]]] = {}
        self.ended: dict[tuple[str, int], object] = {}
        self.released: list[int] = []
        self.sent: list[tuple[str, m.Message]] = []

    def add_receiver(self, name: str, inc: int, group: Group = SOLO) -> None:
        pool = BlockPool(self.pool_blocks, -(-self.pool_blocks // self.slabs))
        template = hello(inc, name, block_size=self.block_size, pool=self.pool_blocks, slabs=self.slabs)
        self.receivers[name] = ReceiverMachine(template, pool, self.policy, group)

    @property
    def receiver(self) -> ReceiverMachine:
        return self.receivers["rank0"]

    def send(self, room: int, total: int, *, ready: int | None = None, content: bytes = b"c" * 16) -> int:
        serial, effects = self.sender.offer(room, facts(total, content), total if ready is None else ready)
        self.carry_out("sender", effects)
        return serial

    def receive(self, room: int, rank: str = "rank0", *, dummy: bool = False) -> int:
        xfer, effects = self.receivers[rank].receive(room, SENDER, dummy=dummy)
        self.carry_out(rank, effects)
        return xfer

    def carry_out(self, who: str, effects: list[fx.Effect]) -> None:
        for effect in effects:
            match effect:
                case fx.Send(route, message):
                    self.sent.append((who, message))
                    to = {SENDER: "sender", LEADER: "rank0"}.get(route, route)
                    if not self.drop(to, message):
                        self.queue.append((who, to, message))
                case fx.Connect(route, hello_) if who == "sender":
                    self.carry_out(who, self.sender.connected(hello_.src, None))
                case fx.Connect(route, _):
                    self.carry_out(who, self.receivers[who].connected(route, None))
                case fx.PostWrite() as write:
                    for first, block, count, _ in write.runs:
                        self.writes.extend((write, first + k, block + k) for k in range(count))
                case fx.Gather(xfer, _, items):
                    good, bad = [], []
                    for index, block, digest in items:
                        found = self.memory.get((who, block))
                        (good if found is not None and found[1] == index == digest else bad).append((index, block))
                    for index, block in good:
                        self.rows.setdefault((who, xfer), {})[index] = self.memory[who, block]
                    if good:
                        self.carry_out(who, self.receivers[who].gathered(xfer, [i for i, _ in good]))
                    if bad:
                        self.carry_out(who, self.receivers[who].corrupt(xfer, [i for i, _ in bad]))
                case fx.ReplaceSlab(slab):
                    self.carry_out(who, self.receivers[who].slab_replaced(slab))
                case fx.Ended(key, error):
                    assert (who, key) not in self.ended, "the caller is told the end once"
                    self.ended[who, key] = error
                case fx.ReleaseSource(serial):
                    self.released.append(serial)
                case fx.Drop(xfer):
                    self.rows.pop((who, xfer), None)
                case fx.Reserve() | fx.Progressed():
                    continue

    def land(self, write: fx.PostWrite, index: int, block: int) -> None:
        self.memory[write.route, block] = (write.serial, index)
        if write.write in self.sender.writes:
            self.carry_out("sender", self.sender.write_done(write.write, {index: index}))

    def step(self) -> bool:
        if self.queue:
            source, to, message = self.queue.popleft()
            machine = self.sender if to == "sender" else self.receivers[to]
            route = (
                source
                if to == "sender" or (to == "rank0" and source != "sender")
                else (LEADER if source == "rank0" else SENDER)
            )
            self.carry_out(to, machine.on_message(route, message))
            for r in self.receivers.values():
                r.pool.audit()
            return True
        if self.writes and not self.hold_writes:
            self.land(*self.writes.popleft())
            return True
        return False

    def deliver(self) -> None:
        for _ in range(1_000_000):
            if not self.step():
                return
        raise AssertionError("the ferry never comes to rest")

    def resend(self) -> None:
        """What timers do: everybody says again what is true."""
        for name, r in self.receivers.items():
            for xfer in list(r.transfers):
                self.carry_out(name, r.resend(xfer))
        for slot in list(self.sender.slots):
            self.carry_out("sender", self.sender.resend(slot))
        self.deliver()

    def assert_clean(self) -> None:
        for r in self.receivers.values():
            assert r.pool.free_count == r.pool.blocks
            assert not r.transfers
            assert not r.rooms
            assert r.budget_used == 0
        assert not self.sender.slots
        assert not self.sender.where
        assert not self.sender.writes
        assert not self.sender.orphans
