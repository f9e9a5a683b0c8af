"""Breadth-first search over a world of machines, and the proof that it comes to rest.

Phase 1 visits every state that faults, delays, repetitions and reorderings can lead to, and checks every invariant in
each. Phase 2 takes each of those states, loses every message in flight, lets every timer speak once and explores on
without faults: there the graph has to be acyclic and every state without a successor clean. Then every schedule, once
faults stop, ends, and ends clean.

States are remembered either whole or (`compact`) as 64-bit hashes. With n states, two of them share a hash with a
chance below n * n / 2**64: under one in a million for four million states.
"""

from __future__ import annotations

import gc
import time
from array import array
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

State = tuple[Any, ...]


class Violation(Exception):
    """What must never be true is true. The text begins with the invariant's name."""


class Edge(NamedTuple):
    """One thing that can happen. `normal` edges happen without faults; `state` may be a violation."""

    label: tuple[Any, ...]
    normal: bool
    state: State | Violation


class World(Protocol):
    def roots(self) -> list[State]: ...
    def check(self, state: State) -> str | None: ...
    def edges(self, state: State) -> list[Edge]: ...
    def clean(self, state: State) -> str | None:
        """None, or what is left in a state without successors."""

    def lose_everything(self, state: State) -> State: ...
    def say(self, label: tuple[Any, ...]) -> str: ...
    def describe(self, state: State) -> str: ...


