"""The rows that a sender has: the caller's own tensors, read from where they lie, and how a run of blocks is written.

Rows arrive in pieces (`put`), in order, and stay where the caller made them. Only a tensor that is not contiguous is
copied, once. The caller must not change the rows before the transfer has ended: they are read when they are granted,
and again after a failure.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

import torch

from tensorferry.core.arguments import INT64, integer
from tensorferry.core.errors import BadCall, BadTensor, Unsupported
from tensorferry.core.layout import Component, Layout, SlabPlan, align
from tensorferry.core.memory import Memory, copy_bytes
from tensorferry.core.staging import ALIGNMENT, Stage
from tensorferry.core.transport import Region

HOST = frozenset({"cpu"})

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

    `kinds`: memory that the transport can read from, "cpu" or "cuda". `put` may be called from other threads than
    everything else, and of two that put at the same token one is refused. Raises BadTensor for names that the layout
    does not have, or that it needs and are not there.
    """

    def __init__(
        self, layout: Layout, total_tokens: int, present: Iterable[str], *, kinds: frozenset[str] = HOST
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
        self._starts: list[int] = []  # first token of each piece
        self._pieces: dict[str, list[Memory]] = {name: [] for name in self.names}
        self._views: dict[tuple[str, int], memoryview] = {}
        self._ready = 0
        self._released = False
        self._putting = threading.Lock()

    @property
    def ready(self) -> int:
        """Tokens that can be read: all before this one."""
        return self._ready

    def put(self, start: int, /, **tensors: torch.Tensor | None) -> None:
        """Append rows: the tensors' first row is token `start`, which must be `ready`; None counts as not given.

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
        pieces = {
            name: Memory(tensor.data_ptr(), count * self.layout[name].token_bytes, tensor.device.type, tensor)
            for name, tensor in rows.items()
        }
        with self._putting:  # held for an instant: `release` needs it, in the I/O thread
            self._check_next(start)
            for name, memory in pieces.items():
                self._pieces[name].append(memory)
            self._starts.append(start)
            self._ready = start + count  # last: another thread may read what lies before it from here on

    def _check_next(self, start: int) -> None:
        if self._released:
            raise BadCall("put after the transfer has ended")
        if start != self._ready:
            raise BadCall(
                f"put at token {start}, but the next token is {self._ready}", hint="Put rows in order, without gaps"
            )

    def spans(self, name: str, start: int, stop: int) -> list[Span]:
        """Where the rows of tokens [start, stop) of one component lie, in order: one span per piece that they touch.

        Raises BadCall beyond `ready` or after `release`.
        """
        return [(self._pieces[name][piece], offset, nbytes) for piece, offset, nbytes in self._cut(name, start, stop)]

    def block_views(self, index: int, block_size: int) -> Iterator[tuple[str, memoryview]]:
        """The valid rows of block `index` as `digest` wants them: (name, bytes), sorted by name, split by piece."""
        start = index * block_size
        stop = min(start + block_size, self.total_tokens)
        for name in self.names:
            yield from ((name, view) for view in self._rows(name, start, stop))

    def release(self) -> None:
        """Drop the references to the caller's tensors. Spans handed out before keep theirs. Idempotent."""
        with self._putting:
            self._released = True
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
            end = min(stop, self._starts[piece + 1] if piece + 1 < len(self._starts) else self._ready)
            yield piece, (start - first) * token_bytes, (end - start) * token_bytes
            start, piece = end, piece + 1

    def _rows(self, name: str, start: int, stop: int) -> Iterator[memoryview]:
        for piece, offset, nbytes in self._cut(name, start, stop):
            key = name, piece
            if key not in self._views:
                self._views[key] = _host(self._pieces[name][piece]).view()
            yield self._views[key][offset : offset + nbytes]

    def copy_rows(self, name: str, start: int, stop: int, target: memoryview) -> None:
        """Copy the rows of tokens [start, stop) of one component to the beginning of `target`."""
        cursor = 0
        for view in self._rows(name, start, stop):
            copy_bytes(target[cursor : cursor + len(view)], view)
            cursor += len(view)

    def scatter_rows(self, name: str, start: int, stop: int, size: int, target: memoryview, stride: int) -> None:
        """Copy the rows of tokens [start, stop) of one component to `target`, `size` tokens every `stride` bytes."""
        pieces = list(self._rows(name, start, stop))
        rows = pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))
        step = size * self.layout[name].token_bytes
        for k, cursor in enumerate(range(0, len(rows), step)):
            part = rows[cursor : cursor + step]
            target[k * stride : k * stride + len(part)] = part


def write_plan(
    source: Source, plan: SlabPlan, first_index: int, first_slab_block: int, count: int, stage: Stage | None
) -> list[LocalCopy]:
    """The copies that write blocks [first_index, first_index + count) of a transfer to adjacent blocks of a slab.

    `first_slab_block` counts from the slab's first block. Large components go straight from the caller's rows, one
    copy per span; or, with a stage in registered memory, through it, one copy per component. Packed ones go through
    the stage as one copy of whole strides, zeros in the gaps and behind the last token. `stage` needs
    `plan.stage_bytes(source.names, count, ...)` bytes and may be None where that is 0. Rows are copied to the stage
    before this returns. Raises BadCall for blocks outside the slab or the transfer, rows that are not ready, or a
    stage that is too short.
    """
    size = plan.block_size
    start, stop = first_index * size, min((first_index + count) * size, source.total_tokens)
    if count < 1 or first_index < 0 or (first_index + count - 1) * size >= source.total_tokens:
        raise BadCall(f"blocks {first_index} to {first_index + count - 1} are not in {source.total_tokens} tokens")
    if not 0 <= first_slab_block <= plan.blocks - count:
        raise BadCall(f"{count} blocks from {first_slab_block} do not fit into a slab of {plan.blocks}")
    through = stage is not None and stage.holds_rows
    needed = plan.stage_bytes(source.names, count, rows=through)
    if needed > (stage.nbytes if stage is not None else 0):
        raise BadCall(f"{count} blocks need {needed} bytes of staging")
    copies: list[LocalCopy] = []
    room = stage.view() if stage is not None and needed else memoryview(b"")
    cursor = 0
    packed = [name for name in source.names if plan.areas[name].packed]
    if packed and stage is not None:
        nbytes = count * plan.packed_stride
        room[:nbytes] = bytes(nbytes)
        for name in packed:
            inside = plan.areas[name].start - plan.packed_start
            source.scatter_rows(name, start, stop, size, room[inside:nbytes], plan.packed_stride)
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
            source.copy_rows(name, start, stop, room[cursor:])
            copies.append(LocalCopy(stage.local, stage.offset + cursor, slab_offset, nbytes))
            cursor += align(nbytes, ALIGNMENT)
            continue
        for memory, offset, nbytes in source.spans(name, start, stop):
            copies.append(LocalCopy(memory, offset, slab_offset, nbytes))
            slab_offset += nbytes
    return copies


def _host(memory: Memory) -> Memory:
    if memory.kind != "cpu":
        raise Unsupported(f"rows in {memory.kind} memory cannot be read by the host", hint="Put tensors in host memory")
    return memory


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
    if tensor.layout != torch.strided or tensor.device.type not in kinds:
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
