"""What a receiver remembers, how it says things, and its canonical snapshot. Every decision is in receiver.py."""

from __future__ import annotations

from collections import Counter
from typing import Any

from msgspec.structs import replace

from tensorferry.core import errors as e
from tensorferry.core import messages as m
from tensorferry.core.allocator import BlockPool
from tensorferry.core.effects import Effect, Progressed, Send
from tensorferry.core.group import SOLO, Decisions, Group
from tensorferry.core.ledger import Ranges, runs_of
from tensorferry.core.policy import ReceiverPolicy
from tensorferry.core.transfer import Peer, Transfer

Snapshot = tuple[Any, ...]


class ReceiverState:
    """The books of one language-side endpoint over one pool. `hello` is the template of our Hello."""

    def __init__(self, hello: m.Hello, pool: BlockPool, policy: ReceiverPolicy, group: Group = SOLO) -> None:
        self.inc = hello.src
        self.hello = hello
        self.pool = pool
        self.policy = policy
        self.group = group
        self.generations = [1] * pool.slabs  # how often each slab has had fresh memory
        self.transfers: dict[int, Transfer] = {}  # by xfer, ascending
        self.rooms: dict[int, int] = {}  # live rooms only
        self.peers: dict[str, Peer] = {}
        self.next_xfer = 1
        self.budget_used = 0
        self.queue: list[int] = []  # waits for a destination, FIFO
        self.line: dict[int, None] = {}  # wants blocks, FIFO
        self.unlent: dict[int, None] = {}  # could be lent to
        self.decisions = Decisions(self.inc, policy.max_rooms)
        self.leader_inc = 0
        self.replacing: set[int] = set()  # slabs that the driver was asked to replace
        self.gone: set[int] = set()  # incarnations proved gone (F4) that a transfer may still hold blocks of
        self.ignored: Counter[str] = Counter()
        self._effects: list[Effect] = []

    def sent_tokens(self, t: Transfer) -> int:
        """The contiguous prefix of what was gathered, in tokens. Only the receiver moves it (WM-1)."""
        return min(t.have.prefix * self.policy.block_size, t.facts.total) if t.facts is not None else 0

    def _of_peer(self, route: str) -> list[Transfer]:
        return [t for t in self.transfers.values() if t.route == route and t.live]

    def _touch(self, t: Transfer) -> None:
        t.touched += 1
        self._effects.append(Progressed(t.xfer))

    def _take_effects(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects

    # ---- saying things ------------------------------------------------------------------------------------------

    @property
    def min_live(self) -> int:
        return next(iter(self.transfers), self.next_xfer)

    def _send(self, route: str, message: m.Message) -> None:
        self._effects.append(Send(route, message))

    def _to_sender(self, t: Transfer, kind: type[m.ToSender], **fields: object) -> None:
        self._send(t.route, kind(src=self.inc, dst=t.sender, min_live=self.min_live, xfer=t.xfer, **fields))

    def _hello(self, peer: Peer) -> m.Hello:
        return replace(self.hello, dst=peer.inc, min_live=self.min_live, ack=max(peer.revision, 0))

    def _send_open(self, t: Transfer) -> None:
        self._to_sender(t, m.Open, room=t.room, rank=self.group.rank, ranks=self.group.ranks, dummy=t.dummy)

    def _send_grant(self, t: Transfer, pairs: list[tuple[int, int]]) -> None:
        runs: list[tuple[int, int, int, int]] = []
        for first, count in runs_of(index for index, _ in pairs):
            blocks = [block for index, block in pairs if first <= index < first + count]
            at = first
            for start, length in runs_of(blocks):
                while length:
                    slab = self.pool.slab_of(start)
                    piece = min(length, (slab + 1) * self.pool.blocks_per_slab - start)
                    runs.append((at, start, piece, self.generations[slab]))
                    at, start, length = at + piece, start + piece, length - piece
        for k in range(0, len(runs), m.MAX_RUNS):
            self._to_sender(
                t, m.Grant, epoch=t.epoch, prefix=t.have.prefix,
                runs=m.pack_grant(runs[k : k + m.MAX_RUNS]),
            )  # fmt: skip

    def _send_vote(self, t: Transfer) -> None:
        """A yes is about what this incarnation of the sender has announced, for rows of another content are no rows;
        and it is a promise to a leader that is known, so that its end can be noticed."""
        binding = t.announced and (self.leader_inc or self.group.leads or not self.group.leader)
        if t.sender and (binding or t.error is not None):
            code, cause = wire_error(t.error)
            self._to_sender(t, m.Complete, ok=t.error is None, code=code, cause=cause)

    def _send_close(self, t: Transfer) -> None:
        code, cause = wire_error(t.error)
        self._to_sender(t, m.Close, code=code, cause=cause)

    def _query(self, t: Transfer) -> None:
        if self.group.leads or not self.group.leader:
            return
        code, cause = wire_error(t.error or t.plea) if t.live else ("", "")
        self._send(self.group.leader, m.Query(
            src=self.inc, dst=self.leader_inc, xfer=t.xfer, room=t.room, rank=self.group.rank,
            ranks=self.group.ranks, heard=not t.live, code=code, cause=cause,
        ))  # fmt: skip

    def _heard(self, xfer: int, room: int) -> m.Query:
        return m.Query(
            src=self.inc, dst=self.leader_inc, xfer=xfer, room=room, rank=self.group.rank,
            ranks=self.group.ranks, heard=True, code="", cause="",
        )  # fmt: skip

    # ---- for exploration: protocol state only (R11) -------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        return (
            tuple(
                (
                    t.xfer, t.room, t.route, t.dummy, t.phase, t.sender, t.announced, t.facts, t.ready, t.epoch,
                    t.have.ranges(), tuple(sorted(t.out.items())), tuple(sorted(t.gathering.items())), t.lent, t.charge,
                    t.last_grant, t.bumps, t.paused, t.exposed, t.error and t.error.code, t.plea and t.plea.code,
                    t.told, t.closed,
                )
                for t in self.transfers.values()
            ),
            tuple(
                (route, p.inc, p.ack, p.revision, p.usable, tuple(sorted(p.buried.items())), p.floor)
                for route, p in sorted(self.peers.items())
            ),
            self.next_xfer, tuple(self.queue), tuple(self.line), tuple(self.unlent), tuple(self.generations),
            self.hello.revision, self.leader_inc, tuple(sorted(self.replacing)),
            tuple(sorted(self.gone)), self.decisions.snapshot(), self.pool.snapshot(),
        )  # fmt: skip

    def restore(self, snapshot: Snapshot) -> None:
        (
            transfers, peers, self.next_xfer, queue, line, unlent, generations, revision, self.leader_inc, replacing,
            gone, decisions, pool,
        ) = snapshot  # fmt: skip
        self.transfers, self.rooms, self.budget_used = {}, {}, 0
        for row in transfers:
            t = Transfer(*row[:10])
            (have, out, gathering, t.lent, t.charge, t.last_grant, t.bumps, t.paused, t.exposed, code, plea,
             t.told, t.closed) = row[10:]  # fmt: skip
            t.have, t.out, t.gathering = Ranges(have), dict(out), dict(gathering)
            t.taken = Ranges([*have, *((i, i + 1) for i in t.out), *((i, i + 1) for i in t.gathering)])
            t.error = e.from_code(code, "restored") if code else None
            t.plea = e.from_code(plea, "restored") if plea else None
            self.transfers[t.xfer] = t
            if t.live:
                self.rooms[t.room] = t.xfer
            if self.group.leads:
                self.budget_used += t.charge
        self.peers = {
            route: Peer(inc, ack, revision, usable, dict(buried), floor)
            for route, inc, ack, revision, usable, buried, floor in peers
        }
        self.queue, self.line, self.unlent = list(queue), dict.fromkeys(line), dict.fromkeys(unlent)
        self.generations, self.replacing, self.gone = list(generations), set(replacing), set(gone)
        self.hello = replace(self.hello, revision=revision, generations=m.pack_generations(generations))
        self.decisions.restore(decisions)
        self.pool.restore(pool)
        self._effects = []


def wire_error(error: e.FerryError | None) -> tuple[str, str]:
    """(code, cause) as they travel: empty for none, bounded."""
    return ("", "") if error is None else (error.code, error.cause[:1000])
