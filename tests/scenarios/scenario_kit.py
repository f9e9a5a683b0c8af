"""Shared by the scenario tests: a quay (one sender, its receivers), rows, allocators, and the books afterwards."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

import pytest
import torch
from memory_kit import random_rows, same_bytes

import tensorferry as tf
from tensorferry.backends.mooncake import MooncakeTransport
from tensorferry.backends.nixl import NixlTransport
from tensorferry.core.allocator import Choose, lowest_runs
from tensorferry.core.transport import Transport

KINDS = ("memory", "mooncake", "nixl", "shm", "tcp")

PROTOCOL = pytest.mark.parametrize("kind", ["memory", "tcp"], indirect=True)
"""For what is the protocol's alone: a transport that is done at once, and one that is done later, tell all there is."""

LAYOUT = tf.embedding_layout(64)
"""A hidden size of 64: at 128 tokens a block one component lies on its own, and two travel packed."""

SMALL = tf.embedding_layout(8)

PATIENCE = 15.0
"""Seconds until a condition that must come counts as not coming. Nothing waits this long where all is well."""


# ---- allocators ----------------------------------------------------------------------------------------------


def lowest_first(pieces: list[tuple[int, int]], n: int) -> list[int]:
    """The same block numbers, again and again."""
    return [block for start, stop in pieces for block in range(start, stop)][:n]


def highest_first(pieces: list[tuple[int, int]], n: int) -> list[int]:
    """Descending, so that no two blocks of a grant merge."""
    return [block for start, stop in pieces for block in range(start, stop)][: -n - 1 : -1]


def anywhere(seed: int = 7) -> Choose:
    """Random numbers in random order."""
    dice = random.Random(seed)

    def choose(pieces: list[tuple[int, int]], n: int) -> list[int]:
        return dice.sample([block for start, stop in pieces for block in range(start, stop)], n)

    return choose


def last_freed_first() -> Choose:
    """What a stack of free blocks does: those given back last go out first, as they lie on the stack."""
    stack: list[int] = []

    def choose(pieces: list[tuple[int, int]], n: int) -> list[int]:
        free = {block for start, stop in pieces for block in range(start, stop)}
        kept = [block for block in stack if block in free]
        stack[:] = kept + sorted(free - set(kept))
        return [stack.pop() for _ in range(n)]

    return choose


CHOOSERS: dict[str, Callable[[], Choose]] = {
    "best-fit": lambda: lowest_runs,
    "lowest-first": lambda: lowest_first,
    "highest-first": lambda: highest_first,
    "last-freed-first": last_freed_first,
    "random": anywhere,
}


# ---- waiting -------------------------------------------------------------------------------------------------


def eventually(what: Callable[[], Any], within: float = PATIENCE) -> Any:
    """Wait until `what` is true and return it. Fails, showing its last value, after `within` seconds."""
    deadline = time.monotonic() + within
    while not (found := what()):
        assert time.monotonic() < deadline, f"still {found!r} after {within:g} s"
        time.sleep(0.002)
    return found


# ---- rows ----------------------------------------------------------------------------------------------------


