"""Event loops in the shape of SGLang's schedulers, with queues and polls and no model: one for each side.

They go by SGLang's habits: a request is polled once a tick, what is due for its state is called, nothing waits, and the
ranks of a framework take the least of their polls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from tensorferry.core.errors import FerryError
from tensorferry.plugins.sglang import FerryKVManager, FerryKVReceiver, FerryKVSender, KVPoll, Lease


def as_request(rows: Mapping[str, torch.Tensor], *, delta: int = -7) -> SimpleNamespace:
    """Our rows as SGLang has them on a request: ids in a list, positions [3, n] in int64, the delta [[d]]."""
    inputs = SimpleNamespace(
        mrope_positions=rows["mrope_positions"].t().to(torch.int64),
        mrope_position_delta=torch.tensor([[delta]]),
    )
    return SimpleNamespace(embedding=rows["input_embeds"], fill_ids=rows["fill_ids"].tolist(), multimodal_inputs=inputs)


@dataclass(eq=False)
class Tracked:
    """One request in a loop: `seen` has its polls in order, without repetitions."""

    room: int
    end: FerryKVSender | FerryKVReceiver
    lease: Lease | None = None
    seen: list[KVPoll] = field(default_factory=list)
    error: FerryError | None = None
    buffers: tuple[Any, ...] | None = None
    req: Any = None
    steps: list[int] = field(default_factory=list)

    def look(self) -> KVPoll:
        poll = self.end.poll()
        assert self.end.poll() == poll or not self.seen or self.seen[-1] <= poll or poll == KVPoll.Failed
        if not self.seen or self.seen[-1] != poll:
            self.seen.append(poll)
        return poll

    def failed(self) -> None:
        try:
            self.end.failure_exception()
        except FerryError as error:
            self.error = error  # and no more than that: SGLang's own clears the request by itself


class LanguageLoop:
    """Prealloc queue, then transfer queue; every receiver of a room, one for each rank, moves with the others."""

    def __init__(self, *managers: FerryKVManager, kinds: Mapping[int, type[FerryKVReceiver]] | None = None) -> None:
        self.managers = managers
        self.kinds = kinds or {}
        self.waiting: list[list[Tracked]] = []
        self.transferring: list[list[Tracked]] = []
        self.over: dict[int, list[Tracked]] = {}

    def add(self, room: int, address: str) -> list[Tracked]:
        ranks = []
        for rank, manager in enumerate(self.managers):
            kind = self.kinds.get(rank, FerryKVReceiver)
            ranks.append(Tracked(room, kind(mgr=manager, bootstrap_addr=address, bootstrap_room=room)))
            assert ranks[-1].look() == KVPoll.Bootstrapping
            ranks[-1].end.init(0)
        self.waiting.append(ranks)
        return ranks

    def tick(self) -> bool:
        """One turn of the loop; true when nothing is left to do."""
        for ranks in list(self.waiting):
            poll = min(t.look() for t in ranks)
            if poll == KVPoll.Failed:
                self._finish(self.waiting, ranks, failed=True)
            elif poll == KVPoll.WaitingForInput:
                for manager, tracked in zip(self.managers, ranks, strict=True):
                    assert manager.buffers.available_size() > 0
                    tracked.lease = manager.buffers.alloc(
                        num_tokens=manager.settings.first_grant, req_id=f"r{tracked.room}"
                    )
                    tracked.end.send_metadata(tracked.lease, None, None)
                self.waiting.remove(ranks)
                self.transferring.append(ranks)
        for ranks in list(self.transferring):
            poll = min(t.look() for t in ranks)
            if poll in (KVPoll.Failed, KVPoll.Success):
                self._finish(self.transferring, ranks, failed=poll == KVPoll.Failed)
        return not self.waiting and not self.transferring

    def _finish(self, queue: list[list[Tracked]], ranks: list[Tracked], *, failed: bool) -> None:
        for manager, tracked in zip(self.managers, ranks, strict=True):
            if failed:
                tracked.failed()
            else:
                tracked.end.clear()
                tracked.buffers = manager.buffers.get_buf(block_indices=tracked.lease)
                tracked.steps = list(tracked.lease.transfer.history)
            manager.buffers.free(block_indices=tracked.lease, req_id=f"r{tracked.room}")
        queue.remove(ranks)
        self.over[ranks[0].room] = ranks


class EncodeLoop:
    """Bootstrap queue, an encoder that says in `ready` how many rows it has, and the inflight queue."""

    def __init__(self, manager: FerryKVManager) -> None:
        self.manager = manager
        self.bootstrapping: list[Tracked] = []
        self.inflight: list[Tracked] = []
        self.over: dict[int, Tracked] = {}
        self.ready: Callable[[int, int], int] = lambda room, total: total

    def add(self, room: int, rows: Mapping[str, torch.Tensor]) -> Tracked:
        sender = FerryKVSender(
            mgr=self.manager, bootstrap_addr="here:0", bootstrap_room=room, req_has_disagg_prefill_dp_rank=False
        )
        self.bootstrapping.append(Tracked(room, sender, req=as_request(rows)))
        return self.bootstrapping[-1]

    def tick(self) -> bool:
        for tracked in list(self.bootstrapping):
            poll = tracked.look()
            if poll == KVPoll.Failed:
                self._finish(self.bootstrapping, tracked)
            elif poll == KVPoll.WaitingForInput:
                total = len(tracked.req.fill_ids)
                tracked.lease = tracked.req.embedding_indices = self.manager.buffers.alloc(
                    num_tokens=total, req_id=f"s{tracked.room}"
                )
                tracked.end.init(total, None)
                self.bootstrapping.remove(tracked)
                self.inflight.append(tracked)
        for tracked in list(self.inflight):
            if tracked.look() in (KVPoll.Failed, KVPoll.Success):
                self._finish(self.inflight, tracked)
            else:
                self._encode(tracked)
        return not self.bootstrapping and not self.inflight

    def _encode(self, tracked: Tracked) -> None:
        total, done = len(tracked.req.fill_ids), sum(tracked.steps)
        ready = self.ready(tracked.room, total)
        if tracked.end.should_send_kv_chunk(ready - done, last_chunk=ready == total) and (
            ready > done or not tracked.steps
        ):
            whole = tracked.req.embedding
            tracked.req.embedding = whole[:ready]
            self.manager.buffers.set_buf(tracked.req)
            tracked.req.embedding = whole
            tracked.end.send(tracked.lease, None)
            tracked.steps.append(ready - done)

    def _finish(self, queue: list[Tracked], tracked: Tracked) -> None:
        if tracked.look() == KVPoll.Failed:
            tracked.failed()
        else:
            tracked.end.clear()
        self.manager.buffers.free(block_indices=tracked.lease, req_id=f"s{tracked.room}")
        queue.remove(tracked)
        self.over[tracked.room] = tracked
