"""The receiver's memory: the pool that peers write to, the graveyard of slabs that they might still write to, and the
destination that rows are gathered to.

Nothing that a caller gets is ever a view of pool memory: rows are copied exactly once, from the block they landed in to
their place in the destination, and the destination's tensors are the result.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from tensorferry.core.carriers import Carriers, Regions
from tensorferry.core.copying import HOST_DEVICE, OVER, Copying, Device, Reading, View, memory_of
from tensorferry.core.devices import claim
from tensorferry.core.digest import digest
from tensorferry.core.errors import BadCall, ConfigError, FerryError, InternalError, TooLarge
from tensorferry.core.layout import AUX_WORDS, Geometry, Layout, SlabPlan, destination_bytes, slab_plan
from tensorferry.core.memory import HOST, Memory, Place


class Gathered(Copying):
    """A gather under way. Its blocks may be freed, and its rows count, when `finished` says so and not before (GR-7).

    A copy in host memory is over when `gather` returns. One by a GPU is only queued then, and `copying` asks it.
    """

    def __init__(self, copying: Copying = OVER) -> None:
        self._copying = copying

    def finished(self) -> bool:
        """All rows are in the destination, and nothing reads the blocks any more. Never blocks; raises DeviceError."""
        return self._copying.finished()


class Result:
    """What a receiver's caller gets: a tensor `[total, *shape]` per component, None for one that did not travel, and
    `aux`, the 16 words of the aux record. Components by attribute or by name: `result.fill_ids`, `result["fill_ids"]`.
    """

    def __init__(self, tensors: dict[str, torch.Tensor | None], aux: tuple[int, ...]) -> None:
        self._tensors = tensors
        self.aux = aux

    def __getattr__(self, name: str) -> torch.Tensor | None:
        tensors: dict[str, torch.Tensor | None] = self.__dict__.get("_tensors", {})
        if name in tensors:
            return tensors[name]
        raise AttributeError(f"no component {name!r}; there are {', '.join(tensors)}")

    def __getitem__(self, name: str) -> torch.Tensor | None:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._tensors]

    def __repr__(self) -> str:
        parts = (f"{n}={'None' if t is None else f'{t.dtype}{list(t.shape)}'}" for n, t in self._tensors.items())
        return f"Result({', '.join(parts)})"

    def _claimed(self) -> Result:
        """For the thread that takes it: rows on a GPU belong to its stream from here on."""
        claim(self._tensors)
        return self


class Destination:
    """Where the rows of `total` tokens of the components `names` end up: one tensor each, not filled, in memory of
    `place`, which `device` copies to.

    `nbytes` is what the budget is charged. Each tensor starts on a multiple of 64 bytes: gathering to one that is
    only 16-byte aligned takes twice as long. Raises TooLarge where there is no memory.
    """

    def __init__(
        self, layout: Layout, total: int, names: Iterable[str], *, device: Device = HOST_DEVICE, place: Place = HOST
    ) -> None:
        self.total = total
        self.names = tuple(sorted(names))
        self.nbytes = destination_bytes(layout, total, self.names)
        self._layout = layout
        self._tensors: dict[str, torch.Tensor] = {}
        self._views: dict[str, View] = {}
        for name in self.names:
            component = layout[name]
            try:
                tensor = device.empty((total, *component.shape), getattr(torch, component.dtype), place)
            except (MemoryError, RuntimeError) as error:  # torch's allocators say RuntimeError
                where = "this host" if place == HOST else str(place)
                raise TooLarge(
                    f"no memory for the {self.nbytes} bytes of {total} tokens: {error}",
                    hint=f"Send fewer tokens, or lower destination_budget to what {where} can give",
                ) from error
            self._tensors[name] = tensor
            self._views[name] = device.view(memory_of(tensor, place))

    def view(self, name: str) -> View:
        """The bytes of one component's rows, to write to. Raises BadCall after `result`: they are the caller's."""
        if not self._views and self.names:
            raise BadCall("the destination was handed over")
        return self._views[name]

    def rows(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        """Tokens [start, stop) of each component, `[stop - start, *shape]`: views of the result to come."""
        if not 0 <= start <= stop <= self.total:
            raise BadCall(f"tokens [{start}, {stop}) are not in {self.total}")
        tensors = self._tensors  # once: `result` may be called on another thread meanwhile
        if not tensors and self.names:
            raise BadCall("the destination was handed over")
        claim(tensors)
        return {name: tensor[start:stop] for name, tensor in tensors.items()}

    def result(self, aux: Iterable[int]) -> Result:
        """Hand the tensors over, once; nothing is copied. Raises BadCall the second time."""
        words = tuple(aux)
        if len(words) != AUX_WORDS:
            raise BadCall(f"the aux record has {AUX_WORDS} words, not {len(words)}")
        if not self._tensors and self.names:
            raise BadCall("the destination was handed over")
        tensors: dict[str, torch.Tensor | None] = {name: self._tensors.get(name) for name in self._layout.names}
        self._tensors, self._views = {}, {}
        return Result(tensors, words)


@dataclass(frozen=True, slots=True)
class _Grave:
    memory: Memory
    waiting: set[Hashable]


class Graveyard:
    """Replaced slabs whose memory stays mapped because somebody may still write to it (ruling R4).

    Each waits for one or more keys (a peer's incarnation, say). It is given up when every one of them is proved
    quiet; until then its bytes count against each of them.
    """

    def __init__(self) -> None:
        self._graves: list[_Grave] = []

    @property
    def nbytes(self) -> int:
        return sum(grave.memory.nbytes for grave in self._graves)

    def nbytes_of(self, key: Hashable) -> int:
        """Bytes that wait for `key`: what a quota per peer is measured against."""
        return sum(grave.memory.nbytes for grave in self._graves if key in grave.waiting)

    def bury(self, memory: Memory, keys: Iterable[Hashable]) -> None:
        """Keep a retired slab's memory until `exhume` was called for each key; without keys, until `clear`."""
        self._graves.append(_Grave(memory, set(keys)))

    def exhume(self, key: Hashable) -> int:
        """Nothing of `key` can land any more (it is gone): returns the bytes given up."""
        before = self.nbytes
        for grave in self._graves:
            if key in grave.waiting:
                grave.waiting.discard(key)
                if not grave.waiting:
                    self._graves = [other for other in self._graves if other is not grave]
        return before - self.nbytes

    def clear(self) -> None:
        """After the transport has closed."""
        self._graves.clear()


@dataclass(slots=True)
class _Slab:
    plan: SlabPlan
    memory: Memory
    regions: Regions
    view: View


class PoolBuffers:
    """The pool's memory: one piece per slab, registered with every transport when this is made, where the carriers'
    targets lie. `device` copies from there to the destinations.

    `poison`: a debugging aid, off by default. Freed blocks are filled with a pattern and `check_poison` looks for it
    when they are granted, so that a write to a block that nobody had been granted is seen at the victim.
    One thread only (the endpoint's I/O thread). Where there is not memory for all, nothing stays registered: raises
    ConfigError before the first page is taken where that is known, and what the transport raises where it is not.
    """

    def __init__(
        self,
        carriers: Carriers,
        layout: Layout,
        geometry: Geometry,
        *,
        device: Device = HOST_DEVICE,
        poison: bool = False,
    ) -> None:
        self.layout = layout
        self.geometry = geometry
        self.graveyard = Graveyard()
        self.poisoning = poison
        self._carriers = carriers
        self._device = device
        self._slabs: list[_Slab] = []
        _check_fits(layout, geometry, device, carriers.place)
        with ExitStack() as undo:
            undo.callback(self.close)
            for slab in range(geometry.slab_count):
                self._slabs.append(self._fresh(slab))
            for block in range(geometry.pool_blocks) if poison else ():
                self.poison(block)
            undo.pop_all()

    @property
    def nbytes(self) -> int:
        """Bytes of the pool, the graveyard not counted."""
        return sum(slab.memory.nbytes for slab in self._slabs)

    def regions(self) -> list[Regions]:
        """By slab: what Hello tells peers, per transport."""
        return [slab.regions for slab in self._slabs]

    def memory(self, slab: int) -> Memory:
        return self._slabs[slab].memory

    def flush(self, slab: int) -> None:
        """What was placed in a slab is visible after it, where a transport needs to be asked."""
        self._carriers.flush(self._slabs[slab].regions)

    def replace(self, slab: int, keys: Iterable[Hashable] = ()) -> None:
        """Fresh memory behind a slab; the old is retired and buried, still mapped, until all `keys` are exhumed.

        No block of the slab may be granted or being gathered. If there is no memory, this raises and nothing changes.
        """
        old = self._slabs[slab]
        self._slabs[slab] = self._fresh(slab)
        self.graveyard.bury(old.memory, keys)
        self._carriers.retire(old.regions)
        for block in self.geometry.slab_blocks(slab):
            self.poison(block)

    def read(self, pairs: Iterable[tuple[int, int]], total: int, names: Iterable[str], mode: str) -> Reading:
        """What the digests of some blocks are made of: (index, pool block) each, of a transfer of `total` tokens with
        components `names`, hashed in `mode`."""
        order = sorted(names)
        return self._device.read([self._content(block, index, total, order) for index, block in pairs], mode)

    def digest(self, block: int, index: int, total: int, names: Iterable[str], seed: int, mode: str) -> int:
        """The digest of one block, in host memory."""
        [content] = self.read([(index, block)], total, names, mode).blocks
        return digest(content, seed, mode)

    def _content(self, block: int, index: int, total: int, names: Iterable[str]) -> list[tuple[str, View]]:
        slab, inside = self._locate(block, 1)
        tokens = self._tokens(index, 1, total)
        places = [(name, slab.plan.areas[name]) for name in names]
        starts = [(name, area.at(inside), tokens * area.component.token_bytes) for name, area in places]
        return [(name, slab.view[start : start + n]) for name, start, n in starts]

    def gather(self, block: int, index: int, total: int, names: Iterable[str], destination: Destination) -> Gathered:
        """Copy block `index` from pool block `block` to its rows in the destination. See `gather_run`."""
        return self.gather_run(block, index, 1, total, names, destination)

    def gather_run(
        self,
        first_block: int,
        first_index: int,
        count: int,
        total: int,
        names: Iterable[str],
        destination: Destination,
    ) -> Gathered:
        """Copy blocks [first_index, first_index + count) from adjacent pool blocks of one slab to their rows.

        One copy per large component, one per block for packed ones. Every byte is copied once, and no byte beyond the
        last token. Raises InternalError for blocks outside the pool, one slab or the transfer.
        """
        slab, inside = self._locate(first_block, count)
        tokens = self._tokens(first_index, count, total)
        size = self.geometry.block_size
        first_row = first_index * size
        with self._device.batch() as batch:
            for name in names:
                area = slab.plan.areas[name]
                target, token_bytes = destination.view(name), area.component.token_bytes
                start, place, left = area.at(inside), first_row * token_bytes, tokens * token_bytes
                if not area.packed:
                    batch.copy(target[place : place + left], slab.view[start : start + left])
                    continue
                for offset in range(0, left, size * token_bytes):
                    nbytes = min(size * token_bytes, left - offset)
                    batch.copy(target[place + offset : place + offset + nbytes], slab.view[start : start + nbytes])
                    start += area.stride
        return Gathered(batch)

    def poison(self, block: int) -> None:
        """Fill a block that was freed with its pattern. Nothing happens unless poisoning is on."""
        if self.poisoning:
            for view, pattern in self._poison_of(block):
                self._device.fill(view, pattern)

    def check_poison(self, block: int) -> None:
        """Raises InternalError if a free block was written to. Nothing happens unless poisoning is on."""
        if self.poisoning:
            for view, pattern in self._poison_of(block):
                if (found := self._device.content(view)) != pattern:
                    where = next(k for k, (a, b) in enumerate(zip(found, pattern, strict=True)) if a != b)
                    raise InternalError(f"free block {block} was written to, {where} bytes from the start of an area")

    def close(self) -> None:
        """Retire the slabs and let go of all memory. The transports still hold what peers may write to."""
        for slab in self._slabs:
            self._carriers.retire(slab.regions)
        self._slabs.clear()
        self.graveyard.clear()

    def _fresh(self, slab: int) -> _Slab:
        plan = slab_plan(self.layout, self.geometry, slab)
        memory = self._carriers.allocate(plan.nbytes)
        regions = self._carriers.register(memory)
        try:
            return _Slab(plan, memory, regions, self._device.view(self._device.pin(memory)))
        except FerryError:
            self._carriers.retire(regions)
            raise

    def _locate(self, block: int, count: int) -> tuple[_Slab, int]:
        if not (0 <= block < self.geometry.pool_blocks and count >= 1):
            raise InternalError(f"{count} blocks from {block} are not in a pool of {self.geometry.pool_blocks}")
        number = self.geometry.slab_of(block)
        blocks = self.geometry.slab_blocks(number)
        if block + count > blocks.stop:
            raise InternalError(f"blocks {block} to {block + count - 1} are not in one slab")
        return self._slabs[number], block - blocks.start

    def _tokens(self, first_index: int, count: int, total: int) -> int:
        """Tokens in a run of blocks of a transfer."""
        last = self.geometry.tokens_in(first_index + count - 1, total) if first_index >= 0 else 0
        if last == 0:
            raise InternalError(f"blocks {first_index} to {first_index + count - 1} are not in {total} tokens")
        return (count - 1) * self.geometry.block_size + last

    def _poison_of(self, block: int) -> Iterator[tuple[View, bytes]]:
        """The pieces of a slab that belong to one block, with the pattern of each."""
        slab, inside = self._locate(block, 1)
        plan = slab.plan
        pieces = [(a.at(inside), a.stride) for a in plan.areas.values() if not a.packed]
        if plan.packed_stride:
            pieces.append((plan.packed_start + inside * plan.packed_stride, plan.packed_stride))
        # No float or index that a model makes, and another in every block, so that a copied block is seen too.
        word = (0xF3DEADF0_0000_0000 | block).to_bytes(8, "little")
        for start, nbytes in pieces:
            yield slab.view[start : start + nbytes], (word * (nbytes // 8 + 1))[:nbytes]


def _check_fits(layout: Layout, geometry: Geometry, device: Device, place: Place) -> None:
    """Raises ConfigError where the whole pool is more than can be had. Each slab alone may well fit, and taking them
    one by one would end in the kernel killing processes of its own choice."""
    wanted = sum(slab_plan(layout, geometry, slab).nbytes for slab in range(geometry.slab_count))
    if wanted > (available := device.available(place)):
        raise ConfigError(
            f"a pool of {geometry.pool_blocks} blocks of {geometry.block_size} tokens takes {wanted} bytes, and about "
            f"{available} are available" + (f" on {place}" if place != HOST else ""),
            hint=f"A token of this layout takes {layout.token_bytes} bytes: lower pool_blocks, or block_size on both "
            "sides",
        )