def digest(state: State) -> int:
    """64 bits of a state. A set of messages is a number of as many bits, and Python hashes numbers modulo 2**61 - 1: it
    would take message 61 for message 0. Bytes it hashes whole."""
    return hash(tuple(p.to_bytes(p.bit_length() // 8 + 1, "little") if isinstance(p, int) else p for p in state))


@dataclass
class Graph:
    """One phase. `parent` and `step` (which of the parent's edges) lead back to a root."""

    compact: bool
    ids: dict[Hashable, int] = field(default_factory=dict)
    states: list[State] = field(default_factory=list)  # phase 1 keeps none when compact
    parent: array[int] = field(default_factory=lambda: array("q"))
    step: array[int] = field(default_factory=lambda: array("q"))
    depth: array[int] = field(default_factory=lambda: array("H"))
    source: array[int] = field(default_factory=lambda: array("I"))
    target: array[int] = field(default_factory=lambda: array("I"))
    sinks: array[int] = field(default_factory=lambda: array("I"))
    transitions: int = 0
    bounded: bool = False
    violation: str | None = None
    at: tuple[int, int] | None = None  # (state, which edge or -1)

    def __len__(self) -> int:
        return len(self.parent)

    def add(self, state: State, parent: int, step: int) -> int:
        """The number of a state, which is the length so far where it is a new one. (Hashed once: states are large.)"""
        new = len(self.parent)
        number = self.ids.setdefault(digest(state) if self.compact else state, new)
        if number == new:
            self.parent.append(parent)
            self.step.append(step)
            self.depth.append(self.depth[parent] + 1 if parent >= 0 else 0)
        return number

    def find(self, state: State) -> int:
        return self.ids[digest(state) if self.compact else state]


@dataclass
class Outcome:
    """What a search has shown."""

    name: str
    states: int = 0
    transitions: int = 0
    depth: int = 0
    after_loss: int = 0
    acyclic: bool | None = None
    stuck: int = 0
    bounded: bool = False
    violation: str | None = None
    trace: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        if self.violation:
            return "VIOLATION"
        return "bounded" if self.bounded else "OK"


Progress = Callable[[str, int, int], None]


def explore(
    world: World, roots: Iterable[State], *, compact: bool, limit: int, visit: Callable[[State], None] | None = None,
    progress: Progress | None = None, phase: str = "",
) -> Graph:  # fmt: skip
    """Visit what can be reached from `roots`, at most `limit` states; stop at the first violation."""
    g = Graph(compact)
    queue: deque[tuple[int, State]] = deque()
    for root in roots:
        seen = len(g)
        if g.add(root, -1, -1) == seen:
            queue.append((seen, root))
    while queue:
        at, state = queue.popleft()
        wrong = world.check(state)
        if wrong:
            g.violation, g.at = wrong, (at, -1)
            return g
        if visit is not None:
            visit(state)
        onward = False
        for k, edge in enumerate(world.edges(state)):
            g.transitions += 1
            after = edge.state
            if isinstance(after, Violation):
                g.violation, g.at = str(after), (at, k)
                return g
            seen = len(g)
            if seen >= limit:
                g.bounded = True
                onward = onward or edge.normal
                continue
            number = g.add(after, at, k)
            if number == seen:
                queue.append((number, after))
            if edge.normal:
                onward = True
                g.source.append(at)
                g.target.append(number)
        if not onward:
            g.sinks.append(at)
            left = world.clean(state)
            if left and g.violation is None and not g.bounded:
                g.violation, g.at = f"LV-1 stuck: {left}", (at, -1)
                return g
        if progress is not None and at % 20000 == 19999:
            progress(phase, at + 1, len(queue))
    return g


def acyclic(g: Graph) -> bool:
    """No schedule of normal steps goes round for ever (Kahn's algorithm over flat arrays)."""
    n = len(g)
    incoming = array("I", bytes(4 * n))
    start = array("I", bytes(4 * (n + 1)))
    for a, b in zip(g.source, g.target, strict=True):
        incoming[b] += 1
        start[a + 1] += 1
    for i in range(n):
        start[i + 1] += start[i]
    fill, onward = array("I", start), array("I", bytes(4 * len(g.target)))
    for a, b in zip(g.source, g.target, strict=True):
        onward[fill[a]] = b
        fill[a] += 1
    ready = [i for i in range(n) if not incoming[i]]
    seen = 0
    while ready:
        a = ready.pop()
        seen += 1
        for k in range(start[a], start[a + 1]):
            b = onward[k]
            incoming[b] -= 1
            if not incoming[b]:
                ready.append(b)
    g.ids["in a cycle"] = next((i for i in range(n) if incoming[i]), -1)
    return seen == n


def trace(world: World, g: Graph, roots: list[State]) -> list[str]:
    """The labels of a shortest path to the violation, found again by replaying it."""
    if g.at is None:
        return []
    node, last = g.at
    path: list[int] = []
    while g.parent[node] >= 0:
        path.append(g.step[node])
        node = g.parent[node]
    root = next(r for r in roots if g.find(r) == node)
    labels, state = [], root
    for k in reversed(path):
        edge = world.edges(state)[k]
        labels.append(world.say(edge.label))
        assert not isinstance(edge.state, Violation)
        state = edge.state
    if last >= 0:
        labels.append(world.say(world.edges(state)[last].label))
    return labels


def search(
    world: World, name: str, *, compact: bool = False, limit: int = 3_000_000, progress: Progress | None = None
) -> Outcome:
    """Both phases. The outcome carries a shortest trace if something is wrong."""
    collecting = gc.isenabled()
    gc.disable()  # a search makes millions of tuples and no cycle: looking for some takes a tenth of the time
    try:
        return _search(world, name, compact=compact, limit=limit, progress=progress)
    finally:
        if collecting:
            gc.enable()


def _search(world: World, name: str, *, compact: bool, limit: int, progress: Progress | None) -> Outcome:
    began = time.perf_counter()
    out = Outcome(name)
    lost: dict[State, None] = dict.fromkeys(world.lose_everything(root) for root in world.roots())

    def visit(state: State) -> None:
        lost[world.lose_everything(state)] = None

    roots = world.roots()
    g = explore(world, roots, compact=compact, limit=limit, visit=visit, progress=progress, phase="faults")
    out.states, out.transitions, out.depth = len(g), g.transitions, max(g.depth, default=0)
    out.bounded = g.bounded
    if g.violation:
        out.violation, out.trace = g.violation, trace(world, g, roots)
    else:
        if not acyclic(g):
            g.at = (g.ids["in a cycle"], -1)
            out.violation = "LV-1 a cycle of normal steps"
            out.trace = trace(world, g, roots)
        del g
    if not out.violation:
        roots = list(lost)
        g = explore(world, roots, compact=compact, limit=limit, progress=progress, phase="after loss")
        out.after_loss, out.bounded = len(g), out.bounded or g.bounded
        if g.violation is None:
            out.acyclic = acyclic(g)
            if not out.acyclic:
                g.violation, g.at = "LV-1 a cycle of normal steps", (g.ids["in a cycle"], -1)
        if g.violation:
            out.stuck = int("stuck" in g.violation)
            out.violation = f"after total loss: {g.violation}"
            out.trace = [f"(from) {world.describe(root)}" for root in _root_of(g, roots)]
            out.trace += trace(world, g, roots)
    out.seconds = time.perf_counter() - began
    return out


def _root_of(g: Graph, roots: list[State]) -> list[State]:
    assert g.at is not None
    node = g.at[0]
    while g.parent[node] >= 0:
        node = g.parent[node]
    return [roots[i] for i in range(len(roots)) if g.find(roots[i]) == node][:1]
