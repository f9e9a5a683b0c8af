"""A GPU that is none: host memory behind, streams of its own, and copies that are over when the test says so."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from tensorferry.backends.memory import MemoryOptions, MemoryTransport
from tensorferry.core import devices
from tensorferry.core.gpu import Cuda
from tensorferry.core.memory import Memory, Place, host_memory
from tensorferry.core.transport import Options, Region


class Line:
    """A stream: work in order, done one by one."""

    def __init__(self) -> None:
        self.work: deque[Callable[[], object]] = deque()
        self.asked = 0
        self.done = 0

    def add(self, work: Callable[[], object]) -> None:
        self.work.append(work)
        self.asked += 1

    def run(self, upto: int | None = None) -> None:
        while self.work and (upto is None or self.done < upto):
            self.work.popleft()()
            self.done += 1


class Mark:
    """An event: over when the stream has come so far."""

    def __init__(self, gpu: StandIn, line: Line) -> None:
        self.gpu, self.line, self.number = gpu, line, line.asked

    def query(self) -> bool:
        with self.gpu.lock:
            if self.gpu.broken:
                raise RuntimeError(f"{self.gpu.broken}\nand more lines of it")
            if not self.gpu.held:
                self.line.run(self.number)
            return self.line.done >= self.number


class StandIn(Cuda):
    """In the place of torch.cuda. While `held`, nothing that is asked of it is done; `release` does it."""

    def __init__(self, devices: int = 2) -> None:
        self.lock = threading.RLock()
        self.held = False
        self.broken = ""
        """What every event raises from now on."""
        self.memory_left: int | None = None
        self.refuses_copies = ""
        self.caller = [Line() for _ in range(devices)]
        """The stream that callers compute on, of each device."""
        self.lines: list[Line] = []
        self.claims: list[int] = []
        self.pinned = 0
        self._places: dict[int, tuple[int, int]] = {}  # start -> (stop, device)
        self._here = threading.local()

    # ---- for tests

    def release(self) -> None:
        with self.lock:
            self.held = False
            for line in [*self.caller, *self.lines]:
                line.run()

    def rows(self, tensors: dict[str, torch.Tensor], device: int = 0) -> dict[str, torch.Tensor]:
        """The same rows in memory of the device."""
        moved = {}
        for name, tensor in tensors.items():
            moved[name] = self.empty(tuple(tensor.shape), tensor.dtype, device)
            moved[name].copy_(tensor)
        return moved

    def own(self, address: int, nbytes: int, device: int, owner: object) -> None:
        """This memory is the device's, for as long as its owner lives."""
        if nbytes:
            self._places[address] = (address + nbytes, device)
            weakref.finalize(owner, self._places.pop, address, None)

    # ---- what is asked of it

    def why_not(self) -> tuple[str, str]:
        return "", ""

    def count(self) -> int:
        return len(self.caller)

    def current(self) -> int:
        return 0

    def available(self, device: int) -> int:
        return 1 << 40 if self.memory_left is None else self.memory_left

    def place_of(self, tensor: torch.Tensor) -> Place | None:
        if tensor.device.type != "cpu":
            return None
        address = tensor.untyped_storage().data_ptr()
        for start, (stop, device) in list(self._places.items()):
            if start <= address < stop:
                return Place("cuda", device)
        return None

    def view(self, memory: Memory) -> torch.Tensor:
        return torch.frombuffer(Memory(memory.address, memory.nbytes, "cpu", memory.owner).view(), dtype=torch.uint8)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: int) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        if self.memory_left is not None and tensor.nbytes > self.memory_left:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {tensor.nbytes} bytes")
        self.own(tensor.data_ptr(), tensor.nbytes, device, tensor)
        return tensor

    def scratch(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def pin(self, memory: Memory, device: int) -> Memory:
        self.pinned += memory.nbytes
        return memory

    def stream(self, device: int) -> Line:
        self.lines.append(Line())
        return self.lines[-1]

    @contextmanager
    def using(self, stream: Any) -> Iterator[None]:
        before = getattr(self._here, "line", None)
        self._here.line = stream
        try:
            yield
        finally:
            self._here.line = before

    def event(self, stream: Any) -> Mark:
        return Mark(self, stream)

    def arrival(self, device: int) -> Mark:
        return Mark(self, self.caller[device])

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if self.refuses_copies:
            raise RuntimeError(self.refuses_copies)
        assert target.shape == source.shape
        pairs = list(zip(_pieces(target), _pieces(source), strict=True))
        with self.lock:
            self._here.line.add(lambda: [ctypes.memmove(to, of, nbytes) for (to, nbytes), (of, _) in pairs])

    def zero(self, target: torch.Tensor) -> None:
        [(start, nbytes)] = _pieces(target)
        with self.lock:
            self._here.line.add(lambda: ctypes.memset(start, 0, nbytes))

    def wait(self, stream: Any) -> None:
        with self.lock:
            stream.run()

    def claim(self, tensor: torch.Tensor) -> None:
        self.claims.append(tensor.data_ptr())


def _pieces(tensor: torch.Tensor) -> list[tuple[int, int]]:
    """(address, bytes), row by row. A GPU knows addresses: nothing here keeps the memory alive."""
    return [(row.data_ptr(), row.numel()) for row in (tensor if tensor.dim() == 2 else [tensor])]


class GpuTransport(MemoryTransport):
    """The memory transport as an engine whose card writes to the stand-in's memory. `registers`: as most do, it reads
    registered memory alone; `takes`: it knows the GPU's memory."""

    def __init__(
        self, gpu: StandIn, *, takes: bool = True, registers: bool = True, options: Options | None = None
    ) -> None:
        super().__init__(options or MemoryOptions())
        self.gpu = gpu
        kinds = frozenset({"cpu", "cuda"} if takes else {"cpu"})
        self.capabilities = replace(
            self.capabilities, memory_kinds=kinds, needs_flush=takes, registers_sources=registers
        )
        self.flushed: list[Region] = []
        self.posted = 0
        self.refuse_kind = ""

    def allocate(self, nbytes: int, kind: str = "cpu", device: int = 0) -> Memory:
        if kind == "cpu":
            return super().allocate(nbytes)
        self._check_wish(nbytes, kind)
        if self.gpu.memory_left is not None and nbytes > self.gpu.memory_left:
            raise RuntimeError("CUDA out of memory")
        plain = host_memory(nbytes)
        self.gpu.own(plain.address, nbytes, device, plain.owner)
        return Memory(plain.address, nbytes, "cuda", plain.owner, device)

    def flush(self, region: Region) -> None:
        self.flushed.append(region)

    def _start(self, *arguments: Any) -> None:
        self.posted += 1
        super()._start(*arguments)


@contextmanager
def standing_in() -> Iterator[StandIn]:
    """Two GPUs, for everything that asks for "cuda"."""
    with pytest.MonkeyPatch.context() as patch:
        stand_in = StandIn()
        patch.setitem(devices.RUNTIMES, "cuda", stand_in)
        yield stand_in
        stand_in.broken = ""
        stand_in.release()
