"""Memory that a peer may still copy into when it is given back: nothing at the other end of a copy looks whether it is
registered, so what is put at those addresses next would be written over.
"""

from __future__ import annotations

import os
import weakref

from tensorferry.backends._mapping import Mapping
from tensorferry.backends._nixl_jobs import Target
from tensorferry.core.memory import Memory


class Sealed:
    """Owns a mapping. When the last reference goes its pages are given back and its addresses are kept."""

    __slots__ = ("__weakref__", "mapping")

    def __init__(self, mapping: Mapping) -> None:
        self.mapping = mapping
        weakref.finalize(self, _seal, mapping, os.getpid()).atexit = False


_sealed: list[Mapping] = []


def _seal(mapping: Mapping, pid: int) -> None:
    if os.getpid() == pid:
        mapping.seal()
        _sealed.append(mapping)


outlived: list[tuple[list[Memory], list[Target]]] = []


def outlive(memories: list[Memory], copiers: list[Target]) -> None:
    """Memory of others that was told to peers which copy into it stays until they have ended: nothing else keeps a late
    copy out of what is put there next. What `allocate` returned needs no such care."""
    outlived[:] = [(kept, writers) for kept, writers in outlived if not all(target.ended() for target in writers)]
    foreign = [memory for memory in memories if not isinstance(memory.owner, Sealed)]
    writers = [target for target in copiers if not target.ended()]
    if foreign and writers:
        outlived.append((foreign, writers))
