"""Shared by the tests of memory: a transport that only allocates and registers, random layouts and rows, and a write
done by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from tensorferry.core.buffers import PoolBuffers
from tensorferry.core.layout import DTYPE_BYTES, Component, Geometry, Layout, slab_plan
from tensorferry.core.memory import Memory, host_memory
from tensorferry.core.source import LocalCopy, Source, write_plan
from tensorferry.core.staging import Staging
from tensorferry.core.transport import (
    Capabilities,
    Options,
    PeerState,
    Probe,
    Readiness,
    Region,
    Status,
    Transport,
)


class PlainTransport(Transport):
    """Memory and regions, and no peers: what the memory part of core asks of a transport."""

    name = "plain"
    capabilities = Capabilities(registers_sources=False)

    def __init__(self, options: Options | None = None) -> None:
        self.live: dict[int, Region] = {}
        self.retired: list[Region] = []
        self.registered = 0
        self.memory_left: int | None = None

    @classmethod
    def probe(cls) -> Probe:
        return Probe(Readiness.READY, "for tests")

    def allocate(self, nbytes: int, kind: str = "cpu") -> Memory:
        if self.memory_left is not None and nbytes > self.memory_left:
            raise MemoryError(f"{nbytes} bytes")
        return host_memory(nbytes)

    def register(self, memory: Memory) -> Region:
        self.registered += 1
        region = Region(self.registered % 3, self.registered, memory)  # ids come again, generations do not
        self.live[region.generation] = region
        return region

    def retire(self, region: Region) -> None:
        self.live.pop(region.generation, None)
        self.retired.append(region)

    def describe(self) -> bytes:
        return b""

    def connect(self, descriptor: bytes) -> Any:
        raise NotImplementedError

    def disconnect(self, peer: Any) -> None:
        raise NotImplementedError

    def peer_state(self, peer: Any) -> PeerState:
        raise NotImplementedError

    def post(self, peer: Any, copies: Sequence[Any]) -> int:
        raise NotImplementedError

    def poll(self, handle: int) -> Status:
        raise NotImplementedError

    def drained(self, handle: int) -> bool:
        raise NotImplementedError

    def release(self, handle: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.live.clear()


class RegisteringTransport(PlainTransport):
    """The same, but it reads registered memory alone, so that all rows are staged."""

    name = "registering"
    capabilities = Capabilities(registers_sources=True)


def random_rows(layout: Layout, names: Iterable[str], tokens: int, seed: int) -> dict[str, torch.Tensor]:
    """Rows of random bytes, NaNs among the floats; bools stay 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    rows = {}
    for name in names:
        component = layout[name]
        dtype: torch.dtype = getattr(torch, component.dtype)
        limit = 2 if dtype == torch.bool else 256
        raw = torch.randint(0, limit, (tokens * component.token_bytes,), dtype=torch.uint8, generator=generator)
        rows[name] = raw.view(dtype).view(tokens, *component.shape)
    return rows


def raw(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes: equality of floats would not tell NaNs apart."""
    whole = tensor.contiguous()
    return bytes(Memory(whole.data_ptr(), whole.nbytes, "cpu", whole).view())


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and raw(one) == raw(other)


def land(copies: Iterable[LocalCopy], memory: Memory) -> int:
    """What a transport does with a batch. Returns the bytes placed; raises ValueError outside either memory."""
    placed = 0
    for copy in copies:
        local = copy.local.memory if isinstance(copy.local, Region) else copy.local
        memory.view(copy.slab_offset, copy.nbytes)[:] = local.view(copy.local_offset, copy.nbytes)
        placed += copy.nbytes
    return placed


def write(source: Source, pool: PoolBuffers, staging: Staging, index: int, block: int, count: int = 1) -> int:
    """Write blocks [index, index + count) of a transfer to adjacent pool blocks, as an endpoint would."""
    geometry = pool.geometry
    slab = geometry.slab_of(block)
    plan = slab_plan(pool.layout, geometry, slab)
    nbytes = plan.stage_bytes(source.names, count, rows=staging.holds_rows)
    stage = staging.take(nbytes) if nbytes else None
    assert stage is not None or nbytes == 0
    copies = write_plan(source, plan, index, block - geometry.slab_blocks(slab).start, count, stage)
    placed = land(copies, pool.memory(slab))
    if stage is not None:
        staging.give(stage)
    return placed


NAMES = ("alpha", "beta", "gamma", "delta")


@st.composite
def components(draw: st.DrawFn, name: str) -> Component:
    dtype = draw(st.sampled_from(sorted(DTYPE_BYTES)))
    shape = draw(st.sampled_from([(), (1,), (3,), (5, 2), (200,), (1100,), (7, 90)]))
    return Component(name, dtype, shape, optional=draw(st.booleans()))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """One to four components, small and large ones, in any order of declaration."""
    names = draw(st.permutations(NAMES))[: draw(st.integers(1, len(NAMES)))]
    return Layout([draw(components(name)) for name in names])


@st.composite
def presences(draw: st.DrawFn, layout: Layout) -> tuple[str, ...]:
    """Names of components that may travel together: one at least."""
    names = tuple(name for name in layout.names if not layout[name].optional or draw(st.booleans()))
    return names or layout.names[:1]


def geometries() -> st.SearchStrategy[Geometry]:
    return st.builds(Geometry, st.integers(1, 40), st.integers(1, 9), st.integers(1, 4))
