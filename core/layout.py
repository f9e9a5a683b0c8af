"""What travels: components, the layout that lists them, and where their rows lie inside a slab of pool memory.

The layout is data, not code. Nothing here or elsewhere keys on a component's position in the table: components are
found by name, the fingerprint and the presence bitmap go by sorted names, and the block size is a setting of its own,
never derived from a byte count. No torch: dtypes are names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from hashlib import blake2b
from keyword import iskeyword
from math import prod
from operator import index

from tensorferry.core.errors import ConfigError

DTYPE_BYTES = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
}

AUX_WORDS = 16
"""The aux record is int64[16]: [0] total length, [1] mrope delta, the rest is the caller's."""

PACK_BELOW_BYTES = 16 * 1024
"""Components under this many bytes a block travel packed in one staged copy per run (ruling R12)."""

ALIGNMENT = 4096
"""Each component's area in a slab starts on a page, so that engines which pin pages never share one."""

MAX_COMPONENTS = 32
MAX_DIMENSION = 1 << 31
MAX_NAME = 64
RESERVED_NAMES = frozenset({"aux", "content_id", "mrope_delta", "room", "self", "start", "total_tokens"})
"""Arguments of a send, or attributes of a result, that are no components."""


def dtype_name(dtype: object) -> str:
    """ "bfloat16" from "bfloat16" or torch.bfloat16. Raises ConfigError for a dtype that does not travel."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise ConfigError(f"dtype {name!r} does not travel", hint=f"Use one of {', '.join(DTYPE_BYTES)}")
    return name


@dataclass(frozen=True)
class Component:
    """One per-token array: `shape` is the shape of one token's entry, `()` for a scalar.

    `optional` components may be absent from a transfer (None in the result, no bytes on the wire).
    """

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    optional: bool = False

    def __post_init__(self) -> None:
        # Names are keyword arguments and public attributes. ASCII: Python folds other identifiers (NFKC), bytes do not.
        name = self.name
        if not (name.isidentifier() and name.isascii()) or iskeyword(name) or name[0] == "_" or len(name) > MAX_NAME:
            raise ConfigError(f"component name {name!r} is not a free ASCII identifier of at most {MAX_NAME} letters")
        if name in RESERVED_NAMES:
            raise ConfigError(f"component name {name!r} is taken: it means something else in a send or a result")
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        try:
            object.__setattr__(self, "shape", tuple(index(n) for n in self.shape))
        except TypeError:
            raise ConfigError(f"component {name}: shape {self.shape!r} is not a tuple of whole numbers") from None
        if any(not 0 < n < MAX_DIMENSION for n in self.shape) or self.token_bytes >= MAX_DIMENSION:
            raise ConfigError(
                f"component {name}: shape {self.shape} must have dimensions of at least 1 and less than 2 GiB a token"
            )

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of one token's entry."""
        return DTYPE_BYTES[self.dtype] * prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """The components of one deployment. Both sides must declare the same; `fingerprint` is how they notice."""

    components: tuple[Component, ...]

    def __init__(self, components: Iterable[Component]) -> None:
        object.__setattr__(self, "components", tuple(components))
        names = [c.name for c in self.components]
        if not names or len(names) > MAX_COMPONENTS:
            raise ConfigError(f"a layout has 1 to {MAX_COMPONENTS} components, not {len(names)}")
        if len(set(names)) != len(names):
            raise ConfigError(f"component names must be unique: {names}")

    def __getitem__(self, name: str) -> Component:
        return self._by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    @cached_property
    def _by_name(self) -> dict[str, Component]:
        return {c.name: c for c in self.components}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Sorted: the order of the fingerprint, of the presence bitmap and of digests."""
        return tuple(sorted(self._by_name))

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all components."""
        return sum(c.token_bytes for c in self.components)

    @cached_property
    def fingerprint(self) -> bytes:
        """16 bytes that change with any component's name, dtype, shape or optionality, and not with their order."""
        text = ";".join(
            f"{c.name}:{c.dtype}:{','.join(map(str, c.shape))}:{int(c.optional)}"
            for c in (self[name] for name in self.names)
        )
        return blake2b(text.encode(), digest_size=16).digest()

    def presence(self, present: Iterable[str]) -> int:
        """The bitmap of `present`: bit k stands for the k-th name in sorted order."""
        given = set(present)
        return sum(1 << k for k, name in enumerate(self.names) if name in given)

    def present(self, bitmap: int) -> tuple[str, ...]:
        """The names of a presence bitmap, sorted. Raises ValueError for bits without a component, for none
        at all, or for a missing component that is not optional."""
        if not 0 <= bitmap < 1 << len(self.names):
            raise ValueError(f"presence bitmap {bitmap:#x} names components that the layout does not have")
        if not bitmap:
            raise ValueError("no component is present")
        names = tuple(name for k, name in enumerate(self.names) if bitmap >> k & 1)
        missing = [name for name in self.names if name not in names and not self[name].optional]
        if missing:
            raise ValueError(f"components {missing} are not optional and are absent")
        return names


