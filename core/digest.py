"""Digests of blocks: what tells a block that arrived from one that did not, was torn, stale or put in another's place.

A digest covers one block over all its components, and is seeded with the block's position: intact bytes in the wrong
place fail. Modes, by the sender's choice, announced once a transfer: `full` hashes every byte; `sampled` hashes small
components in full and of the others 64 bytes of every 4 KiB, so that any run of 4 KiB that did not arrive is seen;
`off` hashes nothing (digest 0).

xxh3 is no proof against somebody who wants to deceive; it is against accidents. No torch here.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from xxhash import xxh3_64, xxh3_64_intdigest

from tensorferry.core.errors import ConfigError

MODES = ("full", "sampled", "off")

SAMPLE_PERIOD = 4096
SAMPLE_BYTES = 64
"""A cache line of every page: the samples of any 4 KiB in a row are 64 of its bytes, wherever it starts."""

SAMPLE_FROM_BYTES = 16 * 1024
"""Components with fewer bytes in a block are hashed in full in `sampled`."""

CHUNK_BYTES = 64 * 1024
"""xxhash lets go of the interpreter lock for longer inputs, and a busy thread may then keep it for 5 ms: down to 0.2
GB/s beside one instead of 12. In pieces of this size the lock is kept, which costs a quarter of the rate otherwise
(benchmarks/memory_rates.py)."""

_POSITION = struct.Struct("<QQQ")
_COMPONENT = struct.Struct("<QI")


class _Line(ctypes.Structure):
    """What a sample is: an element that a memoryview can step over (views of two dimensions cannot be sliced)."""

    _fields_ = (("bytes", ctypes.c_ubyte * SAMPLE_BYTES),)


@lru_cache(maxsize=64)
def _lines(count: int) -> type[ctypes.Array[_Line]]:
    return _Line * count


def block_seed(receiver_inc: int, xfer: int, content_id: bytes, index: int) -> int:
    """The seed of block `index` of a transfer, 64 bits. The three numbers are unsigned 64-bit ones."""
    return xxh3_64_intdigest(_POSITION.pack(receiver_inc, xfer, index) + content_id)


@dataclass(frozen=True, slots=True)
class Sample:
    """What `sampled` hashes of a component of `nbytes` bytes, taken where they lie: the first SAMPLE_BYTES of every
    whole SAMPLE_PERIOD, and its end: what remains, or the last SAMPLE_BYTES."""

    nbytes: int
    content: memoryview


def is_sampled(nbytes: int, mode: str) -> bool:
    """Whether samples stand for a component of so many bytes in a block."""
    return mode == "sampled" and nbytes >= SAMPLE_FROM_BYTES


def digest(components: Iterable[tuple[str, memoryview | Sample]], seed: int, mode: str) -> int:
    """The 64-bit digest of one block: `(name, bytes)` pairs in sorted order of names.

    Pairs with the same name in a row are pieces of one component: how it is cut does not change the digest. A Sample
    stands for all of one. Names and lengths enter it. Raises ConfigError for an unknown mode.
    """
    if mode == "off":
        return 0
    if mode not in MODES:
        raise ConfigError(f"integrity {mode!r} is unknown", hint=f"Use one of {', '.join(MODES)}")
    state = xxh3_64(seed=seed)
    last: str | None = None
    pieces: list[memoryview] = []
    for name, piece in components:
        if name != last:
            if last is not None:
                _add(state, last, pieces, mode)
            last, pieces = name, []
        if isinstance(piece, Sample):
            state.update(_header(name, piece.nbytes))
            state.update(piece.content)
            last = None
        else:
            pieces.append(piece)
    if last is not None:
        _add(state, last, pieces, mode)
    return state.intdigest()


@lru_cache(maxsize=256)
def _header(name: str, nbytes: int) -> bytes:
    label = name.encode()
    return _COMPONENT.pack(nbytes, len(label)) + label


def _add(state: xxh3_64, name: str, pieces: list[memoryview], mode: str) -> None:
    nbytes = sum(map(len, pieces))
    state.update(_header(name, nbytes))
    if is_sampled(nbytes, mode):
        pieces = [memoryview(_sample(pieces))]
    for piece in pieces:
        if len(piece) <= CHUNK_BYTES:
            state.update(piece)
        else:
            for start in range(0, len(piece), CHUNK_BYTES):
                state.update(piece[start : start + CHUNK_BYTES])


def _sample(pieces: list[memoryview]) -> bytes:
    """The first 64 bytes of every whole 4 KiB of a component, and its end: what remains, or the last 64 bytes."""
    # Pieces are joined, which costs a copy, so that samples lie at the same places however the component is cut.
    # ctypes looks into writable memory alone, hence the bytearray.
    whole = pieces[0] if len(pieces) == 1 and not pieces[0].readonly else memoryview(bytearray().join(pieces))
    periods = len(whole) // SAMPLE_PERIOD
    lines = memoryview(_lines(periods * SAMPLE_PERIOD // SAMPLE_BYTES).from_buffer(whole))
    heads = lines[:: SAMPLE_PERIOD // SAMPLE_BYTES].tobytes()
    return heads + whole[min(periods * SAMPLE_PERIOD, len(whole) - SAMPLE_BYTES) :]
