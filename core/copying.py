"""Copying, and knowing when it is over: `Device`, which here is the host, whose copies are over when they return.

Whoever copies does so in a batch:

    with device.batch() as batch:
        batch.copy(target, source)          views from `device.view`, cut by bytes
    ...
    if batch.finished():                    the targets are written, and nothing reads the sources any more

A GPU's batch (gpu.py) holds what it copies from and to until it is over. What an endpoint leaves behind when it closes,
`outlive` keeps.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import torch

from tensorferry.core.digest import Sample
from tensorferry.core.errors import DeviceError
from tensorferry.core.memory import HOST, Memory, Place, advise_huge_pages, available_bytes, copy_bytes

log = logging.getLogger("tensorferry.devices")

View = Any
"""Memory that can be cut by bytes: a memoryview, or a flat tensor of bytes where a GPU takes part."""

Block = list[tuple[str, View]]
"""What a digest is made of: (component, bytes), pieces of one component in a row."""

LINGER_SECONDS = 1.0
"""How long the end of an endpoint waits for copies that are under way; one takes milliseconds."""


class Copying:
    """Work that somebody was asked to do. This one is done."""

    def finished(self) -> bool:
        """It is over; once True, always True. Never blocks. Raises DeviceError where it failed: nothing runs then."""
        return True


OVER = Copying()


class Batch(Copying):
    """Copies that are over together. The host's: over when they return."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def copy(self, target: View, source: View) -> None:
        """One view over another of the same length."""
        copy_bytes(target, source)

    def zero(self, target: View) -> None:
        target[:] = bytes(len(target))


class Reading(Copying):
    """Bytes on their way to where they can be hashed: `blocks`, once it is finished."""

    def __init__(self, blocks: Sequence[Sequence[tuple[str, memoryview | Sample]]]) -> None:
        self.blocks = blocks


class Device:
    """The host's: everything is over when it returns."""

    def view(self, memory: Memory) -> View:
        """Memory of any of the device's places, to be cut and copied. It keeps the memory alive."""
        return memory.view()

    def batch(self) -> Batch:
        return _HOST_BATCH

    def read(self, blocks: Sequence[Block], mode: str) -> Reading:
        """Bring what digests in `mode` are made of to the host, after all that was put in line before."""
        return Reading(blocks)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, place: Place) -> torch.Tensor:
        """Rows that are not filled. Raises RuntimeError or MemoryError where there is no memory."""
        # A serving process may well have set another default device.
        tensor = torch.empty(shape, dtype=dtype, device="cpu")
        advise_huge_pages(memory_of(tensor, HOST))
        return tensor

    def pin(self, memory: Memory) -> Memory:
        """The same memory, made ready for this device's copies for as long as what is returned lives."""
        return memory

    def available(self, place: Place) -> int:
        """Bytes that can be had there, about."""
        return available_bytes()

    def fill(self, view: View, content: bytes) -> None:
        """For debugging: write these bytes, and wait for it."""
        view[:] = content

    def content(self, view: View) -> bytes:
        """For debugging: the bytes of a view, waited for."""
        return bytes(view)


_HOST_BATCH = Batch()
HOST_DEVICE = Device()


def memory_of(tensor: torch.Tensor, place: Place) -> Memory:
    """A contiguous tensor's memory."""
    nbytes = tensor.numel() * tensor.element_size()
    return Memory(tensor.data_ptr(), nbytes, place.kind, tensor, place.device)


# ---- what nobody waits for any more --------------------------------------------------------------------------

_outliving: list[Copying] = []
_tending = threading.Lock()


def outlive(copies: Iterable[Copying]) -> None:
    """Somebody closes and these may not be over: wait a moment, then keep them, with the memory that they hold, until
    they are. Never raises for what failed: nothing of that runs any more."""
    left = [one for one in copies if not _gone(one)]
    deadline = time.monotonic() + LINGER_SECONDS
    while left and time.monotonic() < deadline:
        time.sleep(0.001)
        left = [one for one in left if not _gone(one)]
    if left:
        log.warning("%d copies of a GPU are not over; their memory is kept until they are", len(left))
    keep(left)


def keep(copies: Iterable[Copying]) -> None:
    """Nobody asks after these any more: hold them, and what they hold, until they are over."""
    with _tending:
        _outliving[:] = [one for one in [*_outliving, *copies] if not _gone(one)]


def _gone(one: Copying) -> bool:
    try:
        return one.finished()
    except DeviceError:
        return True
