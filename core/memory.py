"""Memory as the transport layer sees it: an address, a length, a kind, and whoever keeps it alive. No torch here."""

from __future__ import annotations

import ctypes
import errno
import mmap
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

# One ctypes type for views of any length, cut to size at once: a new array type per length would cost 10 us and a
# reference cycle each. An instance is two words; nothing of this length is ever allocated or touched.
_AnyLength = ctypes.c_char * (1 << 46)

COPY_CHUNK = 1 << 20
HUGE_PAGE = 2 << 20


class Place(NamedTuple):
    """Where memory lies: its kind, and which device of that kind."""

    kind: str
    device: int = 0

    def __str__(self) -> str:
        return self.kind if self == HOST else f"{self.kind}:{self.device}"


HOST = Place("cpu")


@dataclass(frozen=True, slots=True)
class Memory:
    """`nbytes` bytes at `address`, of `kind` "cpu" or "cuda"; `device` is which one of its kind, as CUDA counts them.

    `owner` is whatever object must live for the address to stay valid (a tensor, an mmap); holding this Memory holds
    it. Equality and hash ignore the owner.
    """

    address: int
    nbytes: int
    kind: str = "cpu"
    owner: object = field(default=None, compare=False, repr=False)
    device: int = 0

    @property
    def place(self) -> Place:
        return Place(self.kind, self.device)

    def view(self, offset: int = 0, nbytes: int | None = None) -> memoryview:
        """A writable view of host memory as bytes; raises ValueError outside it, TypeError where kind is not cpu.

        The view, and every slice of it, keeps `owner` alive.
        """
        if self.kind != "cpu":
            raise TypeError(f"{self.kind} memory has no host view")
        size = self.nbytes - offset if nbytes is None else nbytes
        if offset < 0 or size < 0 or offset + size > self.nbytes:
            raise ValueError(f"[{offset}, {offset + size}) lies outside {self.nbytes} bytes")
        if size == 0:
            return memoryview(bytearray())  # an empty tensor's address is 0, and ctypes will not look there
        anchor = _AnyLength.from_address(self.address + offset)
        anchor.owner = self.owner  # type: ignore[attr-defined]  # the view holds the anchor, the anchor the owner
        return memoryview(anchor)[:size].cast("B")


def host_memory(nbytes: int) -> Memory:
    """`nbytes` (at least 1) of zeroed, page-aligned memory of this process, its pages already there, huge ones where
    the kernel has them. Raises OSError where there is no memory."""
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without transparent huge pages refuses the advice: only slower
        mapping.madvise(mmap.MADV_HUGEPAGE)
    anchor = (ctypes.c_char * nbytes).from_buffer(mapping)
    ctypes.memset(anchor, 0, nbytes)  # the first touch is the expensive one: here, not in a transfer
    return Memory(ctypes.addressof(anchor), nbytes, "cpu", anchor)


def advise_huge_pages(memory: Memory) -> None:
    """Ask for huge pages behind untouched host memory; nothing happens where it is small or the kernel has none.

    First touch of a fresh destination is what a gather into it pays: 2.4 GB/s in pages of 4 KiB, 11.6 GB/s in huge
    ones (measured on a 2-core EPYC guest whose kernel gives huge pages on advice).
    """
    start = -(-memory.address // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (memory.address + memory.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if memory.kind == "cpu" and stop - start >= HUGE_PAGE:
        _libc.madvise(start, stop - start, mmap.MADV_HUGEPAGE)  # advice: its failure changes speed alone


def copy_bytes(target: memoryview, source: memoryview) -> None:
    """Copy one view over another of the same length (ValueError otherwise), in chunks.

    Slice assignment keeps the interpreter lock. That is the point: a lock that is let go for a copy of 60 us may come
    back from a busy thread (a scheduler's loop) only after its switch interval of 5 ms, and 1 MiB copies then fall from
    8 to as little as 0.2 GB/s (benchmarks/memory_rates.py). Between chunks the interpreter may switch, so nobody waits
    longer than it would anyway.
    """
    if len(target) != len(source):
        raise ValueError(f"{len(source)} bytes do not fit {len(target)}")
    for start in range(0, len(source), COPY_CHUNK):
        stop = start + COPY_CHUNK
        target[start:stop] = source[start:stop]


def _number(path: str) -> int | None:
    try:
        with open(path, encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):  # not there, or "max"
        return None


def _field(path: str, name: str) -> int:
    """The number behind a name in a file of such lines; 0 where it is not there."""
    try:
        with open(path, encoding="ascii") as file:
            for line in file:
                words = line.split()
                if words and words[0] == name:
                    return int(words[1])
    except (OSError, ValueError, IndexError):
        return 0
    return 0


def available_bytes() -> int:
    """How much memory can be had, by the kernel's own estimate and by the limit of the container (cgroup 1 and 2).

    The page cache that can be dropped counts as available. Without /proc: no limit.
    """
    group = "/sys/fs/cgroup"
    answers = [_field("/proc/meminfo", "MemAvailable:") * 1024 or sys.maxsize]
    for limit, used, stat, name in (
        (f"{group}/memory.max", f"{group}/memory.current", f"{group}/memory.stat", "inactive_file"),
        (
            f"{group}/memory/memory.limit_in_bytes",
            f"{group}/memory/memory.usage_in_bytes",
            f"{group}/memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        most, now = _number(limit), _number(used)
        if most is not None and now is not None:
            answers.append(max(0, most - now + _field(stat, name)))
    return min(answers)


def check_available(nbytes: int) -> None:
    """Raises OSError where so much memory is not to be had.

    Bringing in pages of shared memory that is not there does not fail: the kernel kills processes until it is, and
    which ones is its own choice.
    """
    available = available_bytes()
    if nbytes > available:
        raise OSError(errno.ENOMEM, f"{nbytes} bytes are wanted and about {available} are available")


_libc = ctypes.CDLL(None)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.madvise.restype = ctypes.c_int
