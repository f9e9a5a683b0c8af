"""The rows that a sender has: the caller's own tensors, read from where they lie, and how a run of blocks is written.

Rows arrive in pieces (`put`), in order, and stay where the caller made them. Only a tensor that is not contiguous is
copied, once. The caller must not change the rows before the transfer has ended: they are read when they are granted,
and again after a failure. Rows on a GPU may still be computed when they are put: they are ready when the stream that
was the caller's then has come so far.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

import torch

from tensorferry.core.arguments import INT64, integer
from tensorferry.core.copying import HOST_DEVICE, OVER, Batch, Copying, Device, View
from tensorferry.core.devices import RUNTIMES, Arriving, place_of
from tensorferry.core.errors import BadCall, BadTensor
from tensorferry.core.layout import Component, Layout, SlabPlan, align
from tensorferry.core.memory import HOST, Memory
from tensorferry.core.staging import ALIGNMENT, Stage
from tensorferry.core.transport import Region

KINDS = frozenset({HOST.kind, *RUNTIMES})
"""Memory that rows may lie in. What a transport cannot read from there is staged."""

Span = tuple[Memory, int, int]
"""`nbytes` bytes from `offset` in a memory: (memory, offset, nbytes)."""


@dataclass(frozen=True, slots=True)
class LocalCopy:
    """`nbytes` bytes from `local_offset` in `local` to `slab_offset` from the start of the slab's region."""

    local: Region | Memory
    local_offset: int
    slab_offset: int
    nbytes: int