def rows(total: int, seed: int = 0, layout: tf.Layout = LAYOUT, names: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    return random_rows(layout, names or layout.names, total, seed)


def assert_same(result: tf.Result | Mapping[str, Any], source: Mapping[str, torch.Tensor]) -> None:
    """Every component, byte for byte; what was not sent is None."""
    for name in result:
        received = result[name]
        if name not in source:
            assert received is None, f"{name} was not sent"
        else:
            assert received is not None
            assert same_bytes(received, source[name]), f"{name} differs from what was sent"


# ---- the books -----------------------------------------------------------------------------------------------


def books(end: Any) -> dict[str, Any]:
    """What an endpoint still has of transfers, blocks and rows: empty when all is over (LV-2)."""
    return dict(end._call(lambda: _receiver_books(end) if hasattr(end, "_buffers") else _sender_books(end)))


def _receiver_books(r: Any) -> dict[str, Any]:
    m = r.machine
    left = {
        "granted": m.pool.granted, "quarantined": m.pool.quarantined, "transfers": m.transfers, "rooms": m.rooms,
        "queue": m.queue, "line": m.line, "unlent": m.unlent, "budget": m.budget_used, "replacing": m.replacing,
        "undecided": [u for u in m.decisions.uses.values() if u.verdict is None], "handles": r._transfers,
        "destinations": r._gatherer.destinations, "copying": r._gatherer._copying,
        "missing": m.pool.blocks - m.pool.free_count,
    }  # fmt: skip
    return {name: str(value) for name, value in left.items() if value}


def _sender_books(s: Any) -> dict[str, Any]:
    m, posts = s.machine, s._poster
    left = {
        "slots": m.slots, "where": m.where, "writes": m.writes, "rooms": m.rooms, "orphans": m.orphans,
        "contested": m.contested, "handles": s._transfers, "sources": posts.sources, "lines": posts._lines,
        "posted": posts._posted, "staging": posts.staging.taken_bytes,
    }  # fmt: skip
    return {name: str(value) for name, value in left.items() if value}


def assert_clean(*ends: Any, within: float = PATIENCE) -> None:
    """Every block free on every side and nothing left of any transfer: soon, and without anything happening."""
    deadline = time.monotonic() + within
    for end in ends:
        while left := books(end):
            assert time.monotonic() < deadline, f"{end.name} still has {left}"
            time.sleep(0.002)
        assert end.free_blocks == end.pool_blocks
        if hasattr(end, "_buffers"):
            end._call(end.machine.pool.audit)
            end._call(lambda r=end: r._check_poison(range(r.pool_blocks)))
            assert not end.stale_writes


# ---- the quay ------------------------------------------------------------------------------------------------


class Quay:
    """One sender and `ranks` receivers in this process, in window `rounds` unless told otherwise.

    At the end of the `with` block, if nothing was raised: all blocks are free, all tables are empty (`clean=False`:
    the test looks after that itself). `sender_transport`, `receiver_transport` make the transports, instead of `kind`.
    """

    def __init__(
        self,
        kind: str = "memory",
        *,
        layout: tf.Layout = LAYOUT,
        ranks: int = 1,
        choose: Callable[[], Choose] = lambda: lowest_runs,
        clean: bool = True,
        poison: bool = True,
        sender_transport: Callable[[], Transport] | None = None,
        receiver_transport: Callable[[], Transport] | None = None,
        sender_settings: Mapping[str, object] | None = None,
        **settings: object,
    ) -> None:
        engines: dict[str, type[Transport]] = {"mooncake": MooncakeTransport, "nixl": NixlTransport}
        if kind in engines and not (probe := engines[kind].probe()).usable:
            pytest.skip(f"needs {kind}: {probe.reason}")
        self.kind, self.layout, self.ranks, self.choose, self.clean = kind, layout, ranks, choose, clean
        self.poison = poison
        self.settings: dict[str, object] = {"window": "rounds", "staging_bytes": 1 << 20, **settings}
        self.sender_settings = {**self.settings, **(sender_settings or {})}
        self._transports = (sender_transport, receiver_transport)
        self.ends: list[Any] = []
        self.receivers: list[tf.Receiver] = []
        try:
            self.sender = self.add_sender()
            leader = "tcp://127.0.0.1:0"
            for rank in range(ranks):
                group = tf.Group(rank, ranks, leader) if ranks > 1 else None
                self.receivers.append(self.add_receiver(group=group))
                leader = self.receivers[0].leader_address
        except BaseException:
            self.close()
            raise

    def add_sender(self, **more: Any) -> tf.Sender:
        make = self._transports[0]
        arguments = {"transport": make() if make is not None else self.kind, **self.sender_settings, **more}
        self.ends.append(tf.Sender(arguments.pop("layout", self.layout), **arguments))
        return self.ends[-1]  # type: ignore[no-any-return]

    def add_receiver(self, **more: Any) -> tf.Receiver:
        make = self._transports[1]
        arguments = {
            "transport": make() if make is not None else self.kind, "choose": self.choose(), "poison": self.poison,
            **self.settings, **more,
        }  # fmt: skip
        self.ends.append(tf.Receiver(arguments.pop("layout", self.layout), **arguments))
        return self.ends[-1]  # type: ignore[no-any-return]

    @property
    def receiver(self) -> tf.Receiver:
        return self.receivers[0]

    def receive(self, room: int = 1, rank: int = 0, *, dummy: bool = False) -> tf.ReceiveTransfer:
        return self.receivers[rank].receive(room, self.sender.address, dummy=dummy)

    def carry(self, total: int, room: int = 1, seed: int = 0) -> tf.ReceiveTransfer:
        """One transfer from end to end, compared byte for byte."""
        given = rows(total, seed, self.layout)
        sending = self.sender.send(room, **given)
        receiving = self.receive(room)
        assert_same(receiving.result(PATIENCE), given)
        sending.wait(PATIENCE)
        return receiving

    def crash(self, end: Any) -> None:
        """End an endpoint as a kill would: not a word to anybody, nothing written from then on."""
        end._call(lambda: setattr(end._control, "send", lambda route, message: None))
        end._wind_down = lambda: True
        end.close()

    def close(self) -> None:
        for end in self.ends:
            end.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        try:
            if kind is None and self.clean:
                assert_clean(*[end for end in self.ends if not end._stopped.is_set()])
        finally:
            self.close()