def embedding_layout(
    hidden_size: int, dtype: object = "bfloat16", *, deepstack_layers: int = 0, mrope: bool = True
) -> Layout:
    """The standard embedding layout of multimodal serving.

    input_embeds [hidden_size] of `dtype`; fill_ids int32 []; mrope_positions int32 [3], token-major, so that a split
    at any token keeps a position whole; deepstack_embeds [deepstack_layers, hidden_size] where layers > 0. All but
    input_embeds are optional in a transfer.
    """
    components = [
        Component("input_embeds", dtype_name(dtype), (hidden_size,)),
        Component("fill_ids", "int32", (), optional=True),
    ]
    if mrope:
        components.append(Component("mrope_positions", "int32", (3,), optional=True))
    if deepstack_layers:
        components.append(
            Component("deepstack_embeds", dtype_name(dtype), (deepstack_layers, hidden_size), optional=True)
        )
    return Layout(components)


@dataclass(frozen=True)
class Area:
    """Where one component's rows lie in a slab: block b's first row is at `start + b * stride` bytes, and the rows of
    one block are contiguous. `packed` areas share a stride with the other small components."""

    component: Component
    start: int
    stride: int
    packed: bool

    def at(self, block: int) -> int:
        """Offset in bytes of the first row of the slab's `block`-th block."""
        return self.start + block * self.stride


@dataclass(frozen=True)
class SlabPlan:
    """The arrangement of one slab: component-major, so that adjacent blocks merge into one copy per component.

    Small components (below PACK_BELOW_BYTES a block) lie interleaved per block in one last area, the packed area:
    a run of adjacent blocks is one contiguous piece of it. Both sides compute the same plan from the layout, the
    block size and the number of blocks in a slab; no offset ever travels.
    """

    layout: Layout
    block_size: int
    blocks: int
    areas: dict[str, Area] = field(init=False, compare=False, repr=False)
    packed_start: int = field(init=False, compare=False)
    packed_stride: int = field(init=False, compare=False)
    nbytes: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        large: list[Component] = []
        small: list[Component] = []
        for name in self.layout.names:
            component = self.layout[name]
            (small if component.token_bytes * self.block_size < PACK_BELOW_BYTES else large).append(component)
        areas: dict[str, Area] = {}
        cursor = 0
        for component in large:
            stride = component.token_bytes * self.block_size
            areas[component.name] = Area(component, cursor, stride, packed=False)
            cursor = align(cursor + stride * self.blocks, ALIGNMENT)
        inside, offsets = 0, {}
        for component in small:
            offsets[component.name] = inside
            inside = align(inside + component.token_bytes * self.block_size, 64)
        for component in small:
            areas[component.name] = Area(component, cursor + offsets[component.name], inside, packed=True)
        object.__setattr__(self, "areas", areas)
        object.__setattr__(self, "packed_start", cursor)
        object.__setattr__(self, "packed_stride", inside)
        object.__setattr__(self, "nbytes", max(align(cursor + inside * self.blocks, ALIGNMENT), ALIGNMENT))

    def stage_bytes(self, names: Iterable[str], count: int, *, rows: bool) -> int:
        """Bytes of staging that a run of `count` blocks of the components `names` needs, at most.

        One piece of the packed area where any of them is packed and, where `rows` (all rows are staged because the
        transport reads registered memory alone), the rows of the large ones, each from a multiple of 64. Grows with
        `count`. 0: nothing is staged.
        """
        areas = [self.areas[name] for name in names]
        packed = count * self.packed_stride if any(area.packed for area in areas) else 0
        large = (align(count * area.stride, 64) for area in areas if rows and not area.packed)
        return packed + sum(large)


def align(n: int, to: int) -> int:
    """The smallest multiple of `to` that is at least `n`."""
    return -(-n // to) * to


@dataclass(frozen=True)
class Geometry:
    """How a pool of `pool_blocks` blocks of `block_size` tokens is cut into at most `slabs` equal slabs.

    Block numbers count through the slabs; the last slab may be shorter. Raises ConfigError for sizes below 1.
    """

    block_size: int
    pool_blocks: int
    slabs: int = 8

    def __post_init__(self) -> None:
        for name in ("block_size", "pool_blocks", "slabs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")

    @cached_property
    def blocks_per_slab(self) -> int:
        return -(-self.pool_blocks // min(self.slabs, self.pool_blocks))

    @cached_property
    def slab_count(self) -> int:
        return -(-self.pool_blocks // self.blocks_per_slab)

    def slab_of(self, block: int) -> int:
        return block // self.blocks_per_slab

    def slab_blocks(self, slab: int) -> range:
        first = slab * self.blocks_per_slab
        return range(first, min(first + self.blocks_per_slab, self.pool_blocks))

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def tokens_in(self, index: int, total: int) -> int:
        """Tokens that block `index` of a transfer of `total` tokens carries: the last block may be partial."""
        return max(0, min(self.block_size, total - index * self.block_size))


@lru_cache(maxsize=64)
def _plan(layout: Layout, block_size: int, blocks: int) -> SlabPlan:
    return SlabPlan(layout, block_size, blocks)


def slab_plan(layout: Layout, geometry: Geometry, slab: int) -> SlabPlan:
    """The plan of one slab of a pool (the last slab may hold fewer blocks, and then differs from the others')."""
    return _plan(layout, geometry.block_size, len(geometry.slab_blocks(slab)))


def destination_bytes(layout: Layout, total: int, names: Iterable[str]) -> int:
    """Bytes of memory that the rows of `total` tokens take on the language side: what the budget is charged."""
    return total * sum(layout[name].token_bytes for name in names)
