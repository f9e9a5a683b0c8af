"""The production machines, joined by plain queues, with everything that goes in and comes out written down."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from tensorferry.conformance.protocol.transcripts.values import (
    LEADER,
    SENDER,
    Json,
    Machine,
    apply,
    message_json,
    output_json,
    runs,
)
from tensorferry.core import effects as fx
from tensorferry.core import messages as m
from tensorferry.core.allocator import BlockPool
from tensorferry.core.digest import block_seed, digest
from tensorferry.core.group import SOLO, Group
from tensorferry.core.policy import ReceiverPolicy
from tensorferry.core.receiver import ReceiverMachine
from tensorferry.core.sender import SenderMachine

FORMAT = "tensorferry-transcript/1"
LAYOUT = b"one byte a token"
AUX = bytes(128)


def content_id(content: int) -> bytes:
    return bytes([content]) * 16


def rows(content: int, start: int, stop: int) -> bytes:
    """The rows of a content: one component, `rows`, one byte a token."""
    return bytes((31 * token + content) % 256 for token in range(start, stop))


def new_machine(side: Json) -> Machine:
    """A machine as a transcript describes it."""
    pool, slabs = side.get("pool_blocks", 0), side.get("slabs", 0)
    hello = m.Hello(
        src=side["incarnation"], dst=0, min_live=1, version=side["version"], name=side["name"],
        layout=bytes.fromhex(side["layout"]), block_size=side["block_size"], pool_blocks=pool, slabs=slabs,
        generations=m.pack_generations([1] * slabs), offers=(m.Offer("golden", 1, "", b"\x01", b""),), revision=1,
        ack=0,
    )  # fmt: skip
    if side["role"] == "sender":
        return SenderMachine(hello)
    policy = ReceiverPolicy(
        block_size=side["block_size"], first_grant=side["first_grant"], optimistic=side["optimistic"],
        window=side["window"], budget=side["budget"],
    )  # fmt: skip
    group = SOLO if side["ranks"] == 1 else Group(side["rank"], side["ranks"], LEADER)
    return ReceiverMachine(hello, BlockPool(pool, -(-pool // slabs)), policy, group)


class Tape:
    """Two sides (or a sender and ranks). Methods are what a scenario does; `steps` is what a transcript holds."""

    def __init__(
        self, *, pool: int = 8, slabs: int = 1, block_size: int = 128, first_grant: int = 4, optimistic: bool = True,
        window: Any = "rounds", ranks: int = 1, budget: int = 9,
    ) -> None:  # fmt: skip
        shared = {"version": m.PROTOCOL_VERSION, "layout": LAYOUT.hex(), "block_size": block_size}
        self.block_size = block_size
        self.sides: dict[str, Json] = {"sender": {"role": "sender", "incarnation": 1000, "name": "s", **shared}}
        for rank in range(ranks):
            self.sides["receiver" if ranks == 1 else f"rank{rank}"] = {
                "role": "receiver", "incarnation": 10 + rank, "name": f"r{rank}", **shared, "pool_blocks": pool,
                "slabs": slabs, "first_grant": first_grant, "optimistic": optimistic, "window": window,
                "budget": budget, "rank": rank, "ranks": ranks,
            }  # fmt: skip
        self.machines: dict[str, Machine] = {}
        self.steps: list[Json] = []
        self.mail: deque[tuple[str, str, m.Message]] = deque()  # (from, to, message)
        self.posts: deque[fx.PostWrite] = deque()
        self.blocks: dict[tuple[int, int], tuple[int, int]] = {}  # (receiver incarnation, block) -> content, index
        self.facts: dict[int, tuple[int, int]] = {}  # offer -> content, total
        self.lengths: dict[int, int] = {}  # content -> total
        self.hold_writes = self.hold_gathers = False
        self.gathers: deque[tuple[str, fx.Gather]] = deque()
        self.lose: Callable[[str, m.Message], bool] = lambda to, message: False

    def start(self, *names: str) -> None:
        for name in names or tuple(self.sides):
            self.machines[name] = new_machine(self.sides[name])

    def restart(self, name: str) -> None:
        """A new process in the place of `name`: the next incarnation, nothing remembered."""
        old = self.sides[name]["incarnation"]
        self.sides[name] = {**self.sides[name], "incarnation": old + 1}
        self.steps.append({"at": name, "restart": old + 1})
        self.machines[name] = new_machine(self.sides[name])
        self.posts = deque(post for post in self.posts if name != "sender")
        self.mail = deque(mail for mail in self.mail if mail[1] != name)

    # ---- inputs -------------------------------------------------------------------------------------------------

    def input(self, name: str, told: Json, why: str = "") -> None:
        effects = apply(self.machines[name], told)
        said = [output for effect in effects if (output := output_json(effect)) is not None]
        self.steps.append({"at": name, **({"why": why} if why else {}), "in": told, "then": said})
        for effect in effects:
            self._carry_out(name, effect)

    def event(self, name: str, kind: str, why: str = "", **given: Any) -> None:
        self.input(name, {"event": kind, **given}, why)

    def receive(self, room: int, name: str = "receiver", *, dummy: bool = False) -> None:
        self.event(name, "receive", room=room, sender=SENDER, dummy=dummy)

    def offer(self, room: int, total: int, content: int = 1, ready: int | None = None) -> None:
        sender = self.machines["sender"]
        assert isinstance(sender, SenderMachine)
        self.facts[sender.next_serial] = (content, total)
        self.lengths[content] = total
        self.event(
            "sender", "offer", room=room, total=total, content_id=content_id(content).hex(), present=1, aux=AUX.hex(),
            integrity="full", ready=total if ready is None else ready,
        )  # fmt: skip

    # ---- what goes by itself ------------------------------------------------------------------------------------

    def _carry_out(self, name: str, effect: fx.Effect) -> None:
        match effect:
            case fx.Send(route, message):
                to = {SENDER: "sender", LEADER: "rank0"}.get(route, route)
                if to in self.machines and not self.lose(to, message):
                    self.mail.append((name, to, message))
            case fx.Connect(route, hello) if name == "sender":
                self.event(name, "connected", receiver=hello.src, via="golden", path="memcpy")
            case fx.Connect(route, _):
                self.event(name, "connected", peer=route)
            case fx.PostWrite():
                self.posts.append(effect)
            case fx.Gather():
                self.gathers.append((name, effect))
            case fx.ReplaceSlab(slab):
                self.event(name, "slab_replaced", slab=slab)

    def route(self, source: str, to: str) -> str:
        """Under which name `to` sees `source`: a listener by its address, whoever connects by an identity."""
        if source == "sender":
            return SENDER
        return LEADER if source == "rank0" and to != "sender" else source

    def deliver(self, source: str, to: str, message: m.Message, why: str = "") -> None:
        self.input(to, {"message": message_json(message), "from": self.route(source, to)}, why)

    def digest(self, receiver: int, xfer: int, content: int, index: int) -> int:
        start = index * self.block_size
        view = memoryview(rows(content, start, min(start + self.block_size, self.lengths[content])))
        return digest([("rows", view)], block_seed(receiver, xfer, content_id(content), index), "full")

    def land(self, post: fx.PostWrite, *, told: bool = True) -> None:
        """The bytes of a write arrive; the sender is told."""
        content, _ = self.facts[post.serial]
        digests = {}
        for first, block, count, _ in post.runs:
            for k in range(count):
                self.blocks[post.receiver, block + k] = (content, first + k)
                digests[str(first + k)] = f"{self.digest(post.receiver, post.xfer, content, first + k):016x}"
        if told:
            self.event("sender", "write_done", write=list(post.write), digests=digests)

    def gather(self, name: str, job: fx.Gather) -> None:
        """Verify digests, copy rows; tell the machine."""
        inc = self.sides[name]["incarnation"]
        good: list[int] = []
        bad: list[int] = []
        for index, block, said in job.items:
            content, at = self.blocks[inc, block]
            right = at == index and self.digest(inc, job.xfer, content, index) == said
            (good if right else bad).append(index)
        if good:
            self.event(name, "gathered", xfer=job.xfer, indices=runs(good))
        if bad:
            self.event(name, "corrupt", xfer=job.xfer, indices=runs(bad))

    def step(self) -> bool:
        if self.gathers and not self.hold_gathers:
            self.gather(*self.gathers.popleft())
        elif self.mail:
            self.deliver(*self.mail.popleft())
        elif self.posts and not self.hold_writes:
            self.land(self.posts.popleft())
        else:
            return False
        return True

    def run(self) -> None:
        """Until nothing is under way."""
        for _ in range(100_000):
            if not self.step():
                return
        raise RuntimeError("the scenario never comes to rest")

    def resend(self) -> None:
        """Timers: everybody says again what is true."""
        for name, machine in self.machines.items():
            if isinstance(machine, ReceiverMachine):
                for xfer in list(machine.transfers):
                    self.event(name, "resend", xfer=xfer)
            else:
                for slot in list(machine.slots):
                    self.event(name, "resend", slot=slot)

    def assert_clean(self) -> None:
        """Nothing is left on either side (LV-2)."""
        for name, machine in self.machines.items():
            if isinstance(machine, ReceiverMachine):
                left = [*machine.transfers, *machine.pool.granted, *machine.pool.quarantined]
                left += [machine.budget_used] * (machine.budget_used > 0)
            else:
                left = [*machine.slots, *machine.serials, *machine.orphans] + [1] * len(machine.writes)
            if left:
                raise RuntimeError(f"{name} is not clean: {left}")