class Source:
    """The rows of one transfer of `total_tokens` tokens, with the components `present`.

    `kinds`: memory that rows may lie in. `integrity`: how their blocks are hashed, once that is settled. `put` may be
    called from other threads than everything else, and of two that put at the same token one is refused. Raises
    BadTensor for names that the layout does not have, or that it needs and are not there.
    """

    def __init__(
        self, layout: Layout, total_tokens: int, present: Iterable[str], *, kinds: frozenset[str] = KINDS
    ) -> None:
        given = set(present)
        unknown = sorted(name for name in given if name not in layout)
        if unknown:
            raise BadTensor(f"the layout has no component {_listed(unknown)}; it has {_listed(layout.names)}")
        missing = [n for n in layout.names if n not in given and not layout[n].optional]
        if missing:
            raise BadTensor(f"{_listed(missing)} is missing: it is not optional in this layout")
        if not given:
            raise BadTensor(f"a transfer needs at least one component of {_listed(layout.names)}")
        self.layout = layout
        self.total_tokens = integer(total_tokens, "total_tokens", bits=48)
        self.names = tuple(name for name in layout.names if name in given)
        self.kinds = kinds
        self.place = HOST
        """Where rows lie that are not in host memory; HOST where all are."""
        self.integrity = ""
        self._starts: list[int] = []  # first token of each piece
        self._pieces: dict[str, list[Memory]] = {name: [] for name in self.names}
        self._views: dict[tuple[Device, str, int], View] = {}
        self._given = 0
        self._ready = 0
        self._arriving: deque[tuple[int, Copying]] = deque()  # tokens that are ready when it is finished
        self._released = False
        self._putting = threading.Lock()

    @property
    def ready(self) -> int:
        """Tokens that can be read: all before this one. Raises DeviceError where a GPU failed to compute more."""
        if self._arriving:
            with self._putting:
                while self._arriving and self._arriving[0][1].finished():
                    self._ready = self._arriving.popleft()[0]
        return self._ready

    @property
    def arriving(self) -> bool:
        """More was put than is ready: ask again."""
        return bool(self._arriving)

    def put(self, start: int, /, **tensors: torch.Tensor | None) -> None:
        """Append rows: the tensors' first row is token `start`, the next after all that were put; None counts as not
        given.

        Each present component is needed, `[n, *shape]` of its dtype, all with the same n (0 changes nothing). Rows
        are not copied and must not change until the transfer's end. Raises BadCall for the wrong `start`, too many
        rows or a call after `release`, BadTensor for a tensor that does not fit; nothing has changed then.
        """
        start = integer(start, "start", lowest=INT64)
        if self._released:
            raise BadCall("put after the transfer has ended")
        given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        surplus = sorted(set(given) - set(self.names))
        if surplus:
            where = "the layout" if surplus[0] not in self.layout else "the announcement"
            raise BadTensor(f"{_listed(surplus)} is not in {where}, which has {_listed(self.names)}")
        missing = [name for name in self.names if name not in given]
        if missing:
            raise BadTensor(f"{_listed(missing)} is missing: it was announced, so every piece needs it")
        self._check_next(start)
        rows = {name: _checked(self.layout[name], given[name], self.kinds) for name in self.names}
        lengths = {name: int(tensor.shape[0]) for name, tensor in rows.items()}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{name} {n}" for name, n in lengths.items())
            raise BadTensor(f"the components differ in length: {told}")
        count = max(lengths.values(), default=0)
        if start + count > self.total_tokens:
            raise BadCall(f"{count} rows at token {start} go beyond the {self.total_tokens} announced")
        if count == 0:
            return
        pieces = {}
        for name, tensor in rows.items():
            kind, device = place_of(tensor)
            nbytes = count * self.layout[name].token_bytes
            pieces[name] = Memory(tensor.data_ptr(), nbytes, kind, tensor, device)
        away = {memory.place for memory in pieces.values()} - {HOST}
        if len(away | {self.place} - {HOST}) > 1:
            raise BadTensor(
                f"rows on {_listed(sorted(map(str, away | {self.place} - {HOST})))}: one transfer's lie on one GPU",
                hint="Move them together: .to(device)",
            )
        computed = Arriving(away) if away else OVER
        with self._putting:  # held for an instant: `release` needs it, in the I/O thread
            self._check_next(start)
            for name, memory in pieces.items():
                self._pieces[name].append(memory)
            self._starts.append(start)
            self._given = start + count
            if away and self.place == HOST:
                self.place = min(away)
            if away or self._arriving:
                self._arriving.append((self._given, computed))
            else:
                self._ready = self._given  # last: another thread may read what lies before it from here on

    def _check_next(self, start: int) -> None:
        if self._released:
            raise BadCall("put after the transfer has ended")
        if start != self._given:
            raise BadCall(
                f"put at token {start}, but the next token is {self._given}", hint="Put rows in order, without gaps"
            )

    def spans(self, name: str, start: int, stop: int) -> list[Span]:
        """Where the rows of tokens [start, stop) of one component lie, in order: one span per piece that they touch.

        Raises BadCall beyond `ready` or after `release`.
        """
        return [(self._pieces[name][piece], offset, nbytes) for piece, offset, nbytes in self._cut(name, start, stop)]

    def block_views(self, index: int, block_size: int, device: Device = HOST_DEVICE) -> Iterator[tuple[str, View]]:
        """The valid rows of block `index` as `digest` wants them: (name, bytes), sorted by name, split by piece; as
        `device` reads them."""
        start = index * block_size
        stop = min(start + block_size, self.total_tokens)
        for name in self.names:
            yield from ((name, view) for view in self._rows(device, name, start, stop))

    def release(self) -> None:
        """Drop the references to the caller's tensors. Spans handed out before keep theirs. Idempotent."""
        with self._putting:
            self._released = True
            self._arriving.clear()
            self._views.clear()
            for pieces in self._pieces.values():
                pieces.clear()

    def _cut(self, name: str, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(piece, offset, nbytes) of tokens [start, stop)."""
        if self._released:
            raise BadCall("the rows are released: the transfer has ended")
        if not 0 <= start <= stop <= self._ready:
            raise BadCall(f"tokens [{start}, {stop}) of {name} cannot be read, {self._ready} are ready")
        token_bytes = self.layout[name].token_bytes
        piece = bisect_right(self._starts, start) - 1
        while start < stop:
            first = self._starts[piece]
            end = min(stop, self._starts[piece + 1] if piece + 1 < len(self._starts) else self._given)
            yield piece, (start - first) * token_bytes, (end - start) * token_bytes
            start, piece = end, piece + 1

    def _rows(self, device: Device, name: str, start: int, stop: int) -> Iterator[View]:
        for piece, offset, nbytes in self._cut(name, start, stop):
            key = device, name, piece
            if key not in self._views:
                self._views[key] = device.view(self._pieces[name][piece])
            yield self._views[key][offset : offset + nbytes]

    def copy_rows(self, batch: Batch, device: Device, name: str, start: int, stop: int, target: View) -> None:
        """Copy the rows of tokens [start, stop) of one component to the beginning of `target`."""
        cursor = 0
        for view in self._rows(device, name, start, stop):
            batch.copy(target[cursor : cursor + len(view)], view)
            cursor += len(view)

    def scatter_rows(
        self, batch: Batch, device: Device, name: str, start: int, stop: int, size: int, target: View, stride: int
    ) -> None:
        """Copy the rows of tokens [start, stop) of one component to `target`, `size` tokens every `stride` bytes."""
        step = size * self.layout[name].token_bytes
        done = 0
        for rows in self._rows(device, name, start, stop):
            cursor, length = 0, len(rows)
            while cursor < length:
                block, inside = divmod(done + cursor, step)
                nbytes = min(step - inside, length - cursor)
                place = block * stride + inside
                batch.copy(target[place : place + nbytes], rows[cursor : cursor + nbytes])
                cursor += nbytes
            done += length


def write_plan(
    source: Source,
    plan: SlabPlan,
    first_index: int,
    first_slab_block: int,
    count: int,
    stage: Stage | None,
    *,
    rows: bool | None = None,
    device: Device = HOST_DEVICE,
    batch: Batch | None = None,
) -> list[LocalCopy]:
    """The copies that write blocks [first_index, first_index + count) of a transfer to adjacent blocks of a slab.

    `first_slab_block` counts from the slab's first block. Large components go straight from the caller's rows, one
    copy per span; or, with `rows` (by default: where the stage is registered memory), through the stage, one copy per
    component. Packed ones go through the stage as one copy of whole strides, zeros in the gaps and behind the last
    token. `stage` needs `plan.stage_bytes(source.names, count, ...)` bytes and may be None where that is 0. Rows are
    copied to the stage by `device`, in `batch`: before its end by the host, and when it says so by a GPU. Raises
    BadCall for blocks outside the slab or the transfer, rows that are not ready, or a stage that is too short.
    """
    size = plan.block_size
    start, stop = first_index * size, min((first_index + count) * size, source.total_tokens)
    if count < 1 or first_index < 0 or (first_index + count - 1) * size >= source.total_tokens:
        raise BadCall(f"blocks {first_index} to {first_index + count - 1} are not in {source.total_tokens} tokens")
    if not 0 <= first_slab_block <= plan.blocks - count:
        raise BadCall(f"{count} blocks from {first_slab_block} do not fit into a slab of {plan.blocks}")
    through = stage is not None and (stage.holds_rows if rows is None else rows)
    needed = plan.stage_bytes(source.names, count, rows=through)
    if needed > (stage.nbytes if stage is not None else 0):
        raise BadCall(f"{count} blocks need {needed} bytes of staging")
    batch = device.batch() if batch is None else batch
    copies: list[LocalCopy] = []
    room = stage.view(device) if stage is not None and needed else memoryview(b"")
    cursor = 0
    packed = [name for name in source.names if plan.areas[name].packed]
    if packed and stage is not None:
        nbytes = count * plan.packed_stride
        batch.zero(room[:nbytes])
        for name in packed:
            inside = plan.areas[name].start - plan.packed_start
            source.scatter_rows(batch, device, name, start, stop, size, room[inside:nbytes], plan.packed_stride)
        slab_offset = plan.packed_start + first_slab_block * plan.packed_stride
        copies.append(LocalCopy(stage.local, stage.offset, slab_offset, nbytes))
        cursor = nbytes
    for name in source.names:
        area = plan.areas[name]
        if area.packed:
            continue
        slab_offset = area.at(first_slab_block)
        if through and stage is not None:
            nbytes = (stop - start) * area.component.token_bytes
            source.copy_rows(batch, device, name, start, stop, room[cursor : cursor + nbytes])
            copies.append(LocalCopy(stage.local, stage.offset + cursor, slab_offset, nbytes))
            cursor += align(nbytes, ALIGNMENT)
            continue
        for memory, offset, nbytes in source.spans(name, start, stop):
            copies.append(LocalCopy(memory, offset, slab_offset, nbytes))
            slab_offset += nbytes
    return copies


def staged_views(
    source: Source, plan: SlabPlan, first_index: int, count: int, stage: Stage, device: Device
) -> list[list[tuple[str, View]]]:
    """The valid rows of each block as `digest` wants them, where `write_plan` has all rows put: in the stage."""
    room, size = stage.view(device), plan.block_size
    packed = any(plan.areas[name].packed for name in source.names)
    blocks: list[list[tuple[str, View]]] = [[] for _ in range(count)]
    stop = min((first_index + count) * size, source.total_tokens)
    cursor = count * plan.packed_stride if packed else 0
    for name in source.names:
        area = plan.areas[name]
        step = area.component.token_bytes
        begin, stride = (area.start - plan.packed_start, area.stride) if area.packed else (cursor, size * step)
        for k in range(count):
            tokens = min(size, stop - (first_index + k) * size)
            blocks[k].append((name, room[begin + k * stride : begin + k * stride + tokens * step]))
        if not area.packed:
            cursor += align((stop - first_index * size) * step, ALIGNMENT)
    return blocks


def on_a_gpu(tensors: Iterable[object]) -> bool:
    return any(place_of(tensor) != HOST for tensor in tensors if isinstance(tensor, torch.Tensor))


def _checked(component: Component, tensor: object, kinds: frozenset[str]) -> torch.Tensor:
    """The tensor, made contiguous, or BadTensor that says what is wrong with it and what would help."""
    name = component.name
    if not isinstance(tensor, torch.Tensor):
        raise BadTensor(f"{name} is a {type(tensor).__name__}, not a torch.Tensor")
    if str(tensor.dtype) != f"torch.{component.dtype}":
        raise BadTensor(
            f"{name} is {tensor.dtype}, the layout says {component.dtype}",
            hint=f"Convert it: .to(torch.{component.dtype})",
        )
    shape = tuple(tensor.shape)
    if len(shape) != len(component.shape) + 1 or shape[1:] != component.shape:
        wanted = ", ".join(["n", *map(str, component.shape)])
        raise BadTensor(
            f"{name} has shape {list(shape)}, the layout says [{wanted}]", hint=_shape_hint(component, shape)
        )
    if tensor.layout != torch.strided or place_of(tensor).kind not in kinds:
        raise BadTensor(
            f"{name} is {tensor.layout} on {tensor.device}",
            hint=f"Rows have to be dense, in {_listed(sorted(kinds))} memory",
        )
    # A lazily negated view's memory holds the other sign; a tensor that is contiguous already is not copied.
    return tensor.detach().resolve_neg().contiguous()


def _shape_hint(component: Component, shape: tuple[int, ...]) -> str:
    if len(shape) == len(component.shape) + 1 and component.shape and shape[:-1] == component.shape:
        order = ", ".join(map(str, (len(shape) - 1, *range(len(shape) - 1))))
        return f"Rows are tokens: give it token-major, .permute({order})"
    if len(shape) == 2 and len(component.shape) > 1 and shape[1] == prod(component.shape):
        return f"If the values of a token lie in this order, .view(-1, {', '.join(map(str, component.shape))})"
    if shape == component.shape:
        return "One token is a tensor of one row: .unsqueeze(0)"
    return ""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
